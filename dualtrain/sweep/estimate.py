"""How long the points of a sweep will take: by the time that those took which have ended."""

from __future__ import annotations

from dataclasses import dataclass

from dualtrain.data.corpus import read_corpus
from dualtrain.derived.derive import Derived, derive
from dualtrain.sweep.definition import Sweep
from dualtrain.sweep.directory import SWEEP, read_outcome
from dualtrain.sweep.reading import read_run

START_S = 10.0
"""To import libraries, build the engine and save at the end; what small runs spend most on."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of a point from its training FLOP.

    Attributes:
        flops_per_second: Of training, all included; None where nothing tells it.
    """

    flops_per_second: float | None
    basis: str

    def seconds(self, derived: Derived) -> float | None:
        """Seconds of a point; None where they cannot be told."""
        if self.flops_per_second is None or derived.cost is None:
            return None
        return START_S + derived.cost.training_flops / self.flops_per_second


def estimate_seconds(sweep: Sweep) -> Estimate:
    """Find out how fast the points train."""
    speed = _speed_of_ended(sweep)
    if speed is None:
        return Estimate(None, "how long it takes can be told when the first point has ended")
    return Estimate(speed, "by the points that have ended")


def _speed_of_ended(sweep: Sweep) -> float | None:
    """Training FLOP per second over the points that have ended; None if there are none."""
    if not (sweep.directory / SWEEP).is_file():
        return None
    flops = seconds = 0.0
    for point in sweep.points:
        outcome = read_outcome(point.directory)
        if outcome is None or outcome.state != "finished":
            continue
        recipe, steps = point.loaded.recipe, read_run(point.directory).steps
        cost = derive(recipe, corpus=read_corpus(recipe)).cost
        if steps and cost is not None:  # neither its metrics nor its dataset were removed since
            flops += cost.training_flops
            seconds += steps[-1]["elapsed_s"]
    return flops / seconds if seconds else None
