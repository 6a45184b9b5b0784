"""Tests of: dualtrain.derived.derive, reasons, cost: by hand, by brute force, from the paper."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtrain.common.errors import UserError
from dualtrain.data.corpus import CorpusFacts
from dualtrain.derived.cost import Memory
from dualtrain.derived.derive import build_mixture, derive, run_length, uses_rotation
from dualtrain.method.schedules import learning_rate_factor
from dualtrain.recipe.checks import check_world_size
from dualtrain.recipe.load import load_recipe
from dualtrain.recipe.schema import Recipe

CORPUS = CorpusFacts(tokens=99_000, documents=1_000, vocab_size=4090)
"""100,000 tokens an epoch, with a </s> for each document."""


def make(**changes) -> Recipe:
    """A recipe of 1000 tokens a step in 10 slots."""
    values = {
        "name": "r",
        "alpha": "1/5",
        "sequence_length": 20,
        "global_batch": 50,
        "micro_batch": 5,
        "data": {"path": "somewhere"},
        "engine": {"deepspeed": "zero1", "precision": "fp32"},
    }
    return Recipe.model_validate(values | changes)


# Length of the run


@pytest.mark.parametrize(
    ("given", "steps", "unique", "repetitions", "follows"),
    [
        ({"steps": 40, "repetitions": 8}, 40, 5_000, 8, "unique_tokens"),
        ({"steps": 40, "unique_tokens": 4_000}, 40, 4_000, 10, "repetitions"),
        ({"unique_tokens": 5_000, "repetitions": 8}, 40, 5_000, 8, "steps"),
        ({"unique_tokens": "all", "repetitions": 0.5}, 50, 100_000, 0.5, "steps"),
        ({"unique_tokens": "all", "steps": 250}, 250, 100_000, 2.5, "repetitions"),
        ({"steps": 40, "unique_tokens": 5_000, "repetitions": 8}, 40, 5_000, 8, None),
        # 12.3 steps become 12.
        ({"unique_tokens": 4_100, "repetitions": 3}, 12, 4_100, 12_000 / 4_100, "steps"),
        ({"unique_tokens": 10, "repetitions": 1}, 1, 10, 100, "steps"),
        # Not a whole number of tokens: the subset is rounded down.
        ({"steps": 1, "repetitions": 3}, 1, 333, 3, "unique_tokens"),
    ],
)
def test_two_of_three_fix_the_third(given, steps, unique, repetitions, follows):
    derived = derive(make(**given), corpus=CORPUS)
    assert (derived.steps, derived.unique_tokens) == (steps, unique)
    assert run_length(make(**given), CORPUS).follows == follows
    assert derived.repetitions == pytest.approx(repetitions, rel=1e-12)
    assert derived.total_tokens == steps * 1000
    assert all(
        derived.reasons[name].startswith("follows: ") == (name == follows)
        for name in ("steps", "unique_tokens", "repetitions")
    )


def test_rounding_to_whole_steps_is_said():
    derived = derive(make(unique_tokens=4_100, repetitions=3), corpus=CORPUS)
    assert derived.reasons["repetitions"] == "3 asked for, rounded to whole steps"
    exact = derive(make(unique_tokens=5_000, repetitions=8), corpus=CORPUS)
    assert exact.reasons["repetitions"] == "given"


def test_ends_of_documents_count():
    assert CORPUS.packed_tokens(append_eos=True) == 100_000
    recipe = make(unique_tokens="all", repetitions=1, data={"path": "x", "append_eos": False})
    assert derive(recipe, corpus=CORPUS).unique_tokens == 99_000


def test_more_unique_tokens_than_the_corpus_has_are_refused_with_both_numbers():
    with pytest.raises(UserError) as caught:
        derive(make(unique_tokens=100_001, repetitions=1), corpus=CORPUS)
    message = str(caught.value)
    assert message.startswith("unique_tokens: 100,001 unique tokens, but the train split of")
    assert "has 100,000 (99,000 of text, and </s> of 1,000 documents)" in message
    assert derive(make(unique_tokens=100_000, repetitions=1), corpus=CORPUS).steps == 100
    # The number may follow from the others.
    with pytest.raises(UserError, match="101 steps and 1 repetitions need"):
        derive(make(steps=101, repetitions=1), corpus=CORPUS)
    # Without a corpus nobody knows, and that is said.
    derived = derive(make(steps=101, repetitions=1), corpus=None)
    assert "not checked" in derived.reasons["unique_tokens"]


def test_all_needs_a_corpus():
    with pytest.raises(UserError, match="`all`, but there is no dataset at somewhere"):
        derive(make(unique_tokens="all", steps=3), corpus=None)


def test_three_with_all_must_agree():
    recipe = make(unique_tokens="all", steps=200, repetitions=2)
    assert run_length(recipe, CORPUS).follows is None
    with pytest.raises(UserError, match="201 steps over `all` unique tokens are 2.01 rep"):
        derive(make(unique_tokens="all", steps=201, repetitions=2), corpus=CORPUS)


def test_an_empty_subset_is_refused():
    with pytest.raises(UserError, match="fewer tokens than 1001 repetitions"):
        derive(make(steps=1, repetitions=1001), corpus=CORPUS)


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 10**6), repetitions=st.floats(0.01, 500))
def test_the_three_agree_whichever_two_are_given(steps, repetitions):
    recipe = make(steps=steps, repetitions=repetitions)
    length = run_length(recipe, None)
    back = make(unique_tokens=length.unique_tokens, repetitions=repetitions)
    # The subset is rounded down by less than a token, so steps by less than repetitions / 1000.
    assert abs(run_length(back, None).steps - steps) <= repetitions / 1000 + 0.5


# Slots, rotation, ranks


def test_slots_of_the_paper():
    derived = derive(load_recipe("paper/470m-r128").recipe, corpus=None)
    assert derived.total_tokens == 34_359_738_368
    assert derived.unique_tokens == 268_435_456
    assert derived.slots_per_step == 256
    assert derived.ar_slots * 8 == derived.ar_slots + derived.diffusion_slots == 8192 * 256
    assert derived.ar_passes == 16
    assert derived.reasons["ar_passes"].startswith("16 over every token; ")
    assert derived.cost is not None
    assert derived.cost.parameters == 468_700_160
    assert derived.cost.without_vocabulary == 363_842_560


@pytest.mark.parametrize(
    ("changes", "ar", "diffusion", "passes"),
    [
        ({}, 80, 320, 1.6),
        ({"alpha": 1}, 400, 0, 8),
        ({"alpha": 0}, 0, 400, 0),
        ({"objective": {"mixing": "weighted_sum"}}, 400, 400, 8),
        ({"alpha": 1, "objective": {"mixing": "weighted_sum"}}, 400, 0, 8),
        (
            {"alpha": {"name": "linear", "start": 0, "phases": [{"until": 1, "alpha": 1}]}},
            195,
            205,
            3.9,
        ),
    ],
)
def test_slots_and_passes(changes, ar, diffusion, passes):
    derived = derive(make(steps=40, repetitions=8, **changes), corpus=CORPUS)
    assert (derived.ar_slots, derived.diffusion_slots) == (ar, diffusion)
    assert derived.ar_passes == pytest.approx(passes)


@pytest.mark.parametrize(
    ("changes", "rotates"),
    [
        ({}, True),
        ({"objective": {"rotation": False}}, False),
        ({"objective": {"mixing": "weighted_sum"}}, False),
        ({"alpha": {"name": "phases", "phases": [{"until": 1, "alpha": "1/2"}]}}, True),
    ],
)
def test_rotation_is_on_where_it_can_be(changes, rotates):
    recipe = make(steps=40, repetitions=8, **changes)
    assert uses_rotation(recipe) == rotates
    assert build_mixture(recipe, 40).rotates == rotates


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        # 40 steps of 10 slots of 100 tokens; a fifth of 8 passes is 1.6.
        ({}, "1 over every token, 2 over 3,000 (60 %) of them; the objectives share each"),
        ({"repetitions": 10}, "2 over every token; the objectives share each pass"),
        ({"repetitions": 2.5, "alpha": "2/5"}, "1 over every token; the objectives share"),
        ({"alpha": 1}, "8 over every token"),
        ({"repetitions": 1}, "1 over 8,000 (20 %) of them, none over the others; the objectives"),
        (
            {"objective": {"rotation": False}},
            "1 over every token, 2 over 3,000 (60 %) of them; without rotation each objective",
        ),
        ({"objective": {"mixing": "weighted_sum"}}, "every pass has both objectives"),
    ],
)
def test_passes_of_a_token_are_said(changes, reason):
    recipe = make(**({"steps": 40, "repetitions": 8} | changes))
    derived = derive(recipe, corpus=CORPUS)
    assert derived.reasons["ar_passes"].startswith(reason)


def test_the_ranks_must_divide_a_step():
    recipe = make(steps=40, repetitions=8, global_batch=60)
    for ranks in (1, 2, 3, 4, 6, 12):
        check_world_size(recipe, ranks)
    with pytest.raises(UserError) as caught:
        derive(recipe, corpus=CORPUS, world_size=5)
    assert "5 ranks cannot share the 12 micro-batches" in str(caught.value)
    assert "among 1, 2, 3, 4, 6, 12" in str(caught.value)


# Learning rate


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "wsd", "warmup_steps": 5, "cooldown": 0.25},
        {"name": "wsd", "cooldown": 0.5, "shape": "one_minus_sqrt", "final": 0.1},
        {"name": "wsd", "cooldown": 1},
        {"name": "wsd", "cooldown": 0},
        {"name": "wsd", "warmup_steps": 30, "cooldown": 0.25},
        {"name": "cosine", "warmup_steps": 5, "final": 0.1},
        {"name": "constant", "warmup_steps": 5},
    ],
)
def test_milestones_say_what_the_schedule_does(schedule):
    recipe = make(steps=40, repetitions=8, optim={"lr": 0.5, "schedule": schedule})
    milestones = derive(recipe, corpus=CORPUS).milestones
    rates = [0.5 * learning_rate_factor(recipe.optim.schedule, n, 40) for n in range(40)]
    ends = [piece.step for piece in milestones[1:]] + [40]
    assert milestones[0].step == 0
    for piece, end in zip(milestones, ends, strict=True):
        assert piece.learning_rate == rates[piece.step]
        change = np.diff(rates[piece.step : end])
        if piece.what.startswith("rises"):
            assert (change > 0).all()
        elif piece.what == "stays":
            assert (change == 0).all()
        else:
            assert piece.what.startswith("falls") and (change < 0).all()
            assert f"to {rates[-1]:.3g} in the last step" in piece.what


# Warnings


def warnings_of(**changes) -> list[str]:
    return list(derive(make(**({"steps": 40, "repetitions": 8} | changes)), corpus=None).warnings)


@pytest.mark.parametrize(
    ("alpha", "name", "advice"),
    [
        ("1/20", "AR has 0.5 of the 10 slots of a step, one in 2 steps", "micro_batch 2"),
        ("19/20", "diffusion has 0.5 of the 10 slots", "micro_batch 2"),
        ("1/100", "AR has 0.1 of the 10 slots of a step, one in 10 steps", "global_batch 100"),
    ],
)
def test_less_than_a_slot_a_step_is_warned_about_with_advice(alpha, name, advice):
    (warning,) = warnings_of(alpha=alpha)
    assert warning.startswith(name) and advice in warning
    changed = {"micro_batch": 2} if advice == "micro_batch 2" else {"global_batch": 100}
    assert not warnings_of(alpha=alpha, **({"micro_batch": 1} | changed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 40, "repetitions": 50}, "reads the 800 unique tokens more than once"),
        ({"steps": 10, "repetitions": 0.5}, "only 50 % of the unique tokens are ever read"),
        (
            {"steps": 10, "repetitions": 5, "optim": {"schedule": {"warmup_steps": 10}}},
            "warm-up takes 10 of 10 steps",
        ),
    ],
)
def test_other_warnings(changes, message):
    assert any(message in warning for warning in warnings_of(**changes))


# Cost


def test_the_vocabulary_is_the_datasets_rounded_up_unless_given():
    recipe = make(steps=40, repetitions=8, model={"layers": 1, "width": 8, "heads": 1})
    assert derive(recipe, corpus=None).cost is None
    known = derive(recipe, corpus=CORPUS).cost
    assert known is not None
    # 4090 rounded up to 4096; each row is in two matrices, and has a bias in the paper's head.
    assert known.parameters - known.without_vocabulary == 2 * 4096 * 8
    small = make(steps=40, repetitions=8, model={"vocab_size": 4089})
    with pytest.raises(UserError, match="model.vocab_size: 4,089, but the tokenizer of somewhere"):
        derive(small, corpus=CORPUS)


def test_muon_has_the_matrices_of_the_body():
    recipe = load_recipe("paper/470m").recipe
    cost = derive(recipe, corpus=None).cost
    assert cost is not None
    # What is left for AdamW: two vocabulary matrices, 49 norms, the bias.
    rest = 2 * 51_200 * 1024 + 49 * 1024 + 51_200
    assert cost.parameters - cost.muon_parameters == rest
    adamw = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"name": "adamw"})})
    cost = derive(adamw, corpus=None).cost
    assert cost is not None and cost.muon_parameters == 0


def test_memory_falls_with_the_stage_and_the_ranks():
    recipe = load_recipe("paper/470m").recipe
    totals = []
    for stage in range(4):
        engine = recipe.engine.model_copy(update={"deepspeed": f"zero{stage}", "precision": "fp32"})
        cost = derive(recipe.model_copy(update={"engine": engine}), corpus=None, world_size=16).cost
        assert cost is not None
        totals.append(cost.memory.total - cost.memory.activations)
    assert totals == sorted(totals, reverse=True)
    parameters = 468_700_160
    assert totals[0] == 4 * parameters * 2 + 4 * (2 * parameters - 363_741_184)
    assert totals[3] < totals[0] / 4


def test_offloaded_bytes_are_in_host_memory():
    recipe = load_recipe("paper/470m").recipe

    def memory(name: str) -> Memory:
        engine = recipe.engine.model_copy(update={"deepspeed": name})
        cost = derive(recipe.model_copy(update={"engine": engine}), corpus=None, world_size=8).cost
        assert cost is not None
        return cost.memory

    for stage, moves_weights in ((2, False), (3, True)):
        here, there = memory(f"zero{stage}"), memory(f"zero{stage}-offload")
        assert here.host == 0 and there.optimizer == 0
        assert there.weights == (0 if moves_weights else here.weights)
        assert there.total + there.host == here.total
