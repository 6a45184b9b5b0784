"""Tests of: dualtrain.evaluate.statistics: ties, chance, normalisation, intervals."""

import hashlib
import math

import numpy as np
import pytest
from helpers.tasks import binomial_error, load_one, question, score_with, write_task

from dualtrain.common.errors import UserError
from dualtrain.evaluate.statistics import average, chances, credit, normalised, resample

PAIRS = [("They run.", "They runs."), ("She runs.", "She run."), ("We all go.", "We all do.")]
"""The right sentence first, as in BLiMP: shorter, longer, and as long as the wrong one."""


@pytest.fixture
def quiz(tmp_path):
    """A task with items of two, three and five answers, the right one at any place."""
    lines = [
        question(n, gold, topic=f"of {n}", text=f"Q{n}{gold}?")
        for n in (2, 3, 5)
        for gold in range(n)
    ]
    return load_one(write_task(tmp_path, lines))


@pytest.fixture
def pairs(tmp_path):
    lines = [{"sentence_good": g, "sentence_bad": b, "UID": "x"} for g, b in PAIRS * 20]
    write_task(tmp_path, lines, data="blimp.jsonl")
    return load_one(tmp_path, "blimp")


def test_a_constant_scorer_is_exactly_at_chance(quiz):
    result = score_with(lambda prompt, answer: -7.25, quiz)
    assert result.chance == pytest.approx((2 / 2 + 3 / 3 + 5 / 5) / 10)
    assert result.accuracy.value == pytest.approx(result.chance, abs=1e-12)
    assert result.score.value == pytest.approx(0, abs=1e-12)
    assert result.ties == 10
    for group in result.groups.values():
        assert group.score.value == pytest.approx(0, abs=1e-12)


def test_rounding_does_not_break_ties(quiz):
    def noisy(prompt, answer):
        return -7.25 - 1e-9 * int(hashlib.md5((prompt + answer).encode()).hexdigest()[:4], 16) / 9

    assert score_with(noisy, quiz).score.value == pytest.approx(0, abs=1e-12)


def test_a_scorer_that_knows_only_lengths_does_not_beat_chance_on_pairs(pairs):
    """Argmax would give the pairs of one length to the first, which is always the right one."""
    result = score_with(lambda prompt, answer: -1.5 * len(answer), pairs)
    assert (result.accuracy.value, result.score.value) == (0.5, 0.0)
    assert result.ties == 20


def test_a_perfect_and_an_inverted_scorer(quiz):
    gold = {item.prompt: item.choices[item.gold] for item in quiz.items()}
    perfect = score_with(lambda prompt, answer: -1.0 - (gold[prompt] != answer), quiz)
    assert perfect.accuracy.value == 1 and perfect.score.value == 100
    assert (perfect.score.low, perfect.score.high) == pytest.approx((100, 100))
    inverted = score_with(lambda prompt, answer: -1.0 - (gold[prompt] == answer), quiz)
    assert inverted.accuracy.value == 0 and inverted.score.value < 0


def test_the_metric_per_character_divides_by_the_answer_itself(tmp_path):
    lines = [{"question": "Q", "choices": ["abcdefgh", "ab"], "gold": 0, "topic": "x"}]
    write_task(tmp_path, lines, metric="accuracy_norm", choice="{{ ' ' * 20 }}{{ choice }}.")
    result = score_with(
        lambda prompt, answer: {8: -4.0, 2: -2.0}[len(answer) - 21], load_one(tmp_path)
    )
    assert result.items[0].per_character == (-0.5, -1.0)
    assert (result.accuracy.value, result.accuracy_norm.value) == (0, 1)
    assert result.score.value == 100


def test_shared_credit():
    assert credit([-1, -2, -3], 0) == 1 and credit([-1, -2, -3], 1) == 0
    assert credit([-1, -1, -3], 1) == 0.5 and credit([-2, -1, -1], 0) == 0
    assert credit([-1, -1, -1], 2) == pytest.approx(1 / 3)
    assert credit([-100, -100.00005], 1) == 0.5 and credit([-100, -100.001], 1) == 0


def test_equal_answers_are_scored_once_and_tie(tmp_path):
    lines = [{"question": "Q", "choices": ["one", "two", "two"], "gold": 2, "topic": "x"}]
    result = score_with(
        lambda prompt, answer: -len(answer) - answer.count("n"),
        load_one(write_task(tmp_path, lines)),
    )
    assert result.accuracy.value == 0.5


def test_intervals_are_those_of_a_share():
    count, share = 1000, 0.7
    credits = np.array([1.0] * 700 + [0.0] * 300)
    drawn = resample(credits, chances([2] * count), seed=1, purpose="test").accuracy
    assert drawn.std() == pytest.approx(binomial_error(share, count), rel=0.05)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert high - low == pytest.approx(2 * 1.96 * binomial_error(share, count), rel=0.05)
    assert drawn.mean() == pytest.approx(share, abs=0.001)


def test_resampling_by_counts_is_resampling_items():
    random = np.random.default_rng(0)
    credits = random.choice([0, 0.5, 1], 60, p=[0.3, 0.2, 0.5])
    chance = chances(random.choice([2, 4], 60))
    by_counts = resample(credits, chance, seed=1, purpose="test").score
    rows = random.integers(0, 60, (10_000, 60))
    by_items = normalised(credits[rows].mean(1), chance[rows].mean(1))
    assert by_counts.mean() == pytest.approx(by_items.mean(), abs=0.5)
    assert by_counts.std() == pytest.approx(by_items.std(), rel=0.05)


def test_intervals_hold_what_they_promise():
    random = np.random.default_rng(5)
    inside = 0
    for number in range(200):
        credits = (random.random(80) < 0.6).astype(float)
        drawn = resample(credits, chances([2] * 80), seed=number, purpose="x", resamples=1000)
        low, high = np.quantile(drawn.accuracy, [0.025, 0.975])
        inside += low <= 0.6 <= high
    assert 180 <= inside <= 199


def test_draws_depend_on_seed_and_purpose_only():
    credits, chance = np.array([1.0, 0, 0, 1]), chances([2, 2, 2, 2])
    first = resample(credits, chance, seed=1, purpose="a").accuracy
    assert (first == resample(credits, chance, seed=1, purpose="a").accuracy).all()
    assert (first != resample(credits, chance, seed=2, purpose="a").accuracy).any()
    assert (first != resample(credits, chance, seed=1, purpose="b").accuracy).any()


def test_the_average_is_resampled_by_task():
    credits = np.array([1.0] * 60 + [0.0] * 40)
    drawn = [resample(credits, chances([2] * 100), seed=0, purpose=str(n)).score for n in range(4)]
    mean = average([20.0] * 4, drawn)
    assert mean.value == 20
    single = np.quantile(drawn[0], [0.025, 0.975])
    assert (mean.high - mean.low) == pytest.approx((single[1] - single[0]) / 2, rel=0.1)


def test_what_does_not_fit_is_counted(quiz):
    """A prompt has 4 characters and ``<s>``, an answer 9."""
    assert score_with(lambda prompt, answer: -1.0, quiz, room=14).cut == 0
    assert score_with(lambda prompt, answer: -1.0, quiz, room=13).cut == 10
    with pytest.raises(UserError, match="every item of 10 has an answer longer"):
        score_with(lambda prompt, answer: -1.0, quiz, room=9)


def test_an_item_whose_answer_does_not_fit_is_left_out(tmp_path):
    lines = [question(2, 0), {**question(2, 0), "choices": ["short", "long " * 20]}]
    result = score_with(lambda p, a: -1.0, load_one(write_task(tmp_path, lines)), room=50)
    assert (len(result.items), result.left_out) == (1, 1)
    assert result.json()["left_out"] == 1


def test_groups_are_scored_by_themselves(quiz):
    result = score_with(lambda prompt, answer: -1.0 - ("a" not in answer[-1]), quiz)
    assert list(result.groups) == ["of 2", "of 3", "of 5"]
    assert [group.accuracy.value for group in result.groups.values()] == [1 / 2, 1 / 3, 1 / 5]
    found = result.json()["groups"]["of 5"]
    assert found["items"] == 5 and found["score"]["low"] < found["score"]["value"]


def test_a_log_likelihood_that_is_no_number_is_an_error(quiz):
    with pytest.raises(UserError, match="quiz: the model gives line 1 the log-likelihoods nan"):
        score_with(lambda prompt, answer: math.nan, quiz)


def test_progress_counts_requests(quiz):
    told = []
    score_with(lambda prompt, answer: -1.0, quiz, on_progress=lambda *n: told.append(n))
    assert told[-1] == (38, 38) and len(told) == 38
