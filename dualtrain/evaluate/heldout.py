"""Held-out losses in all three modes: the same text and the same masks at every evaluation.

``train`` calls :func:`held_out_losses` on all ranks at once. The result does not depend on their
number: sequences are scored in the same micro-batches whoever scores them, and what the ranks
exchange are the losses of single sequences.

The diffusion loss bounds the negative log-likelihood from above, in expectation over masks: uniform
corruption whatever the training's, and without the published scheme's small deviations from the
bound (``objectives.diffusion(exact=True)``).

Prefix mode: of each document, as far as a sequence holds it, the first half is a prompt whose
tokens all see each other; the second half is scored causally after it. All documents of a sequence
at once, at the positions of training. Second halves are easier to predict than whole documents, so
the figure to compare with is the AR loss of the very same tokens, which comes along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dualtrain.data.batches import Batch
from dualtrain.evaluate.mode import inference
from dualtrain.model import (
    AttentionPlan,
    DualOutput,
    plan_attention,
    select_positions,
    to_device,
)
from dualtrain.objectives import Example, autoregressive, diffusion, validation_noise
from dualtrain.progress.metrics import EvalRecord
from dualtrain.recipe.schema import UniformCorruption

_CORRUPTION = UniformCorruption()


class HeldOutSequences(Protocol):
    """What is asked of ``data.ValidationData``."""

    bytes_per_token: float

    def __len__(self) -> int: ...

    def batch(self, first: int, count: int) -> Batch: ...


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Losses on held-out text, the same on every rank.

    Attributes:
        ar_nll: Nats per token, every position scored.
        ar_bits_per_byte: ``ar_nll`` / (ln 2 · bytes per token).
        ar_error: Standard error of ``ar_nll`` over sequences.
        diffusion_nll: Nats per token, an upper bound in expectation over masks.
        diffusion_bits_per_byte: ``diffusion_nll`` / (ln 2 · bytes per token).
        diffusion_error: Standard error of ``diffusion_nll`` over sequences; an overestimate, since
            the rates of the sequences are spread rather than independent.
        prefix_nll: Nats per token of the documents' second halves, each after its first half read
            bidirectionally; nan where no document has two tokens.
        prefix_bits_per_byte: ``prefix_nll`` / (ln 2 · bytes per token), with the bytes that a token
            of the whole split has on average: how many these tokens have is not known.
        prefix_error: Standard error of ``prefix_nll`` over sequences.
        ar_nll_same_tokens: AR loss of the tokens that ``prefix_nll`` is the mean of.
        prefix_minus_ar_error: Standard error over sequences of the paired difference,
            ``prefix_nll`` - ``ar_nll_same_tokens``.
        prefix_tokens: How many tokens these are.
        sequences: Number of sequences.
        tokens: Tokens of them, ``<s>`` included.
    """

    ar_nll: float
    ar_bits_per_byte: float
    ar_error: float
    diffusion_nll: float
    diffusion_bits_per_byte: float
    diffusion_error: float
    prefix_nll: float
    prefix_bits_per_byte: float
    prefix_error: float
    ar_nll_same_tokens: float
    prefix_minus_ar_error: float
    prefix_tokens: int
    sequences: int
    tokens: int

    def record(self, step: int, elapsed_s: float) -> EvalRecord:
        """Make the record of ``metrics.jsonl``."""
        return EvalRecord(
            kind="eval",
            step=step,
            ar_nll=self.ar_nll,
            ar_bits_per_byte=self.ar_bits_per_byte,
            ar_error=self.ar_error,
            diffusion_nll=self.diffusion_nll,
            diffusion_bits_per_byte=self.diffusion_bits_per_byte,
            diffusion_error=self.diffusion_error,
            prefix_nll=self.prefix_nll,
            prefix_bits_per_byte=self.prefix_bits_per_byte,
            prefix_error=self.prefix_error,
            ar_nll_same_tokens=self.ar_nll_same_tokens,
            prefix_minus_ar_error=self.prefix_minus_ar_error,
            prefix_tokens=self.prefix_tokens,
            tokens=self.tokens,
            elapsed_s=elapsed_s,
        )

    def metrics(self) -> dict[str, float]:
        """Return the losses by name, for algorithms."""
        return {
            "ar_nll": self.ar_nll,
            "ar_bits_per_byte": self.ar_bits_per_byte,
            "diffusion_nll": self.diffusion_nll,
            "diffusion_bits_per_byte": self.diffusion_bits_per_byte,
            "prefix_nll": self.prefix_nll,
            "prefix_bits_per_byte": self.prefix_bits_per_byte,
            "ar_nll_same_tokens": self.ar_nll_same_tokens,
        }


def held_out_losses(
    forward: Callable[..., DualOutput],
    validation: HeldOutSequences,
    *,
    micro_batch: int,
    mask_id: int,
    special_ids: Sequence[int],
    target: Literal["next", "in_place"] = "next",
    seed: int = 0,
    sequences: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    backend: str = "sdpa",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HeldOut:
    """Score held-out sequences in all three modes. Called by all ranks at once.

    Args:
        forward: The DeepSpeed engine, or a ``DualLM``; put in evaluation mode and back.
        validation: The held-out sequences.
        micro_batch: Sequences of a forward pass. Every rank makes the same number of passes, of
            the same shape, as ZeRO-3 and compiled models want it.
        mask_id: The token that replaces a masked one.
        special_ids: Tokens that are never masked.
        target: What the diffusion objective was trained to predict at i: i+1, or i.
        seed: Of the masks. The same for runs that are to be compared.
        sequences: At most that many, from the first on; ``None`` takes all.
        rank: This process.
        world_size: All processes; more than one needs ``torch.distributed``.
        backend: Attention backend.
        device: Where the model is.
        dtype: Compute type of the attention.
    """
    count = len(validation) if sequences is None else min(sequences, len(validation))
    batches = -(-count // micro_batch)
    # Rows: nats per token of AR and diffusion; nats of the second halves in prefix mode and in AR;
    # tokens of the second halves.
    losses = torch.zeros(5, count, dtype=torch.float64)
    length = 0
    with inference(forward):
        for turn in range(-(-batches // world_size)):
            number = turn * world_size + rank
            # A rank without a batch left goes through the first one again, for the others' sake.
            first = number * micro_batch if number < batches else 0
            batch = validation.batch(first, min(micro_batch, count - first))
            rows, length = batch.document_ids.shape
            examples = _examples(batch, micro_batch, seed, count, mask_id, special_ids, target)
            nlls = [_token_losses(forward, e, backend, device, dtype) for e in examples]
            if number < batches:
                losses[:, first : first + rows] = _sequence_losses(examples, nlls)[:, :rows]
    if world_size > 1:
        losses = _sum_over_ranks(losses, device)
    ar, diffused, prefix, same, tokens = losses
    ar_nll, ar_error = _mean_and_error(ar, torch.ones_like(ar))
    diffusion_nll, diffusion_error = _mean_and_error(diffused, torch.ones_like(diffused))
    prefix_nll, prefix_error = _mean_and_error(prefix, tokens)
    bits = 1 / (math.log(2) * validation.bytes_per_token)
    return HeldOut(
        ar_nll=ar_nll,
        ar_bits_per_byte=ar_nll * bits,
        ar_error=ar_error,
        diffusion_nll=diffusion_nll,
        diffusion_bits_per_byte=diffusion_nll * bits,
        diffusion_error=diffusion_error,
        prefix_nll=prefix_nll,
        prefix_bits_per_byte=prefix_nll * bits,
        prefix_error=prefix_error,
        ar_nll_same_tokens=_mean_and_error(same, tokens)[0],
        prefix_minus_ar_error=_mean_and_error(prefix - same, tokens)[1],
        prefix_tokens=int(tokens.sum()),
        sequences=count,
        tokens=count * length,
    )


@dataclass(frozen=True)
class DocumentLosses:
    """Losses of each held-out document, as far as it is scored; all arrays are (D,).

    Attributes:
        documents: int64, numbers in the dataset's held-out split.
        tokens: float64, scored by AR and diffusion.
        ar: float64, nats.
        diffusion: float64, nats, an upper bound in expectation over masks.
        prefix_tokens: float64, tokens in the documents' second halves.
        prefix: float64, nats of those in prefix mode.
        ar_same_tokens: float64, nats of the same tokens in AR.
    """

    documents: NDArray[np.int64]
    tokens: NDArray[np.float64]
    ar: NDArray[np.float64]
    diffusion: NDArray[np.float64]
    prefix_tokens: NDArray[np.float64]
    prefix: NDArray[np.float64]
    ar_same_tokens: NDArray[np.float64]


def document_losses(
    forward: Callable[..., DualOutput],
    validation: HeldOutSequences,
    *,
    micro_batch: int,
    mask_id: int,
    special_ids: Sequence[int],
    target: Literal["next", "in_place"] = "next",
    seed: int = 0,
    backend: str = "sdpa",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DocumentLosses:
    """Score held-out sequences as :func:`held_out_losses` does, and add up by document.

    One process; arguments as there. What differs between documents decides how sure a difference
    between models is, so these are what a bootstrap draws from.
    """
    count = len(validation)
    columns: list[Tensor] = []
    numbers: list[Tensor] = []
    with inference(forward):
        for first in range(0, count, micro_batch):
            batch = validation.batch(first, min(micro_batch, count - first))
            rows = len(batch.document_ids)
            examples = _examples(batch, micro_batch, seed, count, mask_id, special_ids, target)
            nlls = [_token_losses(forward, e, backend, device, dtype)[:rows] for e in examples]
            second = examples[2].weights[:rows].double()
            ar, diffused = (n * e.weights[:rows] for n, e in zip(nlls, examples[:2], strict=False))
            parts = [torch.ones_like(ar), ar, diffused, second, nlls[2] * second, ar * second]
            columns.append(torch.stack(parts).flatten(1))
            numbers.append(
                torch.cat(
                    [
                        torch.tensor(documents)[ids.long()]
                        for documents, ids in zip(batch.documents, batch.document_ids, strict=True)
                    ]
                )
            )
    documents, places = torch.cat(numbers).unique(return_inverse=True)
    sums = torch.zeros(6, len(documents), dtype=torch.float64)
    sums.index_add_(1, places, torch.cat(columns, dim=1).double())
    return DocumentLosses(documents.numpy(), *sums.numpy())


def second_halves(document_ids: Tensor) -> Tensor:
    """Tell which positions lie in the second half of their document.

    Args:
        document_ids: (B, T) integers, equal within a document; what a row holds of a document
            counts as the whole of it.

    Returns:
        (B, T) bool; of n tokens the last n // 2.
    """
    length = document_ids.shape[1]
    index = torch.arange(length)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    is_last = torch.cat([is_first[:, 1:], torch.ones_like(is_first[:, :1])], dim=1)
    begin = torch.where(is_first, index, 0).cummax(1).values
    end = torch.where(is_last, index, length).flip(1).cummin(1).values.flip(1)
    return index - begin >= (end - begin + 2) // 2


def _examples(
    batch: Batch,
    micro_batch: int,
    seed: int,
    sequences: int,
    mask_id: int,
    special_ids: Sequence[int],
    target: Literal["next", "in_place"],
) -> tuple[Example, Example, Example]:
    """Make the examples of AR, diffusion and prefix, filled up with rows that count nothing."""
    length = batch.document_ids.shape[1]
    noise = validation_noise(seed, batch.sequence_ids, sequences, length)
    ar = autoregressive(batch.tokens, batch.document_ids)
    second = second_halves(batch.document_ids)
    # The first token of a second half is predicted by the last one of the prompt.
    weights = F.pad(second[:, 1:].float(), (0, 1))
    examples = (
        ar,
        diffusion(
            batch.tokens,
            batch.document_ids,
            mask_id=mask_id,
            special_ids=special_ids,
            noise=noise,
            corruption=_CORRUPTION,
            target=target,
            exact=True,
        ),
        replace(ar, weights=weights, attention="prefix"),
    )
    missing = micro_batch - len(batch.document_ids)
    ar, diffused, prefix = (_fill(example, missing) for example in examples)
    return ar, diffused, prefix


def _fill(example: Example, rows: int) -> Example:
    if not rows:
        return example

    def fill(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0, 0, rows))

    return Example(
        fill(example.input_ids),
        fill(example.targets),
        fill(example.weights),
        example.attention,
        fill(example.document_ids),
    )


def _token_losses(
    forward: Callable[..., DualOutput],
    example: Example,
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """Return each position's cross-entropy, 0 where the weight is: (B, T) float64 on the CPU."""
    device = torch.device(device)
    plan = _plan(example, backend, device, dtype)
    selection = select_positions(example.weights)
    moved = example.to(device)
    output = forward(
        moved.input_ids,
        attention=plan,
        targets=moved.targets,
        weights=moved.weights,
        selection=None if selection is None else to_device(selection, device),
        reduction="none",
    )
    assert output.nll is not None  # reduction="none" asks for it
    return output.nll.cpu().double()


def _plan(
    example: Example, backend: str, device: torch.device, dtype: torch.dtype
) -> AttentionPlan:
    documents = example.document_ids
    return plan_attention(
        example.attention,
        documents,
        backend=backend,
        device=device,
        dtype=dtype,
        in_prefix=~second_halves(documents) if example.attention == "prefix" else None,
    )


def _sequence_losses(examples: Sequence[Example], nlls: Sequence[Tensor]) -> Tensor:
    """Sum up the rows of AR, diffusion and prefix: (5, B), as :func:`held_out_losses` keeps them.

    Args:
        examples: Of the three modes.
        nlls: Of each, (B, T) float64 cross-entropies.
    """
    (ar, diffused, prefix), second = nlls, examples[2].weights.double()
    return torch.stack(
        [
            (ar * examples[0].weights).mean(1),
            (diffused * examples[1].weights).mean(1),
            (prefix * second).sum(1),
            (ar * second).sum(1),
            second.sum(1),
        ]
    )


def _sum_over_ranks(losses: Tensor, device: torch.device | str) -> Tensor:
    # One rank's number and zeros: the sum is exact, whatever the order of the additions.
    shared = losses.to(device)
    dist.all_reduce(shared)
    return shared.cpu()


def _mean_and_error(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """Return Σ sums / Σ counts over sequences and its standard error, 0 for a single sequence.

    The error of a ratio of two means, by linearisation; for equal counts it is that of the mean.
    """
    mean, number = sums.sum() / counts.sum(), len(sums)
    if number < 2:
        return float(mean), 0.0
    spread = (sums - mean * counts).square().sum() * number / (number - 1)
    return float(mean), float(spread.sqrt() / counts.sum())
