"""Keyed random numbers: the same everywhere, unrelated between keys."""

import subprocess
import sys

import numpy as np
import pytest

from dualtrain.randomness import generator


def test_numbers_are_pinned_for_ever():
    # A change here changes the data order and the masks of every run that is to be resumed.
    raw = generator(0, "corruption", 1, 2).bit_generator.random_raw(2)
    assert raw.tolist() == [3264874459079166508, 17490809343297507187]
    assert generator(0, "corruption", 1, 2).random() == (int(raw[0]) >> 11) / 2**53


def test_another_process_gets_the_same_numbers():
    code = "from dualtrain.randomness import generator; print(generator(7, 'x', 3).random())"
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
