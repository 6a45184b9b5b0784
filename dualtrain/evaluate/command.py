"""``dualtrain eval``: held-out losses and zero-shot tasks of a trained model, shown and written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

from dualtrain.checkpoint.trained import (
    ModelSource,
    TrainedModel,
    check_precision,
    find_source,
    open_trained,
)
from dualtrain.common.errors import UserError, nearest
from dualtrain.common.files import user_path
from dualtrain.data.batches import ValidationData
from dualtrain.data.dataset import DatasetInfo, TokenDataset
from dualtrain.evaluate.heldout import held_out_losses
from dualtrain.evaluate.report import Evaluation, as_json, print_report
from dualtrain.evaluate.result_files import ResultDirectory
from dualtrain.evaluate.scoring import MASKING_MODES, MODES, Mode, Scorer, encode_pair
from dualtrain.evaluate.tasks import SHIPPED, Task, load_tasks, score_task
from dualtrain.evaluate.tokenizer_differences import tokenizer_differences
from dualtrain.evaluate.view import View
from dualtrain.model.memory import is_out_of_memory
from dualtrain.recipe.schema import AlphaSchedule, Recipe

DEFAULT_SEQUENCES = 256
"""Held-out sequences of a model whose recipe is not known."""
DEFAULT_TOKENS = 4096
"""Tokens of a forward pass on held-out text, of such a model."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asks for; None leaves it to :func:`evaluate`.

    Attributes:
        path: A run, a checkpoint or an exported model.
        tasks: Names with commas between, ``all`` or ``none``.
        tasks_dir: Where data files, and the user's own task files, are.
        limit: Items of a task, at most.
        sequences: Of it, at most; 0 leaves held-out losses out.
        device: Such as ``cpu`` or ``cuda``.
        precision: ``fp32`` or ``bf16``.
        elbo_samples: Masks for each answer in the mode ``elbo``.
        seed: Of masks and of the bootstrap.
    """

    path: str
    step: int | None = None
    tasks: str | None = None
    modes: str | None = None
    tasks_dir: Path | None = None
    limit: int | None = None
    data: Path | None = None
    sequences: int | None = None
    out: Path | None = None
    device: str | None = None
    precision: str | None = None
    tokens_per_batch: int | None = None
    elbo_samples: int = 32
    seed: int = 0


def evaluate(options: Options) -> Evaluation:
    """Evaluate a model, show the results and write them.

    Everything that can be refused is, before the model is read.

    Raises:
        UserError: There is no such model, task or mode; data that cannot be used; nothing to do.
    """
    with View() as view:
        work = _prepare(options, view)
        directory = _begin_results(options, work.evaluation.source)
        try:
            _work(work, options, directory, view)
            directory.finish(as_json(work.evaluation))
        except BaseException:
            left = directory.give_up()
            if left is not None:
                view.say(f"items scored so far: {left}")
            raise
    print_report(work.evaluation)
    print(f"\nwritten: {directory.path}")
    return work.evaluation


@dataclass(frozen=True)
class _Work:
    """What is to be done, once nothing in it can be refused any more."""

    evaluation: Evaluation
    modes: list[Mode]
    held_out: TokenDataset | None


def _prepare(options: Options, view: View) -> _Work:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("dualtrain eval", "was started on several ranks", "one process")
    view.begin("reading data")
    source = find_source(options.path, step=options.step)
    notes = list(source.notes)
    modes = choose_modes(options.modes, source, notes)
    check_precision(options.precision)
    evaluation = Evaluation(source, {}, tasks=choose_tasks(options, notes), notes=notes)
    for task in evaluation.tasks:
        evaluation.items[task.name] = task.read(options.limit)
    held_out = _open_held_out(options, evaluation)
    if held_out is None and not evaluation.tasks:
        reason = "; ".join(notes) or "neither held-out losses nor tasks are asked for"
        raise UserError("dualtrain eval", f"there is nothing to do: {reason}")
    return _Work(evaluation, modes, held_out)


def _work(work: _Work, options: Options, directory: ResultDirectory, view: View) -> None:
    view.begin("reading the model")
    source = work.evaluation.source
    trained = open_trained(source, device=options.device, precision=options.precision)
    work.evaluation.settings |= _settings(options, trained, work.modes)
    view.say(f"{source.name}: {source.path}, on {trained.device}, {trained.precision}")
    if work.held_out is not None:
        _held_out(work.evaluation, trained, work.held_out, options, view)
    _score_tasks(work.evaluation, trained, work.modes, options, directory, view)


def choose_modes(asked: str | None, source: ModelSource, notes: list[str]) -> list[Mode]:
    """The modes asked for, or those that the model was trained for.

    Args:
        notes: Gets what the user should know.

    Raises:
        UserError: There is no such mode, or the model cannot be used in it.
    """
    alphas = _alphas(source.recipe)
    has_mask = source.vocabulary.mask is not None
    if asked is None:
        masks = has_mask and (alphas is None or min(alphas) < 1)
        modes: list[Mode] = ["ar", "prefix", "pll"] if masks else ["ar", "prefix"]
    else:
        modes = [_mode(name) for name in _names(asked, "--mode")]
    masking = [mode for mode in modes if mode in MASKING_MODES]
    causal = [mode for mode in modes if mode not in MASKING_MODES]
    if masking and not has_mask:
        what = f"{source.path} has no mask token, without which there is no {masking[0]}"
        raise UserError("--mode", what, "ar or prefix")
    if masking and alphas is not None and min(alphas) == 1:
        notes.append(
            f"trained with alpha 1, never on masked text: {', '.join(masking)} says little"
        )
    if causal and alphas is not None and max(alphas) == 0:
        notes.append(
            f"trained with alpha 0, never autoregressively: {', '.join(causal)} says little"
        )
    return modes


def choose_tasks(options: Options, notes: list[str]) -> list[Task]:
    """The tasks asked for, or those whose data is there.

    Args:
        notes: Gets what the user should know.

    Raises:
        UserError: There is no such task, or something is wrong with a task file.
    """
    if options.tasks == "none":
        return []
    if options.tasks is not None:
        names = None if options.tasks == "all" else _names(options.tasks, "--tasks")
        return load_tasks(names, options.tasks_dir, on_note=notes.append)
    known = load_tasks(None, options.tasks_dir, on_note=notes.append)
    found = [task for task in known if task.data_file() is not None]
    if not found:
        files = ", ".join(task.spec.data for task in known[:2])
        place = "a directory for --tasks-dir" if options.tasks_dir is None else options.tasks_dir
        notes.append(
            f"no tasks: put their data, such as {files} (or .gz, .xz, .zst), into {place}, or have "
            f"it fetched from the hub with --tasks all; {SHIPPED} says what the files hold"
        )
    return found


def _mode(name: str) -> Mode:
    for mode in MODES:
        if mode == name:
            return mode
    raise UserError(
        "--mode", f"{name!r} is not known", f"some of {', '.join(MODES)}", nearest(name, MODES)
    )


def _names(text: str, option: str) -> list[str]:
    """What stands between commas, each once."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(option, f"{text!r} has an empty name", "names with commas between")
    return list(dict.fromkeys(names))


def _alphas(recipe: Recipe | None) -> list[Fraction] | None:
    """The AR shares at the ends of a recipe's phases; None where they are not known."""
    if recipe is None:
        return None
    alpha = recipe.alpha
    if not isinstance(alpha, AlphaSchedule):
        return [alpha]
    start = [alpha.start] if alpha.name == "linear" else []
    return [*start, *(phase.alpha for phase in alpha.phases)]


def _open_held_out(options: Options, evaluation: Evaluation) -> TokenDataset | None:
    """Open the held-out split; where it is not there though nobody asked for it, say so.

    Raises:
        UserError: It was asked for by `--data` and cannot be used.
    """
    source, recipe = evaluation.source, evaluation.source.recipe
    if options.sequences == 0:
        return None
    if source.vocabulary.mask is None:
        evaluation.notes.append("no held-out losses: the model has no mask token")
        return None
    path = options.data
    if path is None and recipe is not None:
        path = Path(recipe.data.path)
    if path is None:
        evaluation.notes.append("no held-out losses: --data may name a dataset of its tokenizer")
        return None
    path = user_path(path)
    try:
        _check_tokenizer(path, source)
        dataset = TokenDataset.open(path, "val")
    except UserError as error:
        if options.data is not None:
            raise
        evaluation.notes.append(f"no held-out losses: {error}; --data may name another directory")
        return None
    evaluation.data = str(path.resolve())
    evaluation.dataset = dataset.info.fingerprint
    return dataset


def _check_tokenizer(path: Path, source: ModelSource) -> None:
    own, info = source.tokenizer_file, DatasetInfo.load(path)
    if hashlib.sha256(own.read_bytes()).hexdigest() == info.tokenizer_sha256:
        return
    differences = tokenizer_differences(own, path / info.tokenizer_file)
    if differences:
        what = f"has another tokenizer than {own}: it differs in {' and '.join(differences)}"
        raise UserError(str(path), what, "a dataset of the model's tokenizer")


def _begin_results(options: Options, source: ModelSource) -> ResultDirectory:
    if options.out is not None:
        return ResultDirectory.named(options.out)
    name = source.path.resolve().name if source.is_checkpoint else "model"
    return ResultDirectory.numbered(source.run_dir / "eval", name)


def _settings(options: Options, trained: TrainedModel, modes: Sequence[Mode]) -> dict[str, Any]:
    return {
        "modes": list(modes),
        "limit": options.limit,
        "seed": options.seed,
        "elbo_samples": options.elbo_samples,
        "device": str(trained.device),
        "precision": trained.precision,
        "attention": trained.backend,
        "context": trained.context,
        "target": trained.target,
    }


def _held_out(
    evaluation: Evaluation,
    trained: TrainedModel,
    dataset: TokenDataset,
    options: Options,
    view: View,
) -> None:
    view.begin("held-out losses")
    recipe, tokens = trained.source.recipe, options.tokens_per_batch
    sequences = options.sequences
    if sequences is None:
        sequences = DEFAULT_SEQUENCES if recipe is None else recipe.eval.sequences
    validation = ValidationData(
        dataset,
        sequence_length=trained.context,
        append_eos=trained.source.append_eos,
        sequences=sequences,
    )
    # No more than there are: what is missing in a batch is filled up.
    micro_batch = max(1, min((tokens or DEFAULT_TOKENS) // trained.context, len(validation)))
    if recipe is not None and tokens is None:
        micro_batch = recipe.micro_batch
    while evaluation.held_out is None:
        try:
            evaluation.held_out = held_out_losses(
                trained, validation, micro_batch=micro_batch, seed=options.seed
            )
        except (RuntimeError, MemoryError) as error:
            if micro_batch == 1 or not is_out_of_memory(error):
                raise
            micro_batch //= 2
            sequences_now = "1 sequence" if micro_batch == 1 else f"{micro_batch} sequences"
            _note(evaluation, view, f"memory ran out: held-out losses with {sequences_now} at once")


def _note(evaluation: Evaluation, view: View, text: str) -> None:
    evaluation.notes.append(text)
    view.say(f"note: {text}")


def _score_tasks(
    evaluation: Evaluation,
    trained: TrainedModel,
    modes: Sequence[Mode],
    options: Options,
    directory: ResultDirectory,
    view: View,
) -> None:
    scorer = Scorer(
        trained,
        tokens_per_batch=options.tokens_per_batch,
        elbo_samples=options.elbo_samples,
        seed=options.seed,
        on_note=partial(_note, evaluation, view),
    )
    evaluation.settings["tokens_per_batch"] = scorer.tokens_per_batch
    count = len(evaluation.tasks) * len(modes)
    for task in evaluation.tasks:
        # Every mode asks for the same requests.
        encode = cache(partial(encode_pair, trained.tokenizer, bos_id=trained.vocabulary.bos_id))
        for mode in modes:
            view.begin(f"{len(evaluation.results) + 1}/{count} {task.name}, {mode}")
            result = score_task(
                task,
                evaluation.items[task.name].items,
                scorer,
                encode,
                mode,
                on_progress=view.progress,
                seed=options.seed,
            )
            evaluation.results.append(result)
            evaluation.files[task.name, mode] = directory.write_items(result)
            view.say(result.sentence())
