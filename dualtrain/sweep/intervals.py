"""Intervals: over seeds by Student's t, over held-out documents by a paired bootstrap.

Points of a sweep that share the seed begin with the same weights, see the same held-out text and
read the documents that they have in common in the same relative order, so differences are taken
seed by seed. That removes much of what seeds change where the text is hardly repeated, and little
where runs overfit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dualtrain.common.randomness import generator
from dualtrain.evaluate.statistics import CONFIDENCE, RESAMPLES, Estimate

Floats = NDArray[np.float64]

FEWEST_SEEDS = 2
ONE_SEED = "one seed only: no interval, since nothing tells how much another seed would change"


def over_seeds(values: Sequence[float]) -> Estimate | None:
    """Mean over seeds with its 95 % interval by Student's t; None for a single seed.

    Args:
        values: One of each seed: a metric, or a paired difference of it.
    """
    if len(values) < FEWEST_SEEDS:
        return None
    numbers = np.asarray(values, dtype=np.float64)
    error = numbers.std(ddof=1) / np.sqrt(len(numbers))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(numbers) - 1) * error)
    mean = float(numbers.mean())
    return Estimate(mean, mean - half, mean + half)


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """Differences `one` - `other` of the seeds that both have, in order of the seeds."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def over_documents(
    one: Floats, other: Floats, tokens: Floats, *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Difference of two models' losses with its 95 % interval over documents drawn anew.

    Args:
        one: (D,) nats of each document under one model.
        other: (D,) nats of the same documents under the other.
        tokens: (D,) tokens of each that are scored.
        resamples: How often D documents are drawn.

    Returns:
        Nats per token, `one` - `other`.
    """
    scored = tokens > 0
    difference, tokens = (one - other)[scored], tokens[scored]
    count = len(tokens)
    random = generator(seed, "bootstrap of documents")
    drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples)
    return Estimate.of(difference.sum() / tokens.sum(), (drawn @ difference) / (drawn @ tokens))
