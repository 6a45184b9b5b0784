"""Tests of: dualtrain.method.mixing.

Which slot trains which objective on which rank, and how much text AR has had when.
"""

from collections import Counter
from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtrain.method.mixing import Mixture, alpha_at
from dualtrain.recipe.schema import AlphaSchedule

shares = st.fractions(min_value=0, max_value=1, max_denominator=300)
batches = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 256])
quick = settings(max_examples=40, deadline=None)


def mixture(alpha, steps=20, slots=8, micro_batch=3, mixing="slots", rotation=False):
    return Mixture(
        alpha=alpha,
        steps=steps,
        slots=slots,
        micro_batch=micro_batch,
        mixing=mixing,
        rotation=rotation,
    )


def curriculum(name, phases, start=1):
    phases = [{"until": until, "alpha": alpha} for until, alpha in phases]
    return AlphaSchedule.model_validate({"name": name, "start": start, "phases": phases})


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


def count(slots, objective):
    return sum(slot.objective == objective for slot in slots)


@quick
@given(alpha=shares, slots=batches, values=st.data())
def test_share_is_exact_to_one_slot_over_any_window(alpha, slots, values):
    steps = 24
    if values.draw(st.booleans()):
        table = values.draw(st.lists(shares, min_size=steps, max_size=steps))
        mix = mixture(table.__getitem__, steps, slots)
    else:
        table = [alpha] * steps
        mix = mixture(alpha, steps, slots, rotation=True)
    wanted = list(accumulate((share * slots for share in table), initial=Fraction(0)))
    got = list(accumulate((count(mix.slots(n), "ar") for n in range(steps)), initial=0))
    for first in range(steps + 1):
        # From the beginning within half a slot, hence between any two steps within one.
        assert abs(got[first] - wanted[first]) <= Fraction(1, 2)
        assert got[first] == mix.ar_slots_before(first)
        assert first * slots - got[first] == mix.diffusion_slots_before(first)
        for last in range(first, steps + 1):
            assert abs(got[last] - got[first] - (wanted[last] - wanted[first])) <= 1


def test_a_whole_number_of_slots_is_met_in_every_step():
    mix = mixture(Fraction(63, 64), steps=100, slots=256, rotation=True)
    assert {count(mix.slots(n), "ar") for n in range(100)} == {252}


@quick
@given(alpha=shares, slots=batches)
def test_each_stream_is_read_in_order_without_gaps_or_repeats(alpha, slots):
    mix = mixture(alpha, slots=slots, micro_batch=5)
    read = {"ar": [], "diffusion": []}
    for step in range(20):
        chosen = mix.slots(step)
        assert [slot.index for slot in chosen] == list(range(slots))
        for slot in chosen:
            assert slot.stream == slot.objective and slot.loss_scale == 1
            read[slot.stream].append(slot.first_sequence)
    for sequences in read.values():
        assert sequences == [5 * i for i in range(len(sequences))]


@quick
@given(alpha=shares, slots=batches, mixing=st.sampled_from(["slots", "weighted_sum"]))
def test_any_number_of_ranks_shares_out_the_same_slots(alpha, slots, mixing):
    mix = mixture(alpha, slots=slots, mixing=mixing)
    for step in (0, 1, 7, 19):
        for world in divisors(slots):
            dealt = [mix.for_rank(step, rank, world) for rank in range(world)]
            assert {len(each) for each in dealt} == {mix.slots_per_step // world}
            together = sorted((slot for each in dealt for slot in each), key=lambda s: s.index)
            assert tuple(together) == mix.slots(step)


@quick
@given(alpha=shares, slots=batches, first=st.integers(0, 19), window=st.integers(1, 20))
def test_ranks_have_equally_many_diffusion_slots_over_any_window(alpha, slots, first, window):
    mix = mixture(alpha, slots=slots)
    for world in divisors(slots):
        loads = [
            sum(
                count(mix.for_rank(step, rank, world), "diffusion")
                for step in range(first, min(20, first + window))
            )
            for rank in range(world)
        ]
        assert max(loads) - min(loads) <= 1


def test_the_odd_diffusion_slot_moves_on_to_another_rank():
    mix = mixture(Fraction(7, 8), steps=8, slots=8)
    owner = [
        next(rank for rank in range(8) if mix.for_rank(step, rank, 8)[0].objective == "diffusion")
        for step in range(8)
    ]
    assert sorted(owner) == list(range(8))


@quick
@given(alpha=shares, slots=batches)
def test_at_most_one_micro_step_mixes_objectives(alpha, slots):
    mix = mixture(alpha, slots=slots)
    for world in divisors(slots):
        for step in (0, 3, 11):
            dealt = [mix.for_rank(step, rank, world) for rank in range(world)]
            kinds = [{slot.objective for slot in column} for column in zip(*dealt, strict=True)]
            whole = count(mix.slots(step), "diffusion") % world == 0
            assert sum(len(kind) > 1 for kind in kinds) == (0 if whole else 1)


def test_one_slot_a_rank_is_the_papers_allocation_of_devices():
    mix = mixture(Fraction(255, 256), steps=512, slots=256, rotation=True)
    turns = Counter(
        rank
        for step in range(512)
        for rank in range(256)
        if mix.for_rank(step, rank, 256)[0].objective == "diffusion"
    )
    assert set(turns.values()) == {2} and len(turns) == 256


def test_weighted_sum_trains_both_objectives_on_the_same_sequences():
    mix = mixture(Fraction(1, 8), slots=4, micro_batch=3, mixing="weighted_sum")
    assert mix.slots_per_step == 8
    for rank in range(2):
        slots = mix.for_rank(5, rank, 2)
        for ar, diffusion in zip(slots[::2], slots[1::2], strict=True):
            assert (ar.objective, diffusion.objective) == ("ar", "diffusion")
            assert ar.stream == diffusion.stream == "all"
            assert ar.first_sequence == diffusion.first_sequence
            assert (ar.loss_scale, diffusion.loss_scale) == (0.25, 1.75)
    first = sorted({slot.first_sequence for slot in mix.slots(5)})
    assert first == [3 * (5 * 4 + i) for i in range(4)]
    # An engine averages over slots: this is α·L_AR + (1 - α)·L_MD of each batch.
    losses = {"ar": 3.0, "diffusion": 5.0}
    mean = sum(s.loss_scale * losses[s.objective] for s in mix.slots(0)) / mix.slots_per_step
    assert mean == 3.0 / 8 + 5.0 * 7 / 8


@pytest.mark.parametrize(("alpha", "objective"), [(0, "diffusion"), (1, "ar")])
def test_weighted_sum_of_one_objective_is_that_objective(alpha, objective):
    mix = mixture(Fraction(alpha), slots=4, mixing="weighted_sum")
    assert mix.slots_per_step == 4
    assert {(s.objective, s.stream, s.loss_scale) for s in mix.slots(2)} == {(objective, "all", 1)}
    assert [s.first_sequence for s in mix.slots(2)] == [24, 27, 30, 33]


def test_weighted_sum_follows_a_schedule_with_as_many_slots_in_every_step():
    table = [Fraction(1), Fraction(1, 2), Fraction(0)]
    mix = mixture(table.__getitem__, steps=3, slots=2, mixing="weighted_sum")
    scales = [[slot.loss_scale for slot in mix.slots(n)] for n in range(3)]
    assert scales == [[2, 0, 2, 0], [1, 1, 1, 1], [0, 2, 0, 2]]


def test_rotation_needs_slots_and_both_objectives():
    assert mixture(Fraction(1, 4), rotation=True).rotates
    assert mixture(lambda step: Fraction(1, 2), rotation=True).rotates
    assert not mixture(Fraction(1, 4), rotation=False).rotates
    assert not mixture(Fraction(1), rotation=True).rotates
    with pytest.raises(ValueError, match="mixing by slots"):
        mixture(Fraction(1, 2), mixing="weighted_sum", rotation=True)


def test_impossible_questions_are_refused():
    with pytest.raises(ValueError, match="must divide 8 slots"):
        mixture(Fraction(1, 2)).for_rank(0, 0, 3)
    with pytest.raises(ValueError, match="outside the run's 20 steps"):
        mixture(Fraction(1, 2)).slots(20)
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        mixture(Fraction(3, 2))
    with pytest.raises(ValueError, match=r"of step 1 is outside \[0, 1\]"):
        mixture([Fraction(1), Fraction(-1, 2)].__getitem__, steps=2)


@quick
@given(alpha=shares, slots=batches, length=st.sampled_from([1, 5]), values=st.data())
def test_ar_tokens_are_what_slots_can_have_read_anywhere_in_the_run(alpha, slots, length, values):
    steps = 12
    table = [alpha] * steps
    mix = mixture(alpha, steps, slots, rotation=True)
    if values.draw(st.booleans()):
        table = values.draw(st.lists(shares, min_size=steps, max_size=steps))
        mix = mixture(table.__getitem__, steps, slots, rotation=True)
    slot = 3 * length
    step = slots * slot
    before, read = 0, [0]
    for n in range(steps):
        read.append(read[-1] + count(mix.slots(n), "ar") * slot)
    for tokens in range(0, steps * step + 1, max(1, step // 7)):
        found = mix.ar_tokens(tokens, length)
        whole = tokens // step
        # Neither objective has more, nor less, than by the ends of the step it falls into.
        assert read[whole] <= found <= read[min(steps, whole + 1)]
        diffusion = [n * step - ar for n, ar in enumerate(read)]
        assert diffusion[whole] <= tokens - found <= diffusion[min(steps, whole + 1)]
        assert before <= found
        before = found
        if table == [alpha] * steps:
            assert abs(found - alpha * tokens) < slot / 2 + 1
    assert mix.ar_tokens(steps * step, length) == read[steps]


def test_sixteen_passes_of_128_as_in_the_paper():
    mix = mixture(Fraction(1, 8), steps=8192, slots=256, micro_batch=8, rotation=True)
    unique = 268_435_456
    assert [mix.ar_tokens(unique * n, 2048) * 8 // unique for n in range(129)] == list(range(129))


def test_a_run_that_goes_on_keeps_its_last_alpha():
    mix = mixture([Fraction(1), Fraction(1, 4)].__getitem__, steps=2, slots=4, rotation=True)
    assert [mix.ar_slots_before(n) for n in range(6)] == [0, 4, 5, 6, 7, 8]


def test_phases_keep_their_alpha_until_they_end():
    schedule = curriculum("phases", [("1/4", 1), ("3/4", 0), (1, "1/2")])
    values = [alpha_at(schedule, step, 8) for step in range(8)]
    assert values == [1, 1, 0, 0, 0, 0, Fraction(1, 2), Fraction(1, 2)]


def test_linear_goes_straight_from_corner_to_corner():
    schedule = curriculum("linear", [("1/2", 0), (1, 1)], start="1/2")
    values = [alpha_at(schedule, step, 8) for step in range(8)]
    eighths = [4, 3, 2, 1, 0, 2, 4, 6]
    assert values == [Fraction(number, 8) for number in eighths]


def test_a_constant_share_is_its_own_schedule():
    assert alpha_at(Fraction(3, 7), 5, 10) == Fraction(3, 7)


def test_a_curriculum_is_followed_exactly_by_the_slots():
    schedule = curriculum("linear", [(1, 0)])
    mix = mixture(lambda step: alpha_at(schedule, step, 100), steps=100, slots=16)
    # The sum of 1, 0.99, ..., 0.01.
    assert mix.ar_slots_before(100) == int(Fraction(101, 2) * 16 + Fraction(1, 2))
    assert count(mix.slots(0), "ar") == 16 and count(mix.slots(99), "ar") == 0
