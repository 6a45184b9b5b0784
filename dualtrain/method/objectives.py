"""Both objectives: from clean sequences to what the model is given and scored on.

Shapes: B sequences of T positions, each with an input and, as its target, the next token of the
same document; position i predicts it in both objectives (masked next-token prediction). An
:class:`Example` carries the weights w of the loss, in nats per token::

    loss = sum over b, i of w[b, i] * cross_entropy[b, i] / (B * T)

What is scored is the same in AR, diffusion and prefix mode, in training and in evaluation
(:func:`scored_targets`): every token of a document but its ``<s>``, ``</s>`` included where
documents end with one. ``<s>`` begins a document and is never predicted. Nor is ``<unk>``, which is
never masked, where it is an input.

``autoregressive`` leaves the input clean and weighs every target alike. ``diffusion`` masks some
inputs and scores the positions that predict them. The last token that a row has of a document is
no input of it, so it is always hidden, and always scored (:func:`hidden_targets`). Chance comes in
as a :class:`MaskingNoise`, drawn by absolute sequence index, so that a sequence is masked alike
wherever and whenever it is trained.

What the uniform corruption estimates, for a row of T inputs, M of them ordinary. The bound on the
negative log-likelihood, t ~ U(0, 1) with weight 1/t, is m_1 + ... + m_M, where m_k is the mean
cross-entropy of a masked token over all sets of k masked ones; on top comes that of each hidden
target, at weight 1, predicted while k of the others are masked, k uniform in 1..M: nearly as if its
turn among all came at random. The published fixed-count scheme, k = max(1, floor(T·u + u')) but at
most M, with p = k/T and weight 1/p, has the expectation T·(P(1)·m_1 + ... + P(M)·m_M) with
P(k) = 1/T, except 3/(2T) for k = 1 and (T - M + 1/2)/T for k = M. Smoothing multiplies m_k by
1 / (1 + s·(1 - p)/p). The row's last target counts about ln T + 1 times, at the weight of the
others. A masked token that nothing in its row predicts is not scored. Training does all that as
published; the released code scores no hidden target before the row's end. Held-out losses are to
be bounds on what AR scores: ``exact=True``, with the rounding of :func:`validation_noise`, has none
of these deviations, masks only what is predicted, and its weights add up to the number of scored
targets, whatever is masked (``in_place``: of ordinary inputs).

At one rate for all rows (:func:`with_scheduled_rate`) weights of 1/p make a row's loss the mean
cross-entropy of its k masked tokens, m_k, up to the smoothing and the hidden targets: the usual
masked language model, on the scale of the AR loss at any rate, but a bound of nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dualtrain.common.randomness import generator
from dualtrain.common.vocabulary import Vocabulary

if TYPE_CHECKING:
    from dualtrain.recipe.schema import RateSchedule, SpanCorruption, UniformCorruption

    Corruption = UniformCorruption | SpanCorruption

Attention = Literal["causal", "full", "prefix"]


@dataclass
class Example:
    """What the model is given for one micro-batch.

    Attributes:
        input_ids: (B, T) int64.
        targets: (B, T) int64; the true token also where the weight is 0.
        weights: (B, T) float32; loss = Σ w·CE / (B·T).
        attention: Which positions see which, always within a document.
        document_ids: (B, T) int32, the document of each position within its row, or 0 for all if
            attention is not to end at their borders. Stays on the CPU, where it is planned.
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor
    attention: Attention
    document_ids: Tensor

    def to(self, device: torch.device | str) -> Example:
        """The same example with inputs, targets and weights on a device, without waiting for it."""
        device = torch.device(device)
        moved = [self.input_ids, self.targets, self.weights]
        if device.type == "cuda":
            # From pageable memory the copy would wait for everything queued on the device.
            moved = [tensor.pin_memory() for tensor in moved]
        inputs, targets, weights = (tensor.to(device, non_blocking=True) for tensor in moved)
        return replace(self, input_ids=inputs, targets=targets, weights=weights)


@dataclass(frozen=True)
class MaskingNoise:
    """The uniform numbers of [0, 1) that decide the corruption of B sequences.

    Attributes:
        rate: (B,) float64: u, the share of tokens to mask; each row's own as drawn.
        rounding: (B,) float64: u', rounds T·u to a whole number.
        order: (B, T) float64: positions, or spans, are masked in increasing order.
        spans: (3, B, T) float64, for span corruption only: span lengths, replacements by span, and
            random tokens.
    """

    rate: Tensor
    rounding: Tensor
    order: Tensor
    spans: Tensor | None = None


def masking_noise(
    seed: int,
    purpose: str,
    stream: int,
    sequence_ids: Sequence[int] | Tensor,
    length: int,
    *,
    spans: bool = False,
) -> MaskingNoise:
    """Draw the noise of each sequence from the generator of (seed, purpose, stream, sequence).

    Args:
        stream: Number of the stream, from ``mixing.STREAM_NUMBERS``.
    """
    rows = [
        generator(seed, purpose, stream, int(sequence)).random(2 + (4 if spans else 1) * length)
        for sequence in sequence_ids
    ]
    numbers = torch.from_numpy(np.stack(rows))
    further = numbers[:, 2 + length :].reshape(len(rows), -1, length).movedim(1, 0)
    return MaskingNoise(
        rate=numbers[:, 0],
        rounding=numbers[:, 1],
        order=numbers[:, 2 : 2 + length],
        spans=further if spans else None,
    )


def with_scheduled_rate(
    noise: MaskingNoise, schedule: RateSchedule, step: int, steps: int
) -> MaskingNoise:
    """Give all rows the rate of a step, start + (end - start)·n / N, in place of their own.

    That is GPT-BERT's formula: the first step has exactly `start`; `end` belongs to step N, which a
    run of N steps does not come to.
    """
    rate = schedule.start + (schedule.end - schedule.start) * step / steps
    return replace(noise, rate=torch.full_like(noise.rate, rate))


def validation_noise(
    seed: int,
    sequence_ids: Sequence[int] | Tensor,
    sequences: int,
    length: int,
    *,
    spans: bool = False,
) -> MaskingNoise:
    """Draw noise for held-out sequences: always the same, and with evenly spread rates.

    The N sequences share out [0, 1) in N strata, in an order that has nothing to do with the text:
    their mean loss varies less than with independent rates. Rounding up gives all numbers of
    masked tokens the same chance.

    Args:
        sequence_ids: (B,) which of the held-out sequences.
        sequences: N, all held-out sequences that are scored.
    """
    noise = masking_noise(seed, "validation", 0, sequence_ids, length, spans=spans)
    strata = generator(seed, "validation strata", sequences).permutation(sequences)
    chosen = torch.from_numpy(strata[np.asarray(sequence_ids, dtype=np.int64)])
    rate = (chosen + noise.rate) / sequences
    return replace(noise, rate=rate, rounding=torch.ones_like(rate))


def hidden_targets(document_ids: Tensor) -> Tensor:
    """Tell which positions have a target that is no input of their row: a document's last ones."""
    hidden = torch.ones_like(document_ids, dtype=torch.bool)
    hidden[:, :-1] = document_ids[:, 1:] != document_ids[:, :-1]
    return hidden


def scored_targets(inputs: Tensor, document_ids: Tensor, special_ids: Sequence[int]) -> Tensor:
    """Tell which targets are scored, in every mode: all but an ``<unk>`` that is an input, too."""
    return hidden_targets(document_ids) | _following(~_is_special(inputs, special_ids))


class CleanBatch(Protocol):
    """Sequences as they stand in the text; ``data.Batch`` is one."""

    inputs: Tensor
    targets: Tensor
    document_ids: Tensor

    @property
    def context_ids(self) -> Tensor: ...


def autoregressive(batch: CleanBatch, vocabulary: Vocabulary, *, ar_weight: float = 1.0) -> Example:
    """Make the example of the autoregressive objective: clean inputs, every target scored."""
    scored = scored_targets(batch.inputs, batch.document_ids, vocabulary.special_ids)
    return Example(
        batch.inputs, batch.targets, ar_weight * scored.float(), "causal", batch.context_ids
    )


def diffusion(
    batch: CleanBatch,
    vocabulary: Vocabulary,
    noise: MaskingNoise,
    corruption: Corruption,
    *,
    target: Literal["next", "in_place"] = "next",
    exact: bool = False,
) -> Example:
    """Make the example of the diffusion objective: some inputs masked, their prediction scored.

    With ``next``, position i is scored iff its target is input i+1 and that was chosen, or if its
    target is hidden. With ``in_place``, position i is scored iff input i was chosen, and predicts
    that.

    A position that predicts a chosen token weighs 1 / ((1 - s)·p + s), where p is the share of the
    row's T tokens that were chosen, and s the smoothing (uniform corruption); so does the row's
    last one, and those of other hidden targets weigh 1. With spans, each row's scored positions
    weigh the same, T in all: its loss is their mean cross-entropy, on the scale of the AR loss.

    Args:
        noise: Of these B sequences and T positions; the rates are in it.
        exact: Estimate the bound without the deviations of the published scheme (see the
            module). For held-out losses; uniform corruption only.
    """
    inputs, hidden = batch.inputs, hidden_targets(batch.document_ids)
    special = _is_special(inputs, vocabulary.special_ids)
    if exact and target == "next":
        special = special | _preceding(hidden)  # nothing predicts a document's first input
    if corruption.name == "uniform":
        total = (~special).sum(dim=1) if exact else torch.full(special.shape[:1], special.shape[1])
        chosen = choose_positions(special, noise, total)
        corrupted = inputs.masked_fill(chosen, vocabulary.mask_id)
        weight = _inverse_rate(chosen, total, 0.0 if exact else corruption.smoothing)
    else:
        if exact:
            raise ValueError("the bound is for uniform corruption")
        chosen, span = choose_spans(special, noise, corruption)
        corrupted = _replace_spans(inputs, chosen, span, noise, corruption, vocabulary)
        weight = None
    scored = chosen if target == "in_place" else _following(chosen)
    if weight is None:
        scored = scored | hidden if target == "next" else scored
        weights = scored * (scored.shape[1] / scored.sum(dim=1, keepdim=True).clamp(min=1))
    else:
        weights = scored * weight
        if target == "next":
            weights[hidden] = 1.0
            if not exact:
                weights[:, -1:] = weight
    goal = batch.targets if target == "next" else inputs
    return Example(corrupted, goal, weights.float(), "full", batch.context_ids)


def _is_special(inputs: Tensor, special_ids: Sequence[int]) -> Tensor:
    # A table: isin compares every input with every id.
    table = np.zeros(max(int(inputs.max()), *special_ids, 0) + 1, dtype=bool)
    table[list(special_ids)] = True
    return torch.from_numpy(table[inputs.numpy()])


def _following(marks: Tensor) -> Tensor:
    """(B, T) bool: at each position the mark of the next one; False at the last."""
    return torch.cat([marks[:, 1:], torch.zeros_like(marks[:, :1])], dim=1)


def _preceding(marks: Tensor) -> Tensor:
    """(B, T) bool: at each position the mark of the one before; True at the first."""
    return torch.cat([torch.ones_like(marks[:, :1]), marks[:, :-1]], dim=1)


def choose_positions(special: Tensor, noise: MaskingNoise, total: Tensor) -> Tensor:
    """Choose k = max(1, floor(total·u + u')) positions of each row, or all ordinary ones if fewer.

    Args:
        total: (B,) int64, the number of tokens that the rate is a share of.
    """
    count = _count(noise, total)
    order = noise.order.masked_fill(special, torch.inf)
    # numpy sorts ten times as fast as torch does on a CPU.
    last = np.take_along_axis(np.sort(order.numpy(), axis=1), count.numpy()[:, None] - 1, axis=1)
    return (order <= torch.from_numpy(last)) & ~special


def choose_spans(
    special: Tensor, noise: MaskingNoise, corruption: SpanCorruption
) -> tuple[Tensor, Tensor]:
    """Choose whole spans of 1..max_span tokens until their share of a row reaches its rate.

    Each row is cut into spans of random lengths. The rate is rounded as in
    :func:`choose_positions`; the last span may overshoot it. GPT-BERT also prefers tokens that it
    has chosen less often before; that takes a memory of every token, and is left out.

    Returns:
        (B, T) bool, the chosen positions; and (B, T) int64, the span that each position is in.
    """
    if noise.spans is None:
        raise ValueError("span corruption needs noise drawn with spans=True")
    length = special.shape[1]
    span_lengths = (noise.spans[0] * corruption.max_span).long() + 1
    starts = span_lengths.cumsum(dim=1) - span_lengths
    # Spans that would start beyond the row are dropped: their mark goes to a column cut off again.
    marks = torch.zeros(len(special), length + 1, dtype=torch.int64)
    marks.scatter_(1, starts.clamp(max=length), 1)
    span = marks[:, :-1].cumsum(dim=1) - 1
    order = noise.order.gather(1, span).masked_fill(special, torch.inf)
    count = _count(noise, torch.tensor(length)).clamp(max=length)
    last = order.sort(dim=1).values.gather(1, count[:, None] - 1)
    return (order <= last) & ~special, span


def _count(noise: MaskingNoise, total: Tensor) -> Tensor:
    """(B,) int64: tokens to choose, rounded at random, at least 1."""
    return (total * noise.rate + noise.rounding).floor().long().clamp(min=1)


def _inverse_rate(chosen: Tensor, total: Tensor, smoothing: float) -> Tensor:
    """(B, 1) float64: 1 / ((1 - s)·p + s) for the realised share p of each row."""
    # A row of nothing but special tokens counts as one masked token: 1/p would be infinite.
    share = chosen.sum(dim=1).clamp(min=1).double() / total.clamp(min=1)
    return (1 / ((1 - smoothing) * share + smoothing))[:, None]


def _replace_spans(
    inputs: Tensor,
    chosen: Tensor,
    span: Tensor,
    noise: MaskingNoise,
    corruption: SpanCorruption,
    vocabulary: Vocabulary,
) -> Tensor:
    """Mask the chosen spans, but give some of them random tokens and leave some as they are."""
    assert noise.spans is not None
    fate = noise.spans[1].gather(1, span)
    ordinary = torch.ones(vocabulary.size, dtype=torch.bool)
    ordinary[[i for i in vocabulary.special_ids if i < vocabulary.size]] = False
    tokens = ordinary.nonzero().squeeze(1)
    random = tokens[(noise.spans[2] * len(tokens)).long()]
    replaced = torch.where(fate < corruption.random_share, random, vocabulary.mask_id)
    kept = fate >= 1 - corruption.keep_share
    return torch.where(chosen & ~kept, replaced, inputs)
