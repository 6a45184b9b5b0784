"""Tests of: dualtrain.method.objectives.

Corruption, targets and weights, against plain loops; what their mean is: test_estimates.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dualtrain.common.vocabulary import Vocabulary
from dualtrain.method.objectives import (
    MaskingNoise,
    autoregressive,
    choose_positions,
    diffusion,
    hidden_targets,
    masking_noise,
    scored_targets,
    validation_noise,
    with_scheduled_rate,
)
from dualtrain.recipe.schema import RateSchedule, SpanCorruption, UniformCorruption

MASK, SPECIAL, VOCABULARY = 4, (0, 1, 2, 3, 4), 40
UNKNOWN, BEGIN, END = 0, 1, 2
IDS = Vocabulary(size=VOCABULARY, special_ids=SPECIAL, bos_id=BEGIN, eos_id=END, mask=MASK)
UNIFORM = UniformCorruption()
UNSMOOTHED = UniformCorruption(smoothing=0)
SPAN = SpanCorruption(name="span")

quick = settings(max_examples=40, deadline=None)


@dataclass
class Texts:
    """Packed rows: (B, T) each, as in ``data.Batch``."""

    inputs: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor

    @property
    def context_ids(self) -> torch.Tensor:
        return self.document_ids


def corrupt(texts, noise, corruption=UNIFORM, **options):
    return diffusion(texts, IDS, noise, corruption, **options)


def noise_of(count, length, seed=0, spans=False):
    return masking_noise(seed, "corruption", 1, range(count), length, spans=spans)


def at_rate(rate, noise):
    """The noise with one rate for all rows."""
    return with_scheduled_rate(noise, RateSchedule(start=rate, end=rate), 0, 1)


def one_document(inputs, following):
    """Rows of one document each: its inputs, and the target after them."""
    inputs = torch.as_tensor(inputs)
    last = torch.as_tensor(following).reshape(-1, 1).expand(len(inputs), 1)
    documents = torch.zeros(inputs.shape, dtype=torch.int32)
    return Texts(inputs, torch.cat([inputs[:, 1:], last], dim=1), documents)


def ordinary_texts(count, length, seed=0):
    """Rows of nothing but ordinary tokens, all of one document."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, VOCABULARY, (count, length + 1), generator=random)
    return one_document(tokens[:, :-1], tokens[:, -1])


def packed_texts(count, length, seed=0, unknown=0.1, borders=0.15):
    """Rows as they are packed: documents begin with `<s>` or in their middle, end with `</s>` or
    not, and have some `<unk>`."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(5, VOCABULARY, (count, length))
    inputs[rng.random((count, length)) < unknown] = UNKNOWN
    starts = rng.random((count, length)) < borders
    inputs[starts & (rng.random((count, length)) < 0.7)] = BEGIN
    starts[:, 0] = False
    documents = starts.cumsum(axis=1).astype(np.int32)
    ends = np.concatenate([starts[:, 1:], np.ones((count, 1), dtype=bool)], axis=1)
    after = np.where(rng.random((count, length)) < 0.5, END, rng.integers(5, VOCABULARY))
    targets = np.where(ends, after, np.roll(inputs, -1, axis=1))
    return Texts(*map(torch.from_numpy, (inputs, targets, documents)))


batches = st.builds(
    lambda count, length, seed, unknown, borders: (
        packed_texts(count, length, seed, unknown, borders),
        noise_of(count, length, seed, spans=True),
    ),
    count=st.integers(1, 4),
    length=st.integers(2, 33),
    seed=st.integers(0, 10_000),
    unknown=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    borders=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
)


# What is scored


def are_last(documents):
    """Positions whose document goes on no further in the row."""
    return [
        i
        for i in range(len(documents))
        if i + 1 == len(documents) or documents[i + 1] > documents[i]
    ]


@quick
@given(batch=batches)
def test_every_token_but_an_unknown_input_is_scored(batch):
    texts, _ = batch
    hidden = hidden_targets(texts.document_ids)
    scored = scored_targets(texts.inputs, texts.document_ids, SPECIAL)
    for b, documents in enumerate(texts.document_ids.tolist()):
        last = are_last(documents)
        assert hidden[b].nonzero()[:, 0].tolist() == last
        wanted = [i in last or texts.targets[b, i] != UNKNOWN for i in range(len(documents))]
        assert scored[b].tolist() == wanted


def test_autoregressive_scores_them_at_one_weight_on_clean_inputs():
    texts = Texts(
        torch.tensor([[BEGIN, 7, 8, BEGIN, 9], [7, UNKNOWN, 9, 10, 11]]),
        torch.tensor([[7, 8, END, 9, UNKNOWN], [UNKNOWN, 9, 10, 11, 12]]),
        torch.tensor([[0, 0, 0, 1, 1], [0] * 5], dtype=torch.int32),
    )
    example = autoregressive(texts, IDS, ar_weight=2.0)
    assert torch.equal(example.input_ids, texts.inputs)
    assert torch.equal(example.targets, texts.targets)
    assert example.weights.tolist() == [[2, 2, 2, 2, 2], [0, 2, 2, 2, 2]]
    assert example.attention == "causal" and example.document_ids is texts.document_ids
    assert autoregressive(texts, IDS).weights.max() == 1
    assert example.weights.dtype == torch.float32


# Uniform corruption, by a plain loop


def by_hand(row, chance, smoothing, target, exact=False):
    """The uniform corruption of one row, as the method's text says it, in plain Python."""
    inputs, targets, documents = row
    rate, rounding, order = chance
    length, last = len(inputs), are_last(documents)
    may = [i for i in range(length) if inputs[i] not in SPECIAL]
    if exact and target == "next":
        may = [i for i in may if i and i - 1 not in last]
    total, smoothing = (len(may), 0) if exact else (length, smoothing)
    count = min(max(1, math.floor(total * rate + rounding)), len(may))
    masked = set(sorted(may, key=lambda i: order[i])[:count])
    share = max(count, 1) / max(total, 1)
    weight = 1 / ((1 - smoothing) * share + smoothing)
    corrupted = [MASK if i in masked else inputs[i] for i in range(length)]
    if target == "in_place":
        return corrupted, inputs, [weight if i in masked else 0 for i in range(length)]
    weights = [1 if i in last else weight if i + 1 in masked else 0 for i in range(length)]
    if not exact:
        weights[-1] = weight
    return corrupted, targets, weights


@quick
@given(batch=batches, target=st.sampled_from(["next", "in_place"]), exact=st.booleans())
def test_uniform_corruption_and_its_loss_are_those_of_a_plain_loop(batch, target, exact):
    texts, noise = batch
    example = corrupt(texts, noise, target=target, exact=exact)
    rows, length = example.input_ids.shape
    logits = torch.randn(rows, length, VOCABULARY, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for b in range(rows):
        chance = noise.rate[b].item(), noise.rounding[b].item(), noise.order[b].tolist()
        row = [part[b].tolist() for part in vars(texts).values()]
        inputs, targets, weights = by_hand(row, chance, 1e-4, target, exact)
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


@quick
@given(batch=batches, target=st.sampled_from(["next", "in_place"]))
def test_exact_weights_add_up_to_the_number_of_what_can_be_scored(batch, target):
    """Whatever is masked; and nothing is masked that nothing predicts."""
    texts, noise = batch
    example = corrupt(texts, noise, target=target, exact=True)
    for b, documents in enumerate(texts.document_ids.tolist()):
        inputs, weights = texts.inputs[b].tolist(), example.weights[b].tolist()
        masked = {i for i, token in enumerate(example.input_ids[b].tolist()) if token != inputs[i]}
        if target == "in_place":
            assert {i for i, weight in enumerate(weights) if weight} == masked
            assert sum(weights) == pytest.approx(sum(token > 4 for token in inputs))
            continue
        last = are_last(documents)
        assert {i for i, weight in enumerate(weights) if weight} == {
            *last,
            *(i - 1 for i in masked),
        }
        scored = [i in last or texts.targets[b, i] != UNKNOWN for i in range(len(documents))]
        assert sum(weights) == pytest.approx(sum(scored))


@given(batch=batches, seed=st.integers(0, 99))
def test_positions_are_those_of_the_smallest_numbers(batch, seed):
    special = batch[0].inputs < 7
    noise = masking_noise(seed, "corruption", 0, range(len(special)), special.shape[1])
    total = torch.full((len(special),), special.shape[1])
    chosen = choose_positions(special, noise, total)
    for row, is_special, order, rate, rounding in zip(
        chosen, special, noise.order.tolist(), noise.rate, noise.rounding, strict=True
    ):
        count = max(1, int(len(order) * rate + rounding))
        ordinary = [i for i in range(len(order)) if not is_special[i]]
        expected = sorted(sorted(ordinary, key=lambda i: order[i])[:count])
        assert row.nonzero()[:, 0].tolist() == expected


def test_a_worked_example():
    # T = 4, <s> first; u = 0.6 and u' = 0.5 give floor(2.9) = 2 masked tokens, the smallest first.
    texts = one_document([[BEGIN, 10, 11, 12]], [13])
    noise = MaskingNoise(
        torch.tensor([0.6]), torch.tensor([0.5]), torch.tensor([[0.0, 0.9, 0.2, 0.1]])
    )
    example = corrupt(texts, noise, UNSMOOTHED)
    assert example.input_ids.tolist() == [[BEGIN, 10, MASK, MASK]]
    assert example.targets.tolist() == [[10, 11, 12, 13]]
    assert example.weights.tolist() == [[0.0, 2.0, 2.0, 2.0]]
    in_place = corrupt(texts, noise, UNSMOOTHED, target="in_place")
    assert in_place.targets.tolist() == [[BEGIN, 10, 11, 12]]
    assert in_place.weights.tolist() == [[0.0, 0.0, 2.0, 2.0]]


def test_a_worked_example_of_two_documents():
    # The row goes on with a document, and ends in the middle of the next one.
    texts = Texts(
        torch.tensor([[10, 11, 12, BEGIN, 13, 14]]),
        torch.tensor([[11, 12, END, 13, 14, 15]]),
        torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.int32),
    )
    order = torch.tensor([[0.1, 0.5, 0.2, 0.0, 0.3, 0.4]])
    # floor(6 · 0.5 + 0.5) = 3 of T = 6: x_0 among them, which nothing predicts.
    noise = MaskingNoise(torch.tensor([0.5]), torch.tensor([0.5]), order)
    example = corrupt(texts, noise, UNSMOOTHED)
    assert example.input_ids.tolist() == [[MASK, 11, MASK, BEGIN, MASK, 14]]
    assert torch.equal(example.targets, texts.targets)
    assert example.weights.tolist() == [[0, 2, 1, 2, 0, 2]]
    # Of the 4 that something predicts, floor(4 · 0.5 + 1) = 3; </s> and the last count once.
    noise = MaskingNoise(torch.tensor([0.5]), torch.tensor([1.0]), order)
    exact = corrupt(texts, noise, exact=True)
    assert exact.input_ids.tolist() == [[10, 11, MASK, BEGIN, MASK, MASK]]
    third = pytest.approx(4 / 3)
    assert exact.weights.tolist() == [[0, third, 1, third, third, 1]]


def test_rates_and_weights_at_the_ends():
    texts = ordinary_texts(2, 8)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    noise = MaskingNoise(ends, ends, torch.arange(16.0).reshape(2, 8))
    example = corrupt(texts, noise)
    # Never none, never more than all.
    assert (example.input_ids == MASK).sum(dim=1).tolist() == [1, 8]
    # x_0 is masked in the first row, but nothing predicts it: only the last position is scored.
    assert example.weights[0].tolist() == pytest.approx([0] * 7 + [1 / (0.9999 / 8 + 1e-4)])
    assert example.weights[1].tolist() == [1] * 8


def test_a_row_of_special_tokens_stays_finite():
    texts = one_document([[UNKNOWN] * 8], [UNKNOWN])
    example = corrupt(texts, noise_of(1, 8), UNSMOOTHED)
    assert torch.equal(example.input_ids, texts.inputs)
    assert example.weights.tolist() == [[0.0] * 7 + [8.0]]
    exact = corrupt(texts, noise_of(1, 8), exact=True)
    assert torch.equal(exact.input_ids, texts.inputs)
    assert exact.weights.tolist() == [[0.0] * 7 + [1.0]]
    in_place = corrupt(texts, noise_of(1, 8), target="in_place", exact=True)
    assert in_place.weights.tolist() == [[0.0] * 8]


@quick
@given(batch=batches, corruption=st.sampled_from([UNIFORM, SPAN]), exact=st.booleans())
def test_special_tokens_are_never_touched_nor_made(batch, corruption, exact):
    texts, noise = batch
    example = corrupt(texts, noise, corruption, exact=exact and corruption is UNIFORM)
    special = texts.inputs < 5
    assert torch.equal(example.input_ids[special], texts.inputs[special])
    changed = example.input_ids[~special]
    assert ((changed >= 5) | (changed == MASK)).all() and (changed < VOCABULARY).all()


@quick
@given(
    batch=batches,
    corruption=st.sampled_from([UNIFORM, SPAN]),
    exact=st.booleans(),
    choice=st.integers(0, 10_000),
)
def test_the_true_id_of_a_hidden_token_shows_only_in_its_own_target(
    batch, corruption, exact, choice
):
    """Of a masked one, and of a document's last, which is no input."""
    texts, noise = batch
    options = {"corruption": corruption, "exact": exact and corruption is UNIFORM}
    before = corrupt(texts, noise, **options)
    masked = (before.input_ids == MASK) & (texts.inputs != MASK)
    masked = [(b, i, True) for b, i in masked.nonzero().tolist()]
    hidden = hidden_targets(texts.document_ids)
    places = masked + [(b, i, False) for b, i in hidden.nonzero().tolist()]
    b, i, is_input = places[choice % len(places)]
    inputs, targets = texts.inputs.clone(), texts.targets.clone()
    if is_input:
        inputs[b, i] = 5 + (inputs[b, i] - 4) % (VOCABULARY - 5)
        assert inputs[b, i] != texts.inputs[b, i]
        i = i - 1 if i and not hidden[b, i - 1] else None
    if i is not None:
        targets[b, i] = inputs[b, i + 1] if is_input else (targets[b, i] - 4) % 30 + 5
        assert targets[b, i] != texts.targets[b, i]
    after = corrupt(Texts(inputs, targets, texts.document_ids), noise, **options)
    assert torch.equal(after.input_ids, before.input_ids)
    assert torch.equal(after.weights, before.weights)
    assert (after.targets != before.targets).nonzero().tolist() == ([] if i is None else [[b, i]])


# Span corruption


@quick
@given(batch=batches, target=st.sampled_from(["next", "in_place"]))
def test_spans_reach_their_rate_and_no_further_than_one_span(batch, target):
    texts, noise = batch
    everything = SpanCorruption(name="span", random_share=0, keep_share=0)
    example = corrupt(texts, noise, everything, target=target)
    length = example.input_ids.shape[1]
    for b, inputs in enumerate(example.input_ids.tolist()):
        row, last = texts.inputs[b].tolist(), are_last(texts.document_ids[b].tolist())
        ordinary = sum(token not in SPECIAL for token in row)
        masked = [i for i in range(length) if inputs[i] != row[i]]
        wanted = max(1, math.floor(length * noise.rate[b].item() + noise.rounding[b].item()))
        assert min(wanted, ordinary) <= len(masked) <= wanted + 2
        scored = {*masked} if target == "in_place" else {*last, *(i - 1 for i in masked if i)}
        weights = example.weights[b].tolist()
        assert {i for i in range(length) if weights[i]} == scored
        if scored:
            assert weights == pytest.approx(
                [length / len(scored) * (i in scored) for i in range(length)]
            )


def test_span_lengths_are_one_to_three_and_fates_eighty_ten_ten():
    count, length = 64, 512
    texts = ordinary_texts(count, length)
    noise = at_rate(0.2, noise_of(count, length, spans=True))
    example = corrupt(texts, noise, SPAN, target="in_place")
    inputs, true = example.input_ids, texts.inputs
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
    rare = corrupt(texts, at_rate(0.015, noise), everything)
    runs = Counter()
    for row in (rare.input_ids == MASK).int().tolist():
        runs.update(len(run) for run in "".join(map(str, row)).split("0") if run)
    assert runs[1] > 60 and runs[2] > 60 and runs[3] > 60
    assert sum(runs[k] for k in (1, 2, 3)) > 0.95 * sum(runs.values())


def test_what_spans_need_is_asked_for():
    texts = packed_texts(1, 8)
    with pytest.raises(ValueError, match="spans=True"):
        corrupt(texts, noise_of(1, 8), SPAN)
    with pytest.raises(ValueError, match="uniform corruption"):
        corrupt(texts, noise_of(1, 8, spans=True), SPAN, exact=True)


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
    texts = ordinary_texts(1, 64)
    masks = {
        tuple(corrupt(texts, masking_noise(0, "corruption", 1, [i], 64)).input_ids[0].tolist())
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
    # With the number of tokens a divisor of N, every number of masked ones comes up equally often.
    masked = corrupt(ordinary_texts(64, 17), validation_noise(5, range(64), 64, 17), exact=True)
    masked = masked.input_ids == MASK
    assert Counter(masked.sum(dim=1).tolist()) == Counter({k: 4 for k in range(1, 17)})


# Examples


def test_an_example_moves_to_a_device_but_its_documents_stay_for_the_planning_of_attention():
    example = corrupt(packed_texts(2, 8), noise_of(2, 8))
    moved = example.to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.targets, moved.weights)} == {"meta"}
    assert moved.document_ids is example.document_ids and moved.attention == "full"
    assert example.input_ids.dtype == example.targets.dtype == torch.int64
    assert example.weights.dtype == torch.float32


@pytest.mark.gpu
def test_an_example_arrives_whole_on_the_gpu():
    example = corrupt(packed_texts(2, 8), noise_of(2, 8))
    moved = example.to("cuda")
    assert moved.input_ids.is_cuda and moved.targets.is_cuda and moved.weights.is_cuda
    assert torch.equal(moved.input_ids.cpu(), example.input_ids)
    assert torch.equal(moved.weights.cpu(), example.weights)
    assert not moved.document_ids.is_cuda
