"""Tests of: dualtrain.common.randomness: the same everywhere, unrelated between keys."""

import subprocess
import sys
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from dualtrain.common.randomness import KeyedPermutation, generator


def test_numbers_are_pinned_for_ever():
    # A change here changes the data order and the masks of every run that is to be resumed.
    raw = generator(0, "corruption", 1, 2).bit_generator.random_raw(2)
    assert raw.tolist() == [3264874459079166508, 17490809343297507187]
    assert generator(0, "corruption", 1, 2).random() == (int(raw[0]) >> 11) / 2**53


def test_another_process_gets_the_same_numbers():
    code = "from dualtrain.common.randomness import generator; print(generator(7, 'x', 3).random())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {str(generator(7, "x", 3).random())}


def test_every_part_of_the_key_matters():
    keys = [
        (0, "a", 1, 2),
        (1, "a", 1, 2),
        (0, "b", 1, 2),
        (0, "a", 2, 1),
        (0, "a", 12),
        (0, "a", 1),
        (0, "a"),
    ]
    assert len({generator(*key).random() for key in keys}) == len(keys)


def test_numpy_integers_are_as_good_as_pythons():
    assert generator(0, "a", np.int64(5)).random() == generator(0, "a", 5).random()


@pytest.mark.parametrize("axis", [0, 1])
def test_neighbouring_keys_are_unrelated(axis):
    numbers = np.array([generator(0, "a", i).random(64) for i in range(256)]) - 0.5
    # Correlations of 64·255 or 63·256 pairs: standard deviation below 0.008.
    moved = np.diff(numbers, axis=axis)
    correlation = 1 - (moved**2).mean() / (2 * (numbers**2).mean())
    assert abs(correlation) < 0.04
    assert abs(numbers.mean()) < 0.01


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 70_000])
def test_a_permutation_takes_every_number_once(size):
    permutation = KeyedPermutation(size, 0, "order", 3)
    assert sorted(permutation[n] for n in range(size)) == list(range(size))


def test_a_permutation_is_pinned_for_ever_also_where_it_is_huge():
    assert [KeyedPermutation(10, 0, "order", 1)[n] for n in range(10)] == PINNED
    huge = KeyedPermutation(10**12, 0, "order", 1)
    assert len({huge[n] for n in range(1000)}) == 1000
    assert 0.4 < np.mean([huge[n] / 10**12 for n in range(1000)]) < 0.6


PINNED = [9, 5, 6, 0, 4, 7, 8, 2, 3, 1]


def test_all_permutations_of_few_are_equally_likely():
    found = Counter(
        tuple(permutation[n] for n in range(4))
        for permutation in (KeyedPermutation(4, 0, "order", key) for key in range(4800))
    )
    assert found.keys() == set(permutations(range(4)))
    # 24 permutations, 200 each: chi-square of 23 degrees of freedom is below 50 but once in 1,000.
    assert sum((count - 200) ** 2 / 200 for count in found.values()) < 50


def test_neighbours_and_keys_are_unrelated_in_a_permutation():
    size = 4096
    orders = np.array([[KeyedPermutation(size, 0, "o", k)[n] for n in range(size)] for k in (0, 1)])
    for one, other in ((orders[0][1:], orders[0][:-1]), (orders[0], orders[1])):
        # Standard deviation 1/64.
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.06
    steps = Counter((np.diff(orders[0]) % size).tolist())
    assert max(steps.values()) < 9
