"""The learning rate of every step, as a pure function of the step.

All functions return a factor on the peak learning rate for update n of N (n = 0..N-1). A piece of
the schedule that takes D updates is read at the beginning of each: its first update is at the
piece's start, its last one 1/D before its end. So with wsd, whose decay covers the last
D = cooldown·N updates (rounded), the factors end with 1, (D-1)/D, ..., 2/D, 1/D: rate 0 would come
at update N, and no update is spent on it. Warm-up mirrors that: it begins with 1/W, not with 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dualtrain.recipe.schema import ScheduleSection


def learning_rate_factor(schedule: ScheduleSection, step: int, steps: int) -> float:
    """Return the factor on the peak learning rate.

    Warm-up multiplies the rest of the schedule; where it overlaps a decay, both count.
    """
    start = warmup_factor(step, schedule.warmup_steps)
    if schedule.name == "wsd":
        decay_steps = nearest_whole(schedule.cooldown * steps)
        progress = decay_progress(step, steps - decay_steps, steps)
        shape = 1 - progress if schedule.shape == "linear" else 1 - math.sqrt(progress)
    elif schedule.name == "cosine":
        progress = decay_progress(step, schedule.warmup_steps, steps)
        shape = (1 + math.cos(math.pi * progress)) / 2
    else:
        return start
    return start * (schedule.final + (1 - schedule.final) * shape)


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear from 0: 1/W, 2/W, ..., 1 over the first W updates, then 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def decay_progress(step: int, first: int, steps: int) -> float:
    """Share of a decay from update `first` to the end that lies behind: 0, 1/D, ..., (D-1)/D."""
    return min(1.0, max(0, step - first) / max(1, steps - first))


def nearest_whole(number: float) -> int:
    """Round to the nearest whole number, halves up."""
    return math.floor(number + 0.5)
