"""Reading runs and sweeps from disk; what is damaged is named, with the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from dualtrain.checkpoint.store import RECIPE
from dualtrain.common.errors import UserError
from dualtrain.evaluate.result_files import RESULTS
from dualtrain.progress.metrics import FILE_NAME, Record, read_metrics
from dualtrain.recipe.load import load_recipe
from dualtrain.recipe.schema import Recipe
from dualtrain.recipe.yaml_source import load, shown
from dualtrain.sweep.directory import POINT, SWEEP, is_sweep, read_listing, read_outcome
from dualtrain.sweep.results import ModelResult, RunResult, is_finite, is_number, named

_NEEDED = {
    "train": ("step", "steps", "tokens", "epoch", "elapsed_s"),
    "eval": ("step",),
    "tasks": ("step",),
    "sample": ("step",),
    "event": (),
}
"""Finite numbers that a record of each kind has; all others may be null."""


@dataclass(frozen=True)
class SweepResults:
    """A sweep as far as it has come.

    Attributes:
        runs: The points that were begun, in order.
        absent: Names of those that were not, or that are gone.
        left_out: Notes on models that are no points.
    """

    keys: list[str]
    runs: list[RunResult]
    absent: list[str]
    left_out: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """What a reader should know about points that are missing."""
        if not self.absent:
            return list(self.left_out)
        return [f"left out, because they have not begun, or are gone: {named(self.absent)}"]


def read_run(directory: Path) -> RunResult:
    """Read a run's recipe, metrics and evaluations.

    Raises:
        UserError: It is no run, or they cannot be read.
    """
    path = directory / RECIPE
    if not path.is_file() and (directory / POINT).is_file():
        path = directory / POINT
    try:
        recipe = Recipe.model_validate(load(path.read_text(encoding="utf-8")))
    except OSError as error:
        what = f"is no run: {path.name} cannot be read: {error.strerror}"
        raise UserError(str(directory), what, "the directory of a run, such as runs/NAME") from None
    except (ValueError, yaml.YAMLError):
        recipe = load_recipe(str(path)).recipe  # slower, but it says what is wrong in which line
    records: list[Record] = []
    metrics = directory / FILE_NAME
    if metrics.is_file():
        records = read_metrics(metrics)
        _check_records(metrics, records)
    scores = dict(_scores(directory, records))
    return RunResult(directory, recipe, records, scores, read_outcome(directory))


def read_sweep(directory: Path) -> SweepResults:
    """Read all points of a sweep that were begun.

    Raises:
        UserError: It is no sweep's directory, has no points yet, or something in it is damaged.
    """
    if not (directory / SWEEP).is_file():
        if is_sweep(directory):
            return _read_models(directory)
        missing = "is no directory" if directory.exists() else "does not exist"
        what = f"has no {SWEEP}" if directory.is_dir() else missing
        expected = "the directory of a sweep, or of models such as alpha_0.500_n-reps=8"
        raise UserError(str(directory), what, expected, "`dualtrain sweep` makes one")
    listing = read_listing(directory)
    begun = [label for label in listing.points if _is_begun(directory / label)]
    if not begun:
        raise UserError(
            str(directory), "none of its points has been begun", "points with results",
            "give `dualtrain sweep` time, or look into its output",
        )  # fmt: skip
    absent = [label for label in listing.points if label not in begun]
    return SweepResults(listing.keys, [read_run(directory / label) for label in begun], absent)


def _read_models(directory: Path) -> SweepResults:
    """Read models that are named by alpha and repetitions, with their newest evaluations."""
    from dualtrain.export.released import read_branch  # which takes torch

    models = {file.parent.name: file.parent for file in sorted(directory.glob("*/config.json"))}
    runs: list[RunResult] = []
    conditions: dict[Path, dict[str, object]] = {}
    for name, path in models.items():
        branch = read_branch(name)
        if branch is None:
            continue
        # All else of its recipe is unknown here; nobody asks for another key than these.
        alpha, repetitions = _exact_alpha(branch[0]), branch[1]
        recipe = Recipe.model_construct(alpha=alpha, repetitions=repetitions, seed=0)
        files = _result_files(path)[-1:]
        scores = dict(_file_scores(files[0])) if files else {}
        runs.append(ModelResult(path, recipe, [], scores))
        if files:
            conditions[files[0]] = _conditions(files[0])
    if not conditions:
        hint = f"`dualtrain eval {directory} --all` evaluates them"
        raise UserError(str(directory), "none of its models has results", "results of eval", hint)
    (first, usual), *others = conditions.items()
    for file, found in others:
        if found != usual:
            key = next(key for key in {**usual, **found} if usual.get(key) != found.get(key))
            raise UserError(
                str(file), f"is of another {key} than {first}", "models that were evaluated alike",
                f"`dualtrain eval {directory} --all` with the same options evaluates the others",
            )  # fmt: skip
    unnamed = [name for name in models if read_branch(name) is None]
    left_out = []
    if unnamed:
        left_out.append(f"left out, because not named as alpha_0.500_n-reps=8: {named(unnamed)}")
    if bare := [run.label for run in runs if not run.scores]:
        left_out.append(f"left out, because they have no scores: {named(bare)}")
    known = [run for run in runs if run.scores]
    return SweepResults(["repetitions", "alpha"], known, [], left_out)


def _exact_alpha(shown: float) -> Fraction:
    """The share that a name rounds to three digits: of the paper's 256 devices, if there is one."""
    exact = Fraction(round(shown * 256), 256)
    return exact if f"{float(exact):.3f}" == f"{shown:.3f}" else Fraction(str(shown))


def _conditions(file: Path) -> dict[str, object]:
    """What has to be the same in results that are compared."""
    with _damage_named(file):
        found = json.loads(file.read_bytes())
        settings = {key: found["settings"].get(key) for key in ("limit", "seed", "elbo_samples")}
        data = {f"data of {name}": task["data"]["sha256"] for name, task in found["tasks"].items()}
    return {key: json.dumps(value) for key, value in (settings | data).items()}


def _is_begun(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (RECIPE, POINT))


def _check_records(path: Path, records: Sequence[Record]) -> None:
    for line, record in enumerate(records, start=1):
        what = next(_wrong(dict(record)), None)
        if what is not None:
            raise UserError(
                f"{path}:{line}",
                f"is a damaged record: {what}",
                f"a {record['kind']} record as the run wrote it",
                "the file was changed by something else; remove the run's directory and run it "
                "again, or restore the file",
            )


def _wrong(record: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a record."""
    kind = record["kind"]
    for key in _NEEDED[kind]:
        if key not in record:
            yield f"`{key}` is missing"
        elif not is_finite(record[key]):
            yield f"`{key}` is {shown(record[key])}"
    if kind == "tasks":
        tasks = record.get("tasks")
        if not isinstance(record.get("mode"), str) or not isinstance(tasks, dict):
            yield "`mode` or `tasks` is missing"
            return
        found = [task.get("score", "") if isinstance(task, dict) else "" for task in tasks.values()]
        if not all(map(_is_number_or_null, [*found, record.get("average", "")])):
            yield "a score is missing"
    if kind in ("train", "eval"):
        for key, value in record.items():
            if key not in ("kind", "logged") and not _is_number_or_null(value):
                yield f"`{key}` is {shown(value)}"


def _is_number_or_null(value: object) -> bool:
    return value is None or is_number(value)


def _scores(directory: Path, records: Sequence[Record]) -> Iterator[tuple[str, float | None]]:
    """Scores of tasks; of several with the same name the last is the newest."""
    for record in records:
        if record["kind"] == "tasks":
            for task, found in record["tasks"].items():
                yield f"{record['mode']}.{task}", found["score"]
            yield f"{record['mode']}.average", record["average"]
    for file in _result_files(directory):
        yield from _file_scores(file)


def _result_files(directory: Path) -> list[Path]:
    """Results of evaluations of a run or a model, the newest last."""
    return sorted(directory.glob(f"eval/*/{RESULTS}"), key=lambda f: f.stat().st_mtime)


def _file_scores(file: Path) -> Iterator[tuple[str, float]]:
    with _damage_named(file):
        found = json.loads(file.read_bytes())
        for name, task in found["tasks"].items():
            for mode, result in task["modes"].items():
                yield f"{mode}.{name}", float(result["score"]["value"])
        for mode, average in found["average"].items():
            yield f"{mode}.average", float(average["value"])


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        what = f"cannot be read as results of an evaluation: {type(error).__name__} {error}"
        hint = "remove the directory, and evaluate again"
        raise UserError(str(file), what, f"{RESULTS} of `dualtrain eval`", hint) from None
