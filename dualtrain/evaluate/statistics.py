"""How well a model did on a task: credit for each item, normalised score, bootstrap intervals.

Pure functions of numbers; ``task_result`` calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dualtrain.common.randomness import generator

Floats = NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
TIE = 1e-6
"""Answers whose scores differ by less than this share of the score are equally good: about as much
depends on which others were in the batch."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: Floats) -> Estimate:
        """Take the interval from the values of resampled data: (R,) float64."""
        outside = (1 - CONFIDENCE) / 2
        low, high = np.quantile(resampled, [outside, 1 - outside])
        return cls(float(value), float(low), float(high))


@dataclass(frozen=True)
class Resampled:
    """Means over items drawn anew, with replacement; each is (R,) float64."""

    accuracy: Floats
    chance: Floats

    @property
    def score(self) -> Floats:
        return normalised(self.accuracy, self.chance)


def credit(scores: Sequence[float], gold: int) -> float:
    """1 for an item whose right answer has the best score; shared among answers that tie for it.

    So a model that cannot tell answers apart is at chance wherever the right one stands, which
    taking the first of the best would not give.
    """
    best = max(scores)
    margin = TIE * max(1.0, abs(best))
    tied = [best - score <= margin for score in scores]
    return tied[gold] / sum(tied)


def chances(choices: Sequence[int]) -> Floats:
    """Chance of each item, 1 / number of its choices: (N,) float64."""
    return 1 / np.asarray(choices, dtype=np.float64)


def normalised(accuracy: Floats, chance: Floats) -> Floats:
    """100·(accuracy − chance) / (1 − chance): 0 is guessing, 100 perfect; element by element."""
    return 100 * (accuracy - chance) / (1 - chance)


def resample(
    credits: Floats, chance: Floats, *, seed: int, purpose: str, resamples: int = RESAMPLES
) -> Resampled:
    """Bootstrap over items.

    Items with the same credit and chance need not be told apart: how many of each kind are drawn is
    multinomial. That is the same distribution as drawing N items, for any N at the same cost.

    Args:
        credits: (N,) float64, from :func:`credit`.
        chance: (N,) float64, from :func:`chances`.
        purpose: What is resampled; different purposes are independent.
        resamples: R, how often N items are drawn.
    """
    pairs = np.stack([credits, chance], axis=1)
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    random = generator(seed, f"bootstrap of {purpose}")
    drawn = random.multinomial(len(pairs), counts / len(pairs), size=resamples)
    means = drawn @ kinds / len(pairs)
    return Resampled(means[:, 0], means[:, 1])


def average(scores: Sequence[float], resampled: Sequence[Floats]) -> Estimate:
    """Mean over tasks, each resampled by itself (a bootstrap stratified by task)."""
    return Estimate.of(float(np.mean(scores)), np.mean(resampled, axis=0))
