"""Corruption, targets and weights, against plain loops; what their mean is: test_estimates."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dualtrain.objectives import (
    MaskingNoise,
    autoregressive,
    diffusion,
    masking_noise,
    validation_noise,
    with_scheduled_rate,
)
from dualtrain.recipe.schema import RateSchedule, SpanCorruption, UniformCorruption

MASK, SPECIAL, VOCABULARY = 4, (0, 1, 2, 3, 4), 40
UNIFORM = UniformCorruption()
UNSMOOTHED = UniformCorruption(smoothing=0)
SPAN = SpanCorruption(name="span")

quick = settings(max_examples=40, deadline=None)


def corrupt(tokens, noise, corruption=UNIFORM, **options):
    documents = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, dtype=torch.int32)
    given = {"mask_id": MASK, "special_ids": SPECIAL, "vocab_size": VOCABULARY} | options
    return diffusion(tokens, documents, noise=noise, corruption=corruption, **given)


def noise_of(count, length, seed=0, spans=False):
    return masking_noise(seed, "corruption", 1, range(count), length, spans=spans)


def at_rate(rate, noise):
    """The noise with one rate for all rows."""
    return with_scheduled_rate(noise, RateSchedule(start=rate, end=rate), 0, 1)


def texts(count, length, seed=0, special=0.1):
    """(count, length + 1) ordinary tokens with some special ones among them."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, VOCABULARY, (count, length + 1), generator=random)
    replace = torch.rand(tokens.shape, generator=random) < special
    return tokens.masked_fill(replace, 1)


batches = st.builds(
    lambda count, length, seed, special: (
        texts(count, length, seed, special),
        noise_of(count, length, seed, spans=True),
    ),
    count=st.integers(1, 4),
    length=st.integers(2, 33),
    seed=st.integers(0, 10_000),
    special=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
)


# Autoregressive


def test_autoregressive_predicts_every_next_token_at_one_weight():
    tokens, documents = texts(2, 5), torch.tensor([[0, 0, 1, 1, 1], [0] * 5], dtype=torch.int32)
    example = autoregressive(tokens, documents, ar_weight=2.0)
    assert torch.equal(example.input_ids, tokens[:, :5])
    assert torch.equal(example.targets, tokens[:, 1:])
    assert torch.equal(example.weights, torch.full((2, 5), 2.0))
    assert example.attention == "causal" and example.document_ids is documents


# Uniform corruption, by a plain loop


def by_hand(row, rate, rounding, order, smoothing, target):
    """The uniform corruption of one row, as the method's text says it, in plain Python."""
    length = len(row) - 1
    ordinary = [i for i in range(length) if row[i] not in SPECIAL]
    count = min(max(1, math.floor(length * rate + rounding)), len(ordinary))
    masked = set(sorted(ordinary, key=lambda i: order[i])[:count])
    share = max(count, 1) / length
    weight = 1 / ((1 - smoothing) * share + smoothing)
    inputs = [MASK if i in masked else row[i] for i in range(length)]
    if target == "in_place":
        return inputs, row[:length], [weight if i in masked else 0 for i in range(length)]
    weights = [weight if i + 1 in masked or i + 1 == length else 0 for i in range(length)]
    return inputs, row[1:], weights


@quick
@given(batch=batches, target=st.sampled_from(["next", "in_place"]))
def test_uniform_corruption_and_its_loss_are_those_of_a_plain_loop(batch, target):
    tokens, noise = batch
    example = corrupt(tokens, noise, target=target)
    rows, length = example.input_ids.shape
    logits = torch.randn(rows, length, VOCABULARY, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for b in range(rows):
        chance = [noise.rate[b].item(), noise.rounding[b].item(), noise.order[b].tolist()]
        inputs, targets, weights = by_hand(tokens[b].tolist(), *chance, 1e-4, target)
        assert example.input_ids[b].tolist() == inputs
        assert example.targets[b].tolist() == targets
        assert example.weights[b].tolist() == pytest.approx(weights, rel=1e-6)
        for i in range(length):
            scores = [math.exp(x) for x in logits[b, i].tolist()]
            total -= weights[i] * math.log(scores[targets[i]] / sum(scores))
    entropy = F.cross_entropy(logits.flatten(0, 1), example.targets.flatten(), reduction="none")
    loss = (example.weights.flatten() * entropy).sum() / example.weights.numel()
    assert loss.item() == pytest.approx(total / (rows * length), rel=1e-4, abs=1e-6)
    assert example.attention == "full"


def test_a_worked_example():
    # T = 4, <s> first; u = 0.6 and u' = 0.5 give floor(2.9) = 2 masked tokens, the smallest first.
    tokens = torch.tensor([[1, 10, 11, 12, 13]])
    noise = MaskingNoise(
        torch.tensor([0.6]), torch.tensor([0.5]), torch.tensor([[0.0, 0.9, 0.2, 0.1]])
    )
    example = corrupt(tokens, noise, UNSMOOTHED)
    assert example.input_ids.tolist() == [[1, 10, MASK, MASK]]
    assert example.targets.tolist() == [[10, 11, 12, 13]]
    assert example.weights.tolist() == [[0.0, 2.0, 2.0, 2.0]]
    in_place = corrupt(tokens, noise, UNSMOOTHED, target="in_place")
    assert in_place.targets.tolist() == [[1, 10, 11, 12]]
    assert in_place.weights.tolist() == [[0.0, 0.0, 2.0, 2.0]]


def test_rates_and_weights_at_the_ends():
    tokens = texts(2, 8, special=0)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    noise = MaskingNoise(ends, ends, torch.arange(16.0).reshape(2, 8))
    example = corrupt(tokens, noise)
    # Never none, never more than all.
    assert (example.input_ids == MASK).sum(dim=1).tolist() == [1, 8]
    # x_0 is masked in the first row, but nothing predicts it: only the last position is scored.
    assert example.weights[0].tolist() == pytest.approx([0] * 7 + [1 / (0.9999 / 8 + 1e-4)])
    assert example.weights[1].tolist() == [1] * 8


def test_a_row_of_special_tokens_stays_finite():
    example = corrupt(torch.ones(1, 9, dtype=torch.int64), noise_of(1, 8), UNSMOOTHED)
    assert torch.equal(example.input_ids, torch.ones(1, 8, dtype=torch.int64))
    assert example.weights.tolist() == [[0.0] * 7 + [8.0]]


@quick
@given(batch=batches, corruption=st.sampled_from([UNIFORM, SPAN]), exact=st.booleans())
def test_special_tokens_are_never_touched_nor_made(batch, corruption, exact):
    tokens, noise = batch
    example = corrupt(tokens, noise, corruption, exact=exact and corruption is UNIFORM)
    special = tokens[:, :-1] < 5
    assert torch.equal(example.input_ids[special], tokens[:, :-1][special])
    changed = example.input_ids[~special]
    assert ((changed >= 5) | (changed == MASK)).all() and (changed < VOCABULARY).all()


@quick
@given(batch=batches, corruption=st.sampled_from([UNIFORM, SPAN]), choice=st.integers(0, 10_000))
def test_the_true_id_of_a_masked_token_shows_only_in_its_own_target(batch, corruption, choice):
    tokens, noise = batch
    before = corrupt(tokens, noise, corruption)
    masked = ((before.input_ids == MASK) & (tokens[:, :-1] != MASK)).nonzero()
    if len(masked) == 0:
        return
    b, i = masked[choice % len(masked)].tolist()
    other = tokens.clone()
    other[b, i] = 5 + (other[b, i] - 4) % (VOCABULARY - 5)
    assert other[b, i] != tokens[b, i]
    after = corrupt(other, noise, corruption)
    assert torch.equal(after.input_ids, before.input_ids)
    assert torch.equal(after.weights, before.weights)
    assert (after.targets != before.targets).nonzero().tolist() == ([[b, i - 1]] if i else [])


# Span corruption


@quick
@given(batch=batches, target=st.sampled_from(["next", "in_place"]))
def test_spans_reach_their_rate_and_no_further_than_one_span(batch, target):
    tokens, noise = batch
    everything = SpanCorruption(name="span", random_share=0, keep_share=0)
    example = corrupt(tokens, noise, everything, target=target)
    length = example.input_ids.shape[1]
    for b, inputs in enumerate(example.input_ids.tolist()):
        row = tokens[b].tolist()
        ordinary = sum(token not in SPECIAL for token in row[:-1])
        masked = [i for i in range(length) if inputs[i] != row[i]]
        wanted = max(1, math.floor(length * noise.rate[b].item() + noise.rounding[b].item()))
        assert min(wanted, ordinary) <= len(masked) <= wanted + 2
        scored = {i for i in masked} if target == "in_place" else {i - 1 for i in masked if i}
        if target == "next":
            scored.add(length - 1)
        weights = example.weights[b].tolist()
        assert {i for i in range(length) if weights[i]} == scored
        if scored:
            assert weights == pytest.approx(
                [length / len(scored) * (i in scored) for i in range(length)]
            )


def test_span_lengths_are_one_to_three_and_fates_eighty_ten_ten():
    count, length = 64, 512
    tokens = texts(count, length, special=0)
    noise = at_rate(0.2, noise_of(count, length, spans=True))
    example = corrupt(tokens, noise, SPAN, target="in_place")
    inputs, true = example.input_ids, tokens[:, :-1]
    chosen = example.weights > 0
    # The last span may overshoot, by less than 2 tokens of 512.
    assert 0.2 < chosen.float().mean() < 0.204
    masked = chosen & (inputs == MASK)
    # One of the 35 ordinary tokens is the true one by chance.
    kept = chosen & (inputs == true)
    shares = [(each.sum() / chosen.sum()).item() for each in (masked, kept)]
    assert shares == pytest.approx([0.8, 0.1 + 0.1 / 35], abs=0.02)
    assert torch.equal(inputs[~chosen], true[~chosen])
    replaced = inputs[chosen & (inputs != true) & (inputs != MASK)]
    assert set(replaced.tolist()) == set(range(5, VOCABULARY))
    # Where spans are rare they do not touch, and every run is one span.
    everything = SpanCorruption(name="span", random_share=0, keep_share=0)
    rare = corrupt(tokens, at_rate(0.015, noise), everything)
    runs = Counter()
    for row in (rare.input_ids == MASK).int().tolist():
        runs.update(len(run) for run in "".join(map(str, row)).split("0") if run)
    assert runs[1] > 60 and runs[2] > 60 and runs[3] > 60
    assert sum(runs[k] for k in (1, 2, 3)) > 0.95 * sum(runs.values())


def test_what_spans_need_is_asked_for():
    tokens = texts(1, 8)
    with pytest.raises(ValueError, match="spans=True"):
        corrupt(tokens, noise_of(1, 8), SPAN)
    with pytest.raises(ValueError, match="vocab_size"):
        corrupt(tokens, noise_of(1, 8, spans=True), SPAN, vocab_size=None)
    with pytest.raises(ValueError, match="uniform corruption"):
        corrupt(tokens, noise_of(1, 8, spans=True), SPAN, exact=True)


# Noise


def test_noise_belongs_to_seed_purpose_stream_and_sequence():
    whole = masking_noise(3, "corruption", 1, range(4, 8), 32)
    # Alone, in another batch, by another rank: the same.
    alone = masking_noise(3, "corruption", 1, torch.tensor([6]), 32)
    assert torch.equal(alone.order[0], whole.order[2]) and alone.rate[0] == whole.rate[2]
    spans = masking_noise(3, "corruption", 1, [6], 32, spans=True)
    assert torch.equal(spans.order[0], alone.order[0]) and spans.spans.shape == (3, 1, 32)
    keys = [(3, "corruption", 1, 6), (4, "corruption", 1, 6), (3, "other", 1, 6)]
    keys += [(3, "corruption", 0, 6), (3, "corruption", 2, 6), (3, "corruption", 1, 7)]
    orders = {tuple(masking_noise(*key[:3], [key[3]], 32).order[0].tolist()) for key in keys}
    assert len(orders) == len(keys)


@quick
@given(start=st.floats(0.01, 1), end=st.floats(0.01, 1), steps=st.integers(1, 1000))
def test_a_scheduled_rate_begins_at_start_and_leads_in_a_straight_line_to_end(start, end, steps):
    noise = noise_of(3, 8, spans=True)
    line = RateSchedule(start=start, end=end)
    rates = []
    for step in (0, steps // 2, steps - 1, steps):
        scheduled = with_scheduled_rate(noise, line, step, steps)
        assert len(set(scheduled.rate.tolist())) == 1 and scheduled.rate.dtype == torch.float64
        # Which tokens, how numbers are rounded, and what becomes of them: still the sequence's own.
        for name in ("rounding", "order", "spans"):
            assert getattr(scheduled, name) is getattr(noise, name)
        rates.append(scheduled.rate[0].item())
    middle = ((steps - steps // 2) * start + steps // 2 * end) / steps
    last = (start + (steps - 1) * end) / steps
    assert rates[0] == start
    assert rates[1:] == pytest.approx([middle, last, end])


def test_masks_differ_from_epoch_to_epoch():
    # The same text comes again later in its stream, as another sequence.
    tokens = texts(1, 64, special=0)
    masks = {
        tuple(corrupt(tokens, masking_noise(0, "corruption", 1, [i], 64)).input_ids[0].tolist())
        for i in range(50)
    }
    assert len(masks) == 50


def test_validation_rates_are_spread_evenly_and_never_change():
    whole = validation_noise(5, range(64), 64, 16)
    assert sorted((whole.rate * 64).floor().long().tolist()) == list(range(64))
    part = validation_noise(5, torch.tensor([9, 40]), 64, 16)
    assert torch.equal(part.rate, whole.rate[[9, 40]])
    assert torch.equal(part.order, whole.order[[9, 40]])
    # Not in the order of the text.
    assert abs(np.corrcoef(whole.rate, np.arange(64))[0, 1]) < 0.4
    # With T a divisor of N, every number of masked tokens comes up equally often.
    masked = corrupt(texts(64, 16, special=0), whole, exact=True).input_ids == MASK
    assert Counter(masked.sum(dim=1).tolist()) == Counter({k: 4 for k in range(1, 17)})


# Examples


def test_an_example_moves_to_a_device_but_its_documents_stay_for_the_planning_of_attention():
    tokens = texts(2, 8)
    example = corrupt(tokens, noise_of(2, 8))
    moved = example.to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.targets, moved.weights)} == {"meta"}
    assert moved.document_ids is example.document_ids and moved.attention == "full"
    assert example.input_ids.dtype == example.targets.dtype == torch.int64
    assert example.weights.dtype == torch.float32


@pytest.mark.gpu
def test_an_example_arrives_whole_on_the_gpu():
    example = corrupt(texts(2, 8), noise_of(2, 8))
    moved = example.to("cuda")
    assert moved.input_ids.is_cuda and moved.targets.is_cuda and moved.weights.is_cuda
    assert torch.equal(moved.input_ids.cpu(), example.input_ids)
    assert torch.equal(moved.weights.cpu(), example.weights)
    assert not moved.document_ids.is_cuda
