"""``dualtrain sweep``: every point of a sweep, each once."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dualtrain.common import formatting
from dualtrain.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_SAVED_AFTER_SIGNAL, UserError
from dualtrain.common.files import write_text
from dualtrain.data.corpus import read_corpus
from dualtrain.derived.derive import derive
from dualtrain.launch.world import launched_ranks
from dualtrain.recipe.checks import check_world_size
from dualtrain.sweep.definition import Point, Sweep, cell, load_sweep
from dualtrain.sweep.directory import OUTCOME, check, is_busy, prepare, read_outcome
from dualtrain.sweep.estimate import estimate_seconds
from dualtrain.sweep.reading import read_sweep
from dualtrain.sweep.results import named, setting, table_text
from dualtrain.sweep.runner import Runner
from dualtrain.sweep.tables import new_table, show
from dualtrain.sweep.view import View
from dualtrain.training.dataset import build_missing_dataset
from dualtrain.training.evaluation import read_tasks

TABLE = "results.csv"
TABLE_METRICS = ("ar_nll", "best.ar_nll", "diffusion_nll", "prefix_nll", "prefix_minus_ar")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asks for.

    Attributes:
        file: A recipe with a ``sweep:`` section.
        overrides: ``key=value``, for all points.
        directory: Where the points go; None leaves it to the file.
        ranks: Processes of a point; None leaves it to ``dualtrain run``.
        shard: Only each N-th point from the I-th on, ``I/N``.
        dry_run: Show the points and start nothing.
        plain: Lines in place of the live table.
    """

    file: str
    overrides: Sequence[str] = ()
    directory: Path | None = None
    parallel: int = 1
    ranks: int | None = None
    index: int | None = None
    shard: str | None = None
    retry_failed: bool = False
    dry_run: bool = False
    plain: bool = False


def run_sweep(options: Options) -> int:
    """Run what is left of a sweep, and show the results; returns the exit code.

    Raises:
        UserError: for all that can be refused before the first point starts.
    """
    if launched_ranks(os.environ) > 1:
        raise UserError(
            "dualtrain sweep",
            "was started by a launcher of ranks",
            "one process, which starts the ranks of each point itself",
            "in a batch script call it without srun",
        )
    sweep = load_sweep(options.file, options.overrides, directory=options.directory)
    points = choose_points(sweep, index=options.index, shard=options.shard)
    for point in points:
        check_world_size(point.loaded.recipe, options.ranks or 1)
    if options.dry_run:
        check(sweep)
        print_plan(sweep, points, parallel=options.parallel, retry_failed=options.retry_failed)
        return EXIT_DONE
    # A mistake there need not wait for the dataset.
    for section in {
        s.model_dump_json(): s for s in (p.loaded.recipe.eval for p in points)
    }.values():
        read_tasks(section)
    prepare(sweep)
    _build_datasets(points)
    for point in points:
        recipe = point.loaded.recipe
        derive(recipe, corpus=read_corpus(recipe), world_size=options.ranks)
    with View(sweep.keys, plain=options.plain) as view:
        runner = Runner(
            points,
            parallel=options.parallel,
            ranks=options.ranks,
            devices=find_devices(),
            retry_failed=options.retry_failed,
            on_change=view.change,
            on_poll=view.poll,
        )
        view.say(f"{sweep.source}: {formatting.counted(len(points), 'point')} in {sweep.directory}")
        view.start(runner.jobs)
        runner.run()
    print_results(sweep.directory)
    return _summary(runner)


def _summary(runner: Runner) -> int:
    """Say what a reader of the table should know; returns the exit code."""

    def labels(*states: str) -> str:
        return named([job.point.label for job in runner.jobs if job.state in states])

    elsewhere = labels("elsewhere")
    if elsewhere:
        print(f"left to the processes that run them: {elsewhere}")
    failed = labels("failed")
    if failed:
        print(f"failed: {failed}")
        print(f"each has the reason in its {OUTCOME}; --retry-failed tries them again")
    stopped = labels("stopped")
    if runner.is_stopping or stopped:
        print(f"stopped by a signal{': ' * bool(stopped)}{stopped}; the same command goes on")
        return EXIT_SAVED_AFTER_SIGNAL
    return EXIT_FAILED if failed else EXIT_DONE


def choose_points(sweep: Sweep, *, index: int | None, shard: str | None) -> list[Point]:
    """The points that this process is to run.

    Raises:
        UserError: There is no such point or shard.
    """
    points = list(sweep.points)
    if index is not None:
        if shard is not None:
            raise UserError("--index", "was given beside --shard", "one of them")
        if not 0 <= index < len(points):
            raise UserError("--index", f"{index}", f"0 to {len(points) - 1}, as --dry-run lists")
        return [points[index]]
    if shard is None:
        return points
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError("--shard", f"{shard!r}", "I/N with I from 0 to N - 1, such as 0/4")
    return points[int(match[1]) :: int(match[2])]


def find_devices() -> list[str]:
    """The CUDA devices of this process, as ``CUDA_VISIBLE_DEVICES`` names them."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:
        return [name.strip() for name in asked.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def print_plan(sweep: Sweep, points: Sequence[Point], *, parallel: int, retry_failed: bool) -> None:
    """Show the points with their tokens and how long they will take."""
    columns = ("unique tokens", "tokens", "AR passes", "about", "state")
    table = new_table("#", *sweep.keys, *columns)
    estimate = estimate_seconds(sweep)
    total = waiting = 0
    left: float | None = 0.0
    for point in points:
        recipe = point.loaded.recipe
        derived = derive(recipe, corpus=read_corpus(recipe))
        outcome = read_outcome(point.directory)
        total += derived.total_tokens
        seconds = estimate.seconds(derived)
        if outcome is None or (outcome.state == "failed" and retry_failed):
            waiting += 1
            left = None if seconds is None or left is None else left + seconds
        table.add_row(
            str(point.number),
            *(cell(point.values[key]) if key in point.values else "" for key in sweep.keys),
            f"{derived.unique_tokens:,}",
            f"{derived.total_tokens:,}",
            f"{derived.ar_passes:.6g}",
            formatting.duration(seconds),
            _state(point),
        )
    show(table)
    print(f"\n{formatting.counted(len(points), 'point')}, {total:,} tokens, to {sweep.directory}")
    parallel = min(parallel, waiting) or 1
    at_once = f", {parallel} at once" if parallel > 1 else ""
    if left is None:
        print(estimate.basis)
    else:
        print(f"about {formatting.duration(left / parallel)} left{at_once}, {estimate.basis}")


def _state(point: Point) -> str:
    outcome = read_outcome(point.directory)
    if outcome is not None:
        return outcome.state
    return "running" if is_busy(point.directory) else ""


def print_results(directory: Path) -> None:
    """Show the points that have ended, and write ``results.csv``."""
    found = read_sweep(directory)
    keys, runs = found.keys, found.runs
    known = [m for m in TABLE_METRICS if any(run.metric(m) is not None for run in runs)]
    write_text(directory / TABLE, table_text(keys, runs, known))
    table = new_table(*keys, "state", *known)
    for run in runs:
        numbers = [run.metric(metric) for metric in known]
        table.add_row(
            *(cell(setting(run, key)) for key in keys),
            run.outcome.state if run.outcome else "unfinished",
            *("-" if number is None else f"{number:.4f}" for number in numbers),
        )
    print()
    show(table, [f"not begun, or gone: {named(found.absent)}"] if found.absent else [])
    print(f"\nwritten: {directory / TABLE}")


def _build_datasets(points: Sequence[Point]) -> None:
    """Make what is missing once, before points that run at once would wait for it."""
    seen: set[str] = set()
    for point in points:
        recipe = point.loaded.recipe
        if recipe.data.path not in seen:
            seen.add(recipe.data.path)
            build_missing_dataset(recipe)
