"""How long the points of a sweep will take.

By the time that points of the same sweep took, if any have ended; else by a measurement: one
forward and backward pass of each objective, of the sweep's own model on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from dualtrain.data.corpus import read_corpus
from dualtrain.mixing import Objective
from dualtrain.recipe.derive import Derived, derive, known_vocabulary
from dualtrain.sweep.definition import Point, Sweep
from dualtrain.sweep.directory import SWEEP, read_outcome
from dualtrain.sweep.reading import read_run

OBJECTIVES: tuple[Objective, ...] = ("ar", "diffusion")

START_S = 10.0
"""To import libraries, build the engine and save at the end; what small runs spend most on."""
UPDATE_SHARE = 1.25
"""Optimizer and evaluations, beside the forward and backward passes."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of a point from its training FLOP or, where the model is unknown, its tokens.

    Attributes:
        flops_per_second: Of training, all included.
        basis: Where that is from.
    """

    flops_per_second: float | None
    basis: str

    def seconds(self, derived: Derived) -> float | None:
        """Seconds of a point; None where they cannot be told."""
        if self.flops_per_second is None or derived.cost is None:
            return None
        return START_S + derived.cost.training_flops / self.flops_per_second


def estimate_seconds(sweep: Sweep, points: Sequence[Point], *, parallel: int) -> Estimate:
    """Find out how fast the points will train.

    Args:
        sweep: The sweep.
        points: Those that are asked about.
        parallel: How many will run at once; what is measured here is one of them.
    """
    speed = _speed_of_ended(sweep)
    if speed is not None:
        return Estimate(speed, "by the points that have ended")
    speed = _measured(points[0], parallel)
    if speed is None:
        return Estimate(
            None, "no estimate of the time: an imported model, or an unknown vocabulary"
        )
    return Estimate(speed, "by forward and backward passes of the first point's model, timed here")


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


def _measured(point: Point, parallel: int) -> float | None:
    """FLOP per second of one forward and backward pass of each objective."""
    recipe = point.loaded.recipe
    corpus = read_corpus(recipe)
    derived = derive(recipe, corpus=corpus)
    vocabulary = known_vocabulary(recipe, corpus)
    if derived.cost is None or recipe.model.hf is not None or vocabulary is None:
        return None
    import torch

    from dualtrain.sweep.timing import time_slot

    cores = len(os.sched_getaffinity(0))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores // parallel))
    seconds = {name: time_slot(recipe, vocabulary, name) for name in OBJECTIVES}
    tokens = recipe.micro_batch * recipe.sequence_length
    flops = sum(derived.cost.flops_per_token[name] * tokens for name in OBJECTIVES)
    return flops / (sum(seconds.values()) * UPDATE_SHARE)
