"""What runs came to: their settings, and any number of their metrics or evaluations.

``fit``, ``compare`` and the table of a sweep see runs as this does. A metric is named by its key:
``ar_nll``, ``diffusion_nll``, ``prefix_nll`` and the other numbers of evaluation records; ``best.``
before it takes the lowest over the run instead of the last; ``train.`` before it asks the training
records (``train.ar_loss``); ``MODE.TASK`` and ``MODE.average`` are scores of tasks (``ar.blimp``),
from the newest evaluation by ``dualtrain eval``, else from the run itself.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from dualtrain.common.errors import UserError, nearest
from dualtrain.progress.metrics import Record, prefix_difference
from dualtrain.recipe.schema import Recipe
from dualtrain.recipe.yaml_source import Plain, parse
from dualtrain.sweep.definition import in_words, value_at
from dualtrain.sweep.directory import Outcome

BEST, TRAIN = "best.", "train."
PREFIX_MINUS_AR = "prefix_minus_ar"
"""Prefix loss minus AR loss of the same tokens, which records hold as two numbers."""
NAMED = 8
"""So many points are named in a message."""
SCORES_RISE = ("ar.", "prefix.", "pll.", "chain.", "elbo.")


@dataclass(frozen=True)
class RunResult:
    """A run that has ended, or not.

    Attributes:
        scores: Of tasks, as ``MODE.TASK`` and ``MODE.average``.
        outcome: How it ended, if it is a sweep's point that has.
    """

    directory: Path
    recipe: Recipe
    records: list[Record] = field(repr=False)
    scores: Mapping[str, float | None] = field(repr=False)
    outcome: Outcome | None = None

    @property
    def label(self) -> str:
        """What to call it."""
        return self.directory.name

    @property
    def state(self) -> str:
        """finished, failed, or unfinished."""
        return self.outcome.state if self.outcome else "unfinished"

    @cached_property
    def evals(self) -> list[dict[str, Any]]:
        """Its evaluation records, oldest first."""
        found = [dict(r) for r in self.records if r["kind"] == "eval"]
        for record in found:
            difference = prefix_difference(record)  # type: ignore[arg-type]
            if difference is not None:
                record[PREFIX_MINUS_AR] = difference
        return found

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Its training records, oldest first."""
        return [dict(r) for r in self.records if r["kind"] == "train"]

    @cached_property
    def is_finished(self) -> bool:
        """Whether its last training step is done and evaluated."""
        return bool(
            self.steps
            and self.evals
            and self.steps[-1]["step"] == self.steps[-1]["steps"] == self.evals[-1]["step"]
        )

    @property
    def trackers(self) -> list[str]:
        """Where its records went, and figures of it go."""
        return self.recipe.progress.trackers

    @property
    def repetitions(self) -> float:
        """Passes over the unique subset at the end of the run, as asked for if that is known."""
        if self.recipe.repetitions is not None:
            return self.recipe.repetitions
        return round(self.steps[-1]["epoch"] * self.steps[-1]["steps"] / self.steps[-1]["step"], 6)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Every finite number of the run by name, in the order in which they are offered."""
        numbers: dict[str, object] = {}
        if self.evals:
            numbers |= self.evals[-1]
        for key in numbers | {}:
            values = [r[key] for r in self.evals if is_finite(r.get(key))]
            if key.endswith("_nll") or key.endswith("_per_byte"):
                numbers[BEST + key] = min(values, default=None)
        if self.steps:
            numbers |= {TRAIN + key: value for key, value in self.steps[-1].items()}
        numbers |= self.scores
        return {key: float(value) for key, value in numbers.items() if is_finite(value)}  # type: ignore[arg-type]


class ModelResult(RunResult):
    """A model of which only scores are known, and alpha and repetitions of its recipe."""

    @property
    def trackers(self) -> list[str]:
        return []

    @cached_property
    def is_finished(self) -> bool:
        """Whether it has been evaluated."""
        return bool(self.scores)


def choose_metric(name: str, runs: Iterable[RunResult]) -> str:
    """Check that runs have a metric.

    Raises:
        UserError: None of them has it; the nearest name is shown.
    """
    known = list(dict.fromkeys(key for run in runs for key in run.metrics))
    if name in known:
        return name
    prefix = next((p for p in (TRAIN, BEST) if name.startswith(p)), None)
    offered = [
        key
        for key in known
        if (key.startswith(prefix) if prefix else not key.startswith((TRAIN, BEST)))
    ]
    raise UserError(
        "--metric",
        f"no run has {name!r}",
        f"one of {', '.join(offered) or 'none: there are no results yet'}",
        nearest(name, known),
    )


def rises(metric: str) -> bool:
    """Whether more of a metric is better: scores of tasks; losses fall."""
    return metric.startswith(SCORES_RISE)


def unit(metric: str) -> str:
    """A metric with its unit, for an axis."""
    if metric.endswith("_nll"):
        return f"{metric}, nats per token"
    if metric.endswith("_per_byte"):
        return f"{metric}, bits per byte"
    return f"{metric}, normalised score" if rises(metric) else metric


def setting(run: RunResult, key: str) -> Plain:
    """A run's value of a recipe key; null where its recipe has no such key."""
    try:
        return value_at(run.recipe, key)
    except KeyError:
        return None


def differing(runs: Sequence[RunResult], keys: Iterable[str]) -> dict[str, Counter[str]]:
    """The keys in which runs differ, each with the number of each of its values."""
    counts = {key: Counter(in_words(setting(run, key)) for run in runs) for key in keys}
    return {key: found for key, found in counts.items() if len(found) > 1}


def restrict(
    runs: Sequence[RunResult], keys: Sequence[str], where: Sequence[str], *, option: str = "--where"
) -> list[RunResult]:
    """The runs that meet conditions.

    Args:
        where: ``KEY=VALUE``; of several with the same key one has to hold.
        option: Where the conditions are from, for messages.

    Raises:
        UserError: A condition is none, is about another key, or holds for no run.
    """
    wanted: dict[str, list[object]] = {}
    for condition in where:
        key, equals, text = condition.partition("=")
        if not equals or key not in keys:
            raise UserError(
                option,
                f"{condition!r}" + (f": the sweep does not set {key!r}" if equals else " has no ="),
                f"KEY=VALUE with a key of {', '.join(keys)}",
                "" if key in keys else nearest(key, list(keys)),
            )
        value = parse(text, option, line=0)[0].plain()
        if not any(_is_same(setting(run, key), value) for run in runs):
            there = dict.fromkeys(in_words(setting(run, key)) for run in runs)
            raise UserError(option, f"no point has {condition}", f"a value of {', '.join(there)}")
        wanted.setdefault(key, []).append(value)
    found = [
        run
        for run in runs
        if all(any(_is_same(setting(run, k), v) for v in values) for k, values in wanted.items())
    ]
    if not found:
        raise UserError(option, f"no point has all of {', '.join(where)}")
    return found


def named(labels: Sequence[str]) -> str:
    """Some names, and how many there are beside them."""
    more = len(labels) - NAMED
    return ", ".join(labels[:NAMED]) + (f" and {more} more" if more > 0 else "")


def finished(runs: Sequence[RunResult], notes: list[str]) -> list[RunResult]:
    """The runs that have come to their end.

    Raises:
        UserError: None has.
    """
    rest = [run for run in runs if run.state != "failed"]
    kept = [run for run in rest if run.is_finished]
    if failed := [run.label for run in runs if run.state == "failed"]:
        notes.append(f"left out, because they failed: {named(failed)}")
    if unfinished := [run.label for run in rest if not run.is_finished]:
        notes.append(f"left out, because they are not finished: {named(unfinished)}")
    if not kept:
        raise UserError("sweep", f"no point is finished: {'; '.join(notes)}", "finished points")
    return kept


def table_text(keys: Sequence[str], runs: Sequence[RunResult], metrics: Sequence[str]) -> str:
    """The points with their settings, states and metrics as CSV, without anything of the clock."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*keys, "state", "step", *metrics])
    for run in runs:
        settings = [in_words(setting(run, key)) for key in keys]
        step = run.steps[-1]["step"] if run.steps else 0
        numbers = [repr(run.metrics[m]) if m in run.metrics else "" for m in metrics]
        writer.writerow([*settings, run.state, step, *numbers])
    return out.getvalue()


def _is_same(value: object, wanted: object) -> bool:
    """Whether a setting has a value that a user wrote: 1/8 is 0.125, what is left out a default."""
    if value == wanted:
        return True
    if isinstance(value, list) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(_is_same, value, wanted))
    if isinstance(value, dict) and isinstance(wanted, dict) and wanted:
        return all(key in value and _is_same(value[key], wanted[key]) for key in wanted)
    try:
        return Fraction(str(value)) == Fraction(str(wanted))
    except (ValueError, ZeroDivisionError):
        return False


def is_number(value: object) -> bool:
    """Whether a value is a number, which truth values are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether a value is a finite number."""
    try:
        return is_number(value) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer that no float comes near
        return False
