"""The results of an evaluation: as tables for people, and as JSON with all that led to them."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import dualtrain
from dualtrain.evaluate.heldout import HeldOut
from dualtrain.evaluate.statistics import CONFIDENCE, RESAMPLES, Estimate, average
from dualtrain.evaluate.task_result import TaskResult
from dualtrain.evaluate.tasks import Task, TaskItems

if TYPE_CHECKING:
    from dualtrain.checkpoint.trained import ModelSource
    from dualtrain.evaluate.scoring import Mode

FORMAT = 1
_WIDTH = 110
_LOSS_KEYS = ("nll", "bits_per_byte", "error")
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "jinja2")


@dataclass
class Evaluation:
    """All that is known of an evaluation."""

    source: ModelSource
    settings: dict[str, Any]  # what decides the numbers
    data: str | None = None  # directory of the held-out text
    dataset: str | None = None
    held_out: HeldOut | None = None
    tasks: list[Task] = field(default_factory=list)
    items: dict[str, TaskItems] = field(default_factory=dict)  # by the task's name
    results: list[TaskResult] = field(default_factory=list)
    files: dict[tuple[str, Mode], str] = field(default_factory=dict)  # names of files of items
    notes: list[str] = field(default_factory=list)

    def averages(self) -> dict[str, Estimate]:
        """Mean of the tasks' normalised scores, by mode."""
        modes = dict.fromkeys(result.mode for result in self.results)
        chosen = {mode: [r for r in self.results if r.mode == mode] for mode in modes}
        return {
            mode: average([r.score.value for r in found], [r.resampled_scores for r in found])
            for mode, found in chosen.items()
        }


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Everything, for ``results.json``."""
    averages = evaluation.averages()
    return {
        "format": FORMAT,
        "model": _model(evaluation.source),
        "settings": evaluation.settings,
        "versions": _versions(),
        "notes": evaluation.notes,
        "held_out": _held_out(evaluation),
        "bootstrap": {"resamples": RESAMPLES, "confidence": CONFIDENCE, "over": "items"},
        "average": {
            mode: {**asdict(estimate), "tasks": len(evaluation.tasks)}
            for mode, estimate in averages.items()
        },
        "tasks": {task.name: _task(evaluation, task) for task in evaluation.tasks},
    }


def print_report(evaluation: Evaluation) -> None:
    """Show held-out losses, the table of tasks, and notes on standard output."""
    # rich cuts the columns of a table that does not fit; a terminal wraps them and loses nothing.
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    if evaluation.held_out is not None:
        _print_held_out(evaluation.held_out, console)
    if evaluation.results:
        _print_tasks(evaluation, console)
    if evaluation.notes:
        console.print()
    for note in evaluation.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _model(source: ModelSource) -> dict[str, Any]:
    recipe = source.recipe
    return {
        "name": source.name,
        "path": str(source.path.resolve()),
        "step": source.facts.get("step"),
        "recipe": None if recipe is None else recipe.model_dump(mode="json"),
        "trained_on": None if source.info is None else source.info.fingerprint,
    }


def _versions() -> dict[str, str]:
    found = {name: metadata.version(name) for name in _LIBRARIES}
    return {"dualtrain": dualtrain.__version__, "python": platform.python_version(), **found}


def _held_out(evaluation: Evaluation) -> dict[str, Any] | None:
    losses = evaluation.held_out
    if losses is None:
        return None
    numbers = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(losses).items()
    }
    return {"data": evaluation.data, "dataset": evaluation.dataset, **numbers}


def _task(evaluation: Evaluation, task: Task) -> dict[str, Any]:
    items = evaluation.items[task.name]
    results = [result for result in evaluation.results if result.task == task.name]
    return {
        "description": task.spec.description,
        "metric": task.spec.metric,
        "task_file": {"path": str(task.file.path), "sha256": task.file.sha256},
        "data": {"origin": items.origin, "sha256": items.sha256, "items": items.total},
        "items": len(items.items),
        "modes": {
            result.mode: {
                **result.json(),
                "items_file": evaluation.files[result.task, result.mode],
            }
            for result in results
        },
    }


def _print_held_out(losses: HeldOut, console: Console) -> None:
    change = losses.prefix_nll - losses.ar_nll_same_tokens
    about = {
        "AR": "",
        "diffusion": "upper bound",
        "prefix": "second halves of documents, the first read both ways",
    }
    counted = f"{losses.tokens:,} tokens of {losses.documents:,} documents"
    console.print(f"\nheld-out loss, {counted}", markup=False, style="bold")
    table = _table("", "nats/token", "bits/byte", "")
    table.columns[-1].justify = "left"
    for name, text in about.items():
        nats, bits, error = (getattr(losses, f"{name.lower()}_{key}") for key in _LOSS_KEYS)
        error_bits = error * bits / nats if nats else 0.0
        row = (name, f"{nats:.4f} ± {error:.4f}", f"{bits:.4f} ± {error_bits:.4f}", text)
        table.add_row(*map(Text, row))
    to_ar = f"{change:+.4f} ± {losses.prefix_minus_ar_error:.4f} nats to AR on the same tokens"
    table.add_row("", "", "", Text(to_ar))
    console.print(table)


def _print_tasks(evaluation: Evaluation, console: Console) -> None:
    results = evaluation.results
    counts = {"cut": [r.cut for r in results], "left out": [r.left_out for r in results]}
    extra = [name for name, numbers in counts.items() if any(numbers)]
    console.print("\nzero-shot tasks", style="bold")
    names = ("task", "mode", "items", "chance", "accuracy", "per character", "score")
    table = _table(*names, *extra)
    table.columns[1].justify = "left"
    last = ""
    for number, result in enumerate(results):
        numbers = [f"{counts[name][number]:,}" for name in extra]
        table.add_row(
            *map(Text, [*_row(evaluation, result, is_first=result.task != last), *numbers])
        )
        last = result.task
    averages = evaluation.averages() if len(evaluation.tasks) > 1 else {}
    for mode, estimate in averages.items():
        name = f"average of {len(evaluation.tasks)}" if mode == results[0].mode else ""
        table.add_row(Text(name), Text(mode), *[""] * 4, Text(_shown(estimate), style="bold"))
    console.print(table)
    for line in _legend(evaluation, extra):
        console.print(f"  {line}", style="dim", markup=False)


def _row(evaluation: Evaluation, result: TaskResult, *, is_first: bool) -> Iterator[str]:
    items = evaluation.items[result.task]
    scored = f"{len(result.items):,}"
    yield result.task if is_first else ""
    yield result.mode
    yield (scored if len(result.items) == items.total else f"{scored}/{items.total:,}") * is_first
    yield f"{100 * result.chance:.1f}" * is_first
    yield _shown(result.accuracy, 100)
    yield _shown(result.accuracy_norm, 100) if result.metric == "accuracy_norm" else "-"
    yield _shown(result.score)


def _legend(evaluation: Evaluation, extra: Sequence[str]) -> Iterator[str]:
    limit = evaluation.settings["limit"]
    if limit is not None:
        yield f"--limit {limit}: at most {limit:,} items of each task, evenly spread over its data"
    yield (
        "score: 100·(accuracy - chance)/(1 - chance), of the accuracy per character where there "
        "is one"
    )
    yield "in parentheses: 95 % bootstrap intervals over items"
    if "cut" in extra:
        yield "cut: items whose prompt lost its beginning, for want of context"
    if "left out" in extra:
        yield "left out: items with an answer longer than the model's context"


def _shown(estimate: Estimate, factor: float = 1) -> str:
    value, low, high = (factor * n for n in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} ({low:.1f}, {high:.1f})"


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 0, 0, 2), header_style="")
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table
