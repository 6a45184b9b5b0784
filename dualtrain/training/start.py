"""From a loaded recipe to ranks that train: in this process, in several, or on several machines.

What a run would refuse is refused by :func:`show`, too, unless it depends on the machine.
"""

from __future__ import annotations

from pathlib import Path

from dualtrain.common.errors import UserError
from dualtrain.common.files import write_text
from dualtrain.common.terminal import forget_output
from dualtrain.data.corpus import CorpusFacts, read_corpus
from dualtrain.derived.derive import derive
from dualtrain.derived.memory import memory_shortage
from dualtrain.launch.hostfile import read_hostfile, record_outcome, run_hostfile
from dualtrain.launch.ranks import (
    own_command,
    run_ranks,
)
from dualtrain.launch.world import (
    current_world,
    default_ranks,
    single_world,
)
from dualtrain.progress.trackers.registry import check_trackers
from dualtrain.recipe.checks import check_world_size
from dualtrain.recipe.load import LoadedRecipe
from dualtrain.recipe.schema import Recipe
from dualtrain.training.dataset import build_missing_dataset, check_dataset, missing_dataset
from dualtrain.training.prepare import (
    check_run_directory,
    has_checkpoints,
    lock_run_directory,
    prepare_run_directory,
)

OUTCOME = Path("logs", "exit-code")
"""Where rank 0 leaves its exit code, in the run directory."""


def show(loaded: LoadedRecipe, *, ranks: int | None, hostfile: Path | None) -> None:
    """The dry run: show a recipe and what follows from it; nothing is made or changed."""
    from dualtrain.derived.dry_run import print_dry_run

    recipe = loaded.recipe
    total = _count(ranks, hostfile)
    examine(recipe, total)
    check_run_directory(recipe)
    check_dataset(recipe)
    corpus = read_corpus(recipe)
    derived = derive(recipe, corpus=corpus, world_size=total)
    _check_data(recipe, corpus)
    _check_origin(loaded, corpus)
    print_dry_run(loaded, derived)
    if hostfile is None:
        for problem in (missing_dataset(recipe), memory_shortage(derived, ranks=ranks or 1)):
            if problem is not None:
                print(f"warning: {problem}; this machine will refuse the run")


def start(loaded: LoadedRecipe, *, ranks: int | None, hostfile: Path | None, plain: bool) -> int:
    """Train a recipe and return the exit code.

    Under a launcher this process is one rank. Otherwise it is the only rank, or the parent that
    first makes the dataset if the recipe says how, then starts the ranks with the resolved recipe.
    """
    recipe = loaded.recipe
    world = current_world()
    if world is not None:
        if ranks is not None and ranks != world.world_size:
            raise UserError(
                "--ranks", f"{ranks}, but the launcher started {world.world_size}", "the same"
            )
        code = _train(loaded, plain=plain)
        if world.rank == 0:
            record_outcome(recipe.directory / OUTCOME, code)
        return code
    check_run_directory(recipe)
    if hostfile is None:
        ranks = ranks or default_ranks()
    total = _count(ranks, hostfile)
    examine(recipe, total)  # before hours are spent on a dataset
    check_dataset(recipe)
    if hostfile is None and (missing := missing_dataset(recipe)):
        raise missing
    corpus = read_corpus(recipe)
    if corpus is not None or recipe.unique_tokens != "all":
        derived = derive(recipe, corpus=corpus, world_size=total)
        if hostfile is None and (shortage := memory_shortage(derived, ranks=total or 1)):
            raise shortage
    # Whatever can be refused before has left nothing; rank 0 takes the lock for good.
    run_dir = prepare_run_directory(recipe)
    lock_run_directory(recipe).close()
    _build_dataset(recipe)
    if ranks == 1 and hostfile is None:
        single_world()
        return _train(loaded, plain=plain)
    # Not the run's own recipe.yaml, which is written once nothing speaks against this one.
    resolved = (run_dir / "logs" / "recipe.yaml").resolve()
    resolved.parent.mkdir(exist_ok=True)
    write_text(resolved, loaded.text)
    arguments = ["run", str(resolved), *(["--plain"] if plain else [])]
    if hostfile is not None:
        return run_hostfile(arguments, hostfile=hostfile, ranks=ranks, outcome=run_dir / OUTCOME)
    assert ranks is not None
    return run_ranks(own_command(arguments), ranks=ranks, log_dir=run_dir / "logs")


def _count(ranks: int | None, hostfile: Path | None) -> int | None:
    """Ranks of the run, over all machines; None where nothing says how many."""
    if hostfile is None:
        return ranks
    return sum(ranks or machine.slots for machine in read_hostfile(hostfile, ranks=ranks))


def examine(recipe: Recipe, ranks: int | None) -> None:
    """Refuse what is wrong whatever the dataset is."""
    if ranks is not None:
        check_world_size(recipe, ranks)
    if recipe.model.hf is not None:
        from dualtrain.model.hugging_face import read_hf_config

        read_hf_config(recipe)
    if recipe.algorithms:
        from dualtrain.algorithms.registry import build_algorithms

        build_algorithms(recipe)
    if recipe.eval.tasks:
        from dualtrain.training.evaluation import read_tasks

        read_tasks(recipe.eval)
    check_trackers(recipe.progress.trackers)


def _check_data(recipe: Recipe, corpus: CorpusFacts | None) -> None:
    """Refuse a dataset that a run could not read; one that is not there yet may be made."""
    if recipe.data.remote is not None or corpus is None:
        return
    from dualtrain.data.dataset import TokenDataset, check_held_out

    TokenDataset.open(recipe.data.path, "train")
    held_out = TokenDataset.open(recipe.data.path, "val")
    check_held_out(held_out, recipe.sequence_length, append_eos=recipe.data.append_eos)


def _check_origin(loaded: LoadedRecipe, corpus: CorpusFacts | None) -> None:
    """Refuse to go on from a checkpoint with which the run would be another."""
    recipe = loaded.recipe
    resume, run_dir = recipe.checkpoint.resume, recipe.directory
    if resume in ("auto", "never") and not has_checkpoints(run_dir):
        return
    from dualtrain.checkpoint.resume import check_compatible, choose_resume
    from dualtrain.data.dataset import DatasetInfo
    from dualtrain.training.branch import check_branch

    origin = choose_resume(resume, run_dir)
    if origin.path is None or not origin.continues or corpus is None or recipe.data.remote:
        return
    info = DatasetInfo.load(recipe.data.path)
    check_compatible(origin, recipe_text=loaded.text, fingerprint=info.fingerprint)
    if origin.kind == "branch":
        check_branch(recipe, origin.path, corpus)


def _train(loaded: LoadedRecipe, *, plain: bool) -> int:
    from dualtrain.launch.peers import explaining_lost_peers
    from dualtrain.training.train import train

    recipe = loaded.recipe

    def newest_step() -> int | None:
        from dualtrain.checkpoint.store import find_checkpoints

        found = find_checkpoints(recipe.directory)
        return int(found[-1].name[5:]) if found else None

    with explaining_lost_peers(newest_step, timeout_s=recipe.engine.timeout_s):
        return train(recipe, view="plain" if plain else "auto")


def _build_dataset(recipe: Recipe) -> None:
    try:
        build_missing_dataset(recipe)
    except BrokenPipeError:
        # Whoever read the output has left, which must not end a run; what is made stays made.
        forget_output()
        build_missing_dataset(recipe)
