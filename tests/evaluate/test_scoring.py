"""Tests of: dualtrain.evaluate.scoring, masks: what each mode reads, and must not see."""

from itertools import combinations, product
from math import comb, exp, fsum, sqrt

import numpy as np
import pytest
import torch
from helpers.scoring import (
    MASK,
    OPEN_VOCABULARY,
    VOCABULARY,
    WORDS,
    Recorder,
    make_model,
    make_scorer,
    some_requests,
)

from dualtrain.evaluate.masks import Masking
from dualtrain.evaluate.request import Passage
from dualtrain.evaluate.scoring import MODES, Request
from dualtrain.network.attention import plan_attention
from dualtrain.network.cache import KeyValueCache

EXACT = 1e-10
"""Of float64 sums in different orders."""


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.no_grad()
def log_p(model, ids, kind, prefix=None):
    """Log-probabilities at every position of a row of its own, (T, V)."""
    ids = torch.tensor([ids])
    plan = plan_attention(
        kind,
        torch.zeros_like(ids),
        backend="sdpa",
        device="cpu",
        dtype=torch.float64,
        in_prefix=None if prefix is None else torch.arange(ids.shape[1])[None] < prefix,
    )
    return model(ids, attention=plan).logits[0].log_softmax(-1)


def left_to_right(model, request, mode):
    """Log-likelihood and greediness by the definition, one row for the request."""
    ids, begin = request.context + request.continuation, len(request.context)
    kind, prefix = ("causal", None) if mode == "ar" else ("prefix", begin)
    rows = log_p(model, ids, kind, prefix)[begin - 1 : -1]
    targets = torch.tensor(request.continuation)
    found = rows.gather(1, targets[:, None])
    return float(found.sum()), bool((rows.argmax(-1) == targets).all())


def masked(model, request, hidden, read, shift):
    """Sum of log-probabilities of the tokens ``read`` with those of ``hidden`` masked."""
    ids, begin = list(request.context + request.continuation), len(request.context)
    for i in hidden:
        ids[begin + i] = MASK
    rows = log_p(model, ids, "full")
    return sum(float(rows[begin + i - shift, request.continuation[i]]) for i in read)


def ordinary(request):
    return [i for i, t in enumerate(request.continuation) if t not in VOCABULARY.special_ids]


@pytest.mark.parametrize("mode", ["ar", "prefix", "chain"])
def test_probabilities_of_all_continuations_sum_to_1(model, mode):
    requests = [Request((1, 7, 9), pair) for pair in product(range(WORDS), repeat=2)]
    scores = make_scorer(model, vocabulary=OPEN_VOCABULARY).score(requests, mode)
    assert fsum(exp(score.log_likelihood) for score in scores) == pytest.approx(1, abs=EXACT)
    # Given its length, in the mode that masks; pseudo-likelihoods sum to something else.
    pseudo = make_scorer(model, vocabulary=OPEN_VOCABULARY).score(requests, "pll")
    assert abs(fsum(exp(score.log_likelihood) for score in pseudo) - 1) > 1e-3


@pytest.mark.parametrize("mode", ["ar", "prefix"])
def test_shared_beginnings_change_nothing(model, mode):
    requests = some_requests()
    recorder = Recorder(model)
    scores = make_scorer(recorder).score(requests, mode)
    for request, score in zip(requests, scores, strict=True):
        expected, greedy = left_to_right(model, request, mode)
        assert score.log_likelihood == pytest.approx(expected, abs=EXACT)
        assert score.is_greedy == greedy
    alone = sum(len(r.context) + len(r.continuation) - 1 for r in set(requests))
    assert recorder.tokens < 0.8 * alone


@pytest.mark.parametrize("mode", ["ar", "prefix"])
def test_the_likeliest_continuation_is_greedy(model, mode):
    context, ids = (1, 7, 9), [1, 7, 9]
    for _ in range(3):
        prefix = 3 if mode == "prefix" else None
        kind = "prefix" if mode == "prefix" else "causal"
        ids.append(int(log_p(model, ids, kind, prefix)[-1].argmax()))
    other = (*ids[3:5], (ids[5] + 1) % WORDS)
    scores = make_scorer(model).score(
        [Request(context, tuple(ids[3:])), Request(context, other)], mode
    )
    assert [score.is_greedy for score in scores] == [True, False]


@torch.no_grad()
def test_prefix_in_one_pass_is_as_token_by_token(model):
    context, continuation = (1, 7, 9, 11, 20), (6, 8, 10, 6)
    score = make_scorer(model).score([Request(context, continuation)], "prefix")[0]
    separate = cached = 0.0
    cache = KeyValueCache(1, 9, dtype=torch.float64)
    plan = cache.plan_prompts([5], "full", 5)
    logits = model(torch.tensor([context]), attention=plan).logits
    for i, token in enumerate(continuation):
        rows = log_p(model, context + continuation[:i], "prefix", len(context))
        separate += float(rows[-1, token])
        cached += float(logits[0, -1].log_softmax(-1)[token])
        plan, positions = cache.plan_next()
        logits = model(torch.tensor([[token]]), attention=plan, positions=positions).logits
    assert score.log_likelihood == pytest.approx(separate, abs=EXACT)
    assert score.log_likelihood == pytest.approx(cached, abs=EXACT)
    causal = make_scorer(model).score([Request(context, continuation)], "ar")[0]
    assert abs(causal.log_likelihood - score.log_likelihood) > 1e-3


@pytest.mark.parametrize("target", ["next", "in_place"])
def test_masked_modes_are_as_defined(model, target):
    shift = 1 if target == "next" else 0
    requests = some_requests()
    scorer = make_scorer(model, target=target, elbo_samples=127)
    scores = {mode: scorer.score(requests, mode) for mode in ("pll", "chain", "elbo")}
    for number, request in enumerate(requests):
        places = ordinary(request)
        length = len(places)
        expected = {
            "pll": sum(masked(model, request, [i], [i], shift) for i in places),
            "chain": sum(
                masked(model, request, places[n:], [i], shift) for n, i in enumerate(places)
            ),
        }
        if number % 11 < 6:  # 2^7 sets of the longest are enough for one
            expected["elbo"] = 0.0
            for k in range(1, length + 1):
                for hidden in combinations(places, k):
                    mean = masked(model, request, hidden, hidden, shift) * length / k
                    expected["elbo"] += mean / comb(length, k) / length
        for mode, value in expected.items():
            got = scores[mode][number]
            assert got.log_likelihood == pytest.approx(value, abs=EXACT), mode
            assert got.is_greedy is None
    # The continuation (8, </s>, 9): its end is neither masked nor scored.
    assert ordinary(requests[10]) == [0, 2]


def test_the_bound_is_estimated_without_bias(model):
    """Samples of masks are drawn over and over, and scored from a table of all of them."""
    request = Request((1, 7, 9), (5, 9, 6, 22, 8))
    passage = Passage(request.context + request.continuation, 3)
    exact = make_scorer(model, elbo_samples=31).score([request], "elbo")[0].log_likelihood
    losses = {}
    for size in range(1, 6):
        for hidden in combinations(range(5), size):
            rows = log_p(model, with_masks(request, hidden), "full")
            losses[hidden] = [-float(rows[2 + i, request.continuation[i]]) for i in hidden]

    def estimate(samples, seed):
        masking = Masking("elbo", VOCABULARY, samples=samples, seed=seed)
        documents, weights = masking.documents(passage)
        hidden = [tuple(np.flatnonzero(d.tokens[3:] == MASK)) for d in documents]
        return -np.array([loss for key in hidden for loss in losses[key]]) @ weights

    for samples in (1, 3, 8):
        drawn = np.array([estimate(samples, seed) for seed in range(3000)])
        error = drawn.std() / sqrt(len(drawn))
        assert 0 < error < 0.05
        assert abs(drawn.mean() - exact) < 4 * error
    # And what a scorer gets is such an estimate.
    score = make_scorer(model, elbo_samples=8, seed=5).score([request], "elbo")[0]
    assert score.log_likelihood == pytest.approx(estimate(8, 5), abs=EXACT)


def with_masks(request, hidden):
    ids = list(request.context + request.continuation)
    for i in hidden:
        ids[len(request.context) + i] = MASK
    return ids


def test_the_bound_is_below_the_likelihood_of_a_mean_over_orders(model):
    """ELBO <= log of the mean over orders of the chain rule's likelihood."""
    requests = [Request((1, 7, 9), pair) for pair in [(5, 6), (20, 9), (8, 8)]]
    scores = make_scorer(model).score(requests, "elbo")
    for request, score in zip(requests, scores, strict=True):
        orders = [
            masked(model, request, [0, 1], [first], 1)
            + masked(model, request, [1 - first], [1 - first], 1)
            for first in (0, 1)
        ]
        assert score.log_likelihood == pytest.approx(sum(orders) / 2, abs=EXACT)
        assert score.log_likelihood <= np.log(np.mean(np.exp(orders)))


@pytest.mark.parametrize(("target", "shift"), [("next", 1), ("in_place", 0)])
def test_a_masked_token_is_not_seen(model, target, shift):
    """Changing it leaves the output that it is scored by as it is, to the bit; others change."""

    def outputs(continuation):
        recorder = Recorder(model, fixed_target=7)
        make_scorer(recorder, target=target).score([Request((1, 7, 9), continuation)], "pll")
        return recorder.outputs[0].nll.tolist()

    before = outputs((5, 6, 8, 10))
    for i in range(4):
        changed = [5, 6, 8, 10]
        changed[i] = 20
        same = [a == b for a, b in zip(before, outputs(tuple(changed)), strict=True)]
        assert same == [j == i for j in range(4)]
    # It is read where the model was trained to predict it.
    expected = log_p(model, with_masks(Request((1, 7, 9), (5, 6, 8, 10)), [2]), "full")
    assert before[2] == pytest.approx(-float(expected[5 - shift, 7]), abs=EXACT)


@pytest.mark.parametrize("mode", ["pll", "chain", "elbo"])
def test_packed_documents_do_not_see_each_other(model, mode):
    requests = some_requests()
    recorder = Recorder(model)
    packed, plain = make_scorer(recorder), make_scorer(model)
    packed.row_tokens = 64
    scores = packed.score(requests, mode)
    assert recorder.inputs[0].shape[1] == 64  # several in a row, as no request is longer than 17
    for score, expected in zip(scores, plain.score(requests, mode), strict=True):
        assert score.log_likelihood == pytest.approx(expected.log_likelihood, abs=EXACT)
    pair = [Request((1, 7, 9), (5, 6, 8)), Request((1, 10, 11), (12, 13, 14))]
    other = [pair[0], Request((1, 20, 21), (22, 23, 20))]
    assert packed.score(pair, mode)[0] == packed.score(other, mode)[0]
    assert packed.score(pair, mode)[1] != packed.score(other, mode)[1]


@pytest.mark.parametrize("mode", MODES)
def test_branches_and_batches_do_not_leak(model, mode):
    """Other requests of the same lengths in the same call change nothing, to the bit."""
    own = Request((1, 7, 9, 11), (5, 6, 8))
    near = [Request((1, 7, 9, 11), (12, 13, 14)), Request((1, 10, 9, 11), (5, 6, 8))]
    far = [Request((1, 7, 9, 11), (15, 16, 17)), Request((1, 20, 21, 22), (23, 20, 21))]
    scorer = make_scorer(model)
    first, second = scorer.score([own, *near], mode), scorer.score([own, *far], mode)
    assert first[0] == second[0]
    assert first[1] != second[1] and first[2] != second[2]
