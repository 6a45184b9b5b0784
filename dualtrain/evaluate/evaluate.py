"""What ``dualtrain eval`` does: check, load, score, show and write."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dualtrain.checkpoint.trained import (
    ModelSource,
    TrainedModel,
    check_precision,
    choose,
    find_source,
    open_trained,
)
from dualtrain.common.errors import UserError, nearest
from dualtrain.common.files import user_path
from dualtrain.data.batches import ValidationData
from dualtrain.data.dataset import DatasetInfo, TokenDataset
from dualtrain.evaluate.heldout import HeldOut, held_out_losses
from dualtrain.evaluate.report import Evaluation, as_json, print_report
from dualtrain.evaluate.result_files import ResultDirectory
from dualtrain.evaluate.scoring import MASKING_MODES, MODES, Mode, Scorer, encode_pair
from dualtrain.evaluate.tasks import SHIPPED, Task, load_tasks, score_task
from dualtrain.evaluate.tokenizer_differences import tokenizer_differences
from dualtrain.model.memory import is_out_of_memory
from dualtrain.progress.bar import WorkBar
from dualtrain.recipe.schema import AlphaSchedule, Recipe

if TYPE_CHECKING:
    from dualtrain.evaluate.command import EvalOptions

DEFAULT_SEQUENCES = 256
"""Held-out sequences of a model whose recipe is not known."""
DEFAULT_TOKENS = 4096
"""Tokens of a forward pass on held-out text, of such a model."""


def evaluate_model(
    options: EvalOptions, *, is_done: Callable[[Evaluation], bool] = lambda evaluation: False
) -> Evaluation:
    """Evaluate a model, show the results and write them.

    Everything that can be refused is, before the model is read.

    Args:
        is_done: Whether there are the results already that an evaluation would have.

    Raises:
        UserError: There is no such model, task or mode; data that cannot be used; nothing to do.
    """
    with WorkBar() as bar:
        bar.begin("reading data")
        evaluation, dataset = _prepare(options)
        if is_done(evaluation):
            return evaluation
        directory = _begin_results(options, evaluation.source)
        try:
            bar.begin("reading the model")
            model = open_trained(
                evaluation.source, device=options.device, precision=options.precision
            )
            evaluation.settings |= {
                "device": str(model.device),
                "precision": model.precision,
                "attention": model.backend,
                "context": model.context,
                "target": model.target,
            }
            source = evaluation.source
            bar.say(f"{source.name}: {source.path}, on {model.device}, {model.precision}")
            if dataset is not None:
                bar.begin("held-out losses")
                evaluation.held_out = _held_out(evaluation, model, dataset, options, bar)
            _score_tasks(evaluation, model, options, directory, bar)
            directory.finish(as_json(evaluation))
        except BaseException:
            left = directory.give_up()
            if left is not None:
                bar.say(f"items scored so far: {left}")
            raise
    print_report(evaluation)
    print(f"\nwritten: {directory.path}")
    return evaluation


def _prepare(options: EvalOptions) -> tuple[Evaluation, TokenDataset | None]:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("dualtrain eval", "was started on several ranks", "one process")
    check_precision(options.precision)
    choose(options.device)
    source = find_source(options.path, step=options.step)
    notes = list(source.notes)
    settings = {
        "modes": choose_modes(options.modes, source, notes),
        "limit": options.limit,
        "sequences": options.sequences,
        "seed": options.seed,
        "elbo_samples": options.elbo_samples,
    }
    evaluation = Evaluation(source, settings, tasks=choose_tasks(options, notes), notes=notes)
    for task in evaluation.tasks:
        evaluation.items[task.name] = task.read(options.limit)
    dataset = _open_held_out(options, evaluation)
    if dataset is None and not evaluation.tasks:
        reason = "; ".join(notes) or "neither held-out losses nor tasks are asked for"
        raise UserError("dualtrain eval", f"there is nothing to do: {reason}")
    return evaluation, dataset


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
        names = _names(asked, "--mode")
        for name in names:
            if name not in MODES:
                what, expected = f"{name!r} is not known", f"some of {', '.join(MODES)}"
                raise UserError("--mode", what, expected, nearest(name, MODES))
        modes = cast("list[Mode]", names)
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


def choose_tasks(options: EvalOptions, notes: list[str]) -> list[Task]:
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
        tasks = load_tasks(names, options.tasks_dir, on_note=notes.append)
        # Of all tasks, those whose data can be had.
        return [task for task in tasks if names or task.spec.hub or task.data_file()]
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


def _open_held_out(options: EvalOptions, evaluation: Evaluation) -> TokenDataset | None:
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
    path = options.data or (None if recipe is None else user_path(recipe.data.path))
    if path is None:
        evaluation.notes.append("no held-out losses: --data may name a dataset of its tokenizer")
        return None
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


def _begin_results(options: EvalOptions, source: ModelSource) -> ResultDirectory:
    if options.out is not None:
        return ResultDirectory.named(options.out)
    name = source.path.resolve().name if source.is_checkpoint else "model"
    return ResultDirectory.numbered(source.run_dir / "eval", name)


def _held_out(
    evaluation: Evaluation,
    model: TrainedModel,
    dataset: TokenDataset,
    options: EvalOptions,
    bar: WorkBar,
) -> HeldOut:
    recipe, tokens = model.source.recipe, options.tokens_per_batch
    sequences = options.sequences
    if sequences is None:
        sequences = DEFAULT_SEQUENCES if recipe is None else recipe.eval.sequences
    validation = ValidationData(
        dataset,
        sequence_length=model.context,
        append_eos=model.source.append_eos,
        document_mask=model.source.document_mask,
        sequences=sequences,
    )
    # No more than there are: what is missing in a batch is filled up.
    micro_batch = max(1, min((tokens or DEFAULT_TOKENS) // model.context, len(validation)))
    if recipe is not None and tokens is None:
        micro_batch = recipe.micro_batch
    while True:
        try:
            return held_out_losses(model, validation, micro_batch=micro_batch, seed=options.seed)
        except (RuntimeError, MemoryError) as error:
            if micro_batch == 1 or not is_out_of_memory(error):
                raise
        micro_batch //= 2
        sequences_now = "1 sequence" if micro_batch == 1 else f"{micro_batch} sequences"
        _note(evaluation, bar, f"memory ran out: held-out losses with {sequences_now} at once")


def _score_tasks(
    evaluation: Evaluation,
    model: TrainedModel,
    options: EvalOptions,
    directory: ResultDirectory,
    bar: WorkBar,
) -> None:
    scorer = Scorer(
        model,
        tokens_per_batch=options.tokens_per_batch,
        elbo_samples=options.elbo_samples,
        seed=options.seed,
        on_note=partial(_note, evaluation, bar),
    )
    evaluation.settings["tokens_per_batch"] = scorer.tokens_per_batch
    modes: list[Mode] = evaluation.settings["modes"]
    count = len(evaluation.tasks) * len(modes)
    for task in evaluation.tasks:
        # Every mode asks for the same requests.
        encode = cache(partial(encode_pair, model.tokenizer, bos_id=model.vocabulary.bos_id))
        for mode in modes:
            bar.begin(f"{len(evaluation.results) + 1}/{count} {task.name}, {mode}")
            result = score_task(
                task,
                evaluation.items[task.name].items,
                scorer,
                encode,
                mode,
                on_progress=bar.update,
                seed=options.seed,
            )
            evaluation.results.append(result)
            evaluation.files[task.name, mode] = directory.write_items(result)
            bar.say(result.sentence())


def _note(evaluation: Evaluation, bar: WorkBar, text: str) -> None:
    evaluation.notes.append(text)
    bar.say(f"note: {text}")
