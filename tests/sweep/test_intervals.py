"""Tests of: dualtrain.sweep.intervals: over seeds and over documents."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from dualtrain.sweep.intervals import over_documents, over_seeds, paired


def test_seeds_give_students_interval():
    values = [1.0, 2.0, 4.0]
    found = over_seeds(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((7 / 3, low, high))


def test_one_seed_gives_none():
    assert over_seeds([1.0]) is None and over_seeds([]) is None


def test_differences_are_taken_seed_by_seed():
    assert paired({2: 5.0, 0: 1.0, 7: 9.0}, {0: 0.5, 2: 3.0, 1: 8.0}) == [0.5, 2.0]


def test_pairing_documents_takes_out_how_hard_they_are():
    rng = np.random.default_rng(1)
    tokens = rng.integers(20, 400, 200).astype(float)
    hard = rng.normal(5, 1.5, 200)  # nats per token, by document
    one, other = (hard + 0.1) * tokens, (hard + rng.normal(0, 0.02, 200)) * tokens
    found = over_documents(one, other, tokens)
    assert found.low < 0.1 < found.high and found.high - found.low < 0.02
    assert asdict(over_documents(one, one, tokens)) == {"value": 0, "low": 0, "high": 0}


def test_the_interval_over_documents_covers_as_often_as_it_says():
    covered = []
    for number in range(200):
        rng = np.random.default_rng(number)
        tokens = rng.integers(20, 400, 60).astype(float)
        difference = rng.normal(0.3, 1.0, 60) * tokens
        found = over_documents(difference, np.zeros(60), tokens, seed=number, resamples=1000)
        covered.append(found.low <= 0.3 <= found.high)
    assert 0.88 <= np.mean(covered) <= 0.98


def test_documents_without_scored_tokens_do_not_count():
    tokens = np.array([10.0, 0.0, 30.0])
    found = over_documents(np.array([1.0, 0.0, 6.0]), np.zeros(3), tokens)
    assert found.value == pytest.approx(7 / 40) and np.isfinite([found.low, found.high]).all()
