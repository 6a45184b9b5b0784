"""Tests of: dualtrain.method.schedules: the learning rate of every single update."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtrain.method.schedules import learning_rate_factor
from dualtrain.recipe.schema import ScheduleSection


def factors(steps, **settings):
    schedule = ScheduleSection(**settings)
    return [learning_rate_factor(schedule, step, steps) for step in range(steps)]


def test_default_is_constant_then_linear_over_the_last_quarter():
    assert factors(16) == [1] * 12 + [1, 3 / 4, 2 / 4, 1 / 4]


def test_the_papers_run():
    values = factors(8192)
    assert values[: 6144 + 1] == [1] * 6145
    assert values[6145] == 1 - 1 / 2048 and values[-1] == 1 / 2048


def test_one_minus_sqrt_falls_faster_at_first():
    values = factors(16, shape="one_minus_sqrt", cooldown=0.25)
    assert values == pytest.approx(
        [1] * 12 + [1, 1 / 2, 1 - math.sqrt(1 / 2), 1 - math.sqrt(3) / 2]
    )


def test_warm_up_wastes_no_update_on_zero():
    assert factors(8, warmup_steps=4, cooldown=0) == [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]
    assert factors(4, name="constant", warmup_steps=2) == [1 / 2, 1, 1, 1]
    assert factors(3, name="constant") == [1, 1, 1]


def test_cosine_decays_from_the_end_of_the_warm_up():
    half = math.sqrt(1 / 2)
    wanted = [1 / 2, 1, 1, (1 + half) / 2, 1 / 2, (1 - half) / 2]
    assert factors(6, name="cosine", warmup_steps=2) == pytest.approx(wanted)


def test_the_decay_ends_at_the_final_factor():
    values = factors(8, cooldown=0.5, final=0.2)
    assert values == pytest.approx([1] * 4 + [1, 0.8, 0.6, 0.4])
    assert factors(1000, name="cosine", final=0.1)[-1] == pytest.approx(0.1, abs=1e-4)


def test_the_decay_may_be_everything_or_nothing():
    assert factors(4, cooldown=1) == [1, 3 / 4, 2 / 4, 1 / 4]
    assert factors(4, cooldown=0) == [1] * 4
    assert factors(1) == [1]


def test_warm_up_and_decay_may_overlap():
    assert factors(4, cooldown=1, warmup_steps=4) == [1 / 4, 3 / 8, 3 / 8, 1 / 4]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["wsd", "cosine", "constant"]),
    shape=st.sampled_from(["linear", "one_minus_sqrt"]),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 80),
    cooldown=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_every_factor_is_positive_and_at_most_one(name, shape, steps, warmup, cooldown, final):
    values = factors(
        steps, name=name, shape=shape, warmup_steps=warmup, cooldown=cooldown, final=final
    )
    assert all(0 < value <= 1 for value in values)
    if warmup == 0:
        assert values[0] == 1 and values == sorted(values, reverse=True)
