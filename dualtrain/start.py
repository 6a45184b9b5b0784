"""From a loaded recipe to ranks that train: in this process, in several, or on several machines."""

from __future__ import annotations

import sys
from pathlib import Path

from dualtrain.errors import UserError
from dualtrain.hostfile import read_hostfile, record_outcome, run_hostfile
from dualtrain.launch import (
    current_world,
    default_ranks,
    run_ranks,
    single_world,
)
from dualtrain.recipe.checks import check_world_size
from dualtrain.recipe.load import LoadedRecipe
from dualtrain.recipe.schema import Recipe
from dualtrain.run_directory import lock_run_directory, prepare_run_directory
from dualtrain.terminal import forget_output

OUTCOME = Path("logs", "exit-code")
"""Where rank 0 leaves its exit code, in the run directory."""


def start(loaded: LoadedRecipe, *, ranks: int | None, hostfile: Path | None, plain: bool) -> int:
    """Train a recipe and return the exit code.

    Under a launcher this process is one rank. Otherwise it is the only rank, or the parent that
    first makes the dataset if the recipe says how, then starts the ranks with the resolved recipe.

    Raises:
        UserError: for everything that can be refused before any rank starts.
    """
    world = current_world()
    if world is not None:
        if ranks is not None and ranks != world.world_size:
            raise UserError(
                "--ranks", f"{ranks}, but the launcher started {world.world_size}", "the same"
            )
        code = _train(loaded, plain=plain)
        if world.rank == 0:
            record_outcome(loaded.recipe.directory / OUTCOME, code)
        return code
    if loaded.recipe.model.hf is not None:
        from dualtrain.import_model import read_hf_config

        read_hf_config(loaded.recipe)  # before hours are spent on a dataset
    run_dir = prepare_run_directory(loaded.recipe)
    # Looked at before anything heavy is imported; rank 0 takes it for good.
    lock_run_directory(loaded.recipe).close()
    if hostfile is None:
        ranks = ranks or default_ranks()
        check_world_size(loaded.recipe, ranks)
    else:
        machines = read_hostfile(hostfile, ranks=ranks)
        check_world_size(loaded.recipe, sum(ranks or machine.slots for machine in machines))
    if loaded.recipe.eval.tasks:
        from dualtrain.evaluate.in_training import read_tasks

        read_tasks(loaded.recipe.eval)  # a mistake there need not wait for the dataset
    _build_dataset(loaded.recipe)
    if ranks == 1 and hostfile is None:
        single_world()
        return _train(loaded, plain=plain)
    # Not the run's own recipe.yaml, which is written once nothing speaks against this one.
    resolved = (run_dir / "logs" / "recipe.yaml").resolve()
    resolved.parent.mkdir(exist_ok=True)
    resolved.write_text(loaded.text)
    arguments = ["run", str(resolved), *(["--plain"] if plain else [])]
    if hostfile is not None:
        return run_hostfile(arguments, hostfile=hostfile, ranks=ranks, outcome=run_dir / OUTCOME)
    assert ranks is not None
    command = [sys.executable, "-m", "dualtrain", *arguments]
    return run_ranks(command, ranks=ranks, log_dir=run_dir / "logs")


def _train(loaded: LoadedRecipe, *, plain: bool) -> int:
    from dualtrain.peers import explaining_lost_peers
    from dualtrain.train import train

    recipe = loaded.recipe
    with explaining_lost_peers(recipe.directory, timeout_s=recipe.engine.timeout_s):
        return train(recipe, view="plain" if plain else "auto")


def _build_dataset(recipe: Recipe) -> None:
    from dualtrain.data.build import build_missing_dataset

    try:
        build_missing_dataset(recipe)
    except BrokenPipeError:
        # Whoever read the output has left, which must not end a run; what is made stays made.
        forget_output()
        build_missing_dataset(recipe)
