"""What a sweep is about to run: its points, their tokens, and how long those left will take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dualtrain.common import formatting
from dualtrain.common.errors import UserError
from dualtrain.data.corpus import read_corpus
from dualtrain.derived.derive import Derived, derive
from dualtrain.sweep.definition import Point, Sweep
from dualtrain.sweep.directory import SWEEP, is_busy, read_outcome
from dualtrain.sweep.output import new_table, show
from dualtrain.sweep.reading import read_run

if TYPE_CHECKING:
    from dualtrain.sweep.command import SweepOptions

START_S = 10.0
"""To import libraries, build the engine and save at the end; what small runs spend most on."""


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


def print_plan(sweep: Sweep, points: Sequence[Point], options: SweepOptions) -> None:
    """Show the points with their tokens and how long they will take."""
    columns = ("unique tokens", "tokens", "AR passes", "about", "state")
    table = new_table("#", *sweep.keys, *columns)
    flops_per_second = _speed_of_ended(sweep, options.ranks)
    total = waiting = 0
    left: float | None = 0.0
    for point in points:
        derived, outcome = _derive(point, options.ranks), read_outcome(point.directory)
        total += derived.total_tokens
        seconds = None
        if flops_per_second is not None and derived.cost is not None:
            seconds = START_S + derived.cost.training_flops / flops_per_second
        if outcome is None or (outcome.state == "failed" and options.retry_failed):
            waiting += 1
            left = None if seconds is None or left is None else left + seconds
        if outcome is not None:
            state = outcome.state
        else:
            state = "running" if is_busy(point.directory) else ""
        table.add_row(
            str(point.number),
            *point.cells(sweep.keys),
            f"{derived.unique_tokens:,}",
            f"{derived.total_tokens:,}",
            f"{derived.ar_passes:.6g}",
            formatting.duration(seconds),
            state,
        )
    show(table)
    print(f"\n{formatting.counted(len(points), 'point')}, {total:,} tokens, to {sweep.directory}")
    if left is None:
        print("how long it takes can be told when the first point has ended")
        return
    at_once = min(options.parallel, waiting) or 1
    how = f", {at_once} at once" if at_once > 1 else ""
    print(f"about {formatting.duration(left / at_once)} left{how}, by the points that have ended")


def _derive(point: Point, ranks: int | None) -> Derived:
    recipe = point.loaded.recipe
    return derive(recipe, corpus=read_corpus(recipe), world_size=ranks)


def _speed_of_ended(sweep: Sweep, ranks: int | None) -> float | None:
    """Training FLOP per second over the points that have ended; None if there are none."""
    if not (sweep.directory / SWEEP).is_file():
        return None
    flops = seconds = 0.0
    for point in sweep.points:
        outcome = read_outcome(point.directory)
        if outcome is None or outcome.state != "finished":
            continue
        steps, cost = read_run(point.directory).steps, _derive(point, ranks).cost
        if steps and cost is not None:  # neither its metrics nor its dataset were removed since
            flops += cost.training_flops
            seconds += steps[-1]["elapsed_s"]
    return flops / seconds if seconds else None
