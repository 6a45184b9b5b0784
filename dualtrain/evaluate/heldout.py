"""Held-out losses of both objectives: the same text and the same masks at every evaluation.

``train`` calls :func:`held_out_losses` on all ranks at once. The result does not depend on their
number: sequences are scored in the same micro-batches whoever scores them, and what the ranks
exchange are the losses of single sequences.

The diffusion loss bounds the negative log-likelihood from above, in expectation over masks: uniform
corruption whatever the training's, and without the published scheme's small deviations from the
bound (``objectives.diffusion(exact=True)``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dualtrain.data.batches import Batch
from dualtrain.evaluate.mode import inference
from dualtrain.model import DualOutput, plan_attention, select_positions, to_device
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
        sequences: Number of sequences.
        tokens: Tokens of them, ``<s>`` included.
    """

    ar_nll: float
    ar_bits_per_byte: float
    ar_error: float
    diffusion_nll: float
    diffusion_bits_per_byte: float
    diffusion_error: float
    sequences: int
    tokens: int

    def record(self, step: int, elapsed_s: float) -> EvalRecord:
        """Make the record of ``metrics.jsonl``."""
        return EvalRecord(
            kind="eval",
            step=step,
            ar_nll=self.ar_nll,
            ar_bits_per_byte=self.ar_bits_per_byte,
            diffusion_nll=self.diffusion_nll,
            diffusion_bits_per_byte=self.diffusion_bits_per_byte,
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
    """Score held-out sequences under both objectives. Called by all ranks at once.

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
    losses = torch.zeros(2, count, dtype=torch.float64)
    length = 0
    with inference(forward):
        for turn in range(-(-batches // world_size)):
            number = turn * world_size + rank
            # A rank without a batch left goes through the first one again, for the others' sake.
            first = number * micro_batch if number < batches else 0
            batch = validation.batch(first, min(micro_batch, count - first))
            rows, length = batch.document_ids.shape
            examples = _examples(batch, micro_batch, seed, count, mask_id, special_ids, target)
            for row, example in enumerate(examples):
                nll = _sequence_losses(forward, example, backend, device, dtype)
                if number < batches:
                    losses[row, first : first + rows] = nll[:rows]
    if world_size > 1:
        losses = _sum_over_ranks(losses, device)
    means, errors = losses.mean(1).tolist(), _standard_errors(losses)
    bits = 1 / (math.log(2) * validation.bytes_per_token)
    return HeldOut(
        ar_nll=means[0],
        ar_bits_per_byte=means[0] * bits,
        ar_error=errors[0],
        diffusion_nll=means[1],
        diffusion_bits_per_byte=means[1] * bits,
        diffusion_error=errors[1],
        sequences=count,
        tokens=count * length,
    )


def _examples(
    batch: Batch,
    micro_batch: int,
    seed: int,
    sequences: int,
    mask_id: int,
    special_ids: Sequence[int],
    target: Literal["next", "in_place"],
) -> tuple[Example, Example]:
    """Make both objectives' examples, filled up to ``micro_batch`` rows that count nothing."""
    length = batch.document_ids.shape[1]
    noise = validation_noise(seed, batch.sequence_ids, sequences, length)
    examples = (
        autoregressive(batch.tokens, batch.document_ids),
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
    )
    missing = micro_batch - len(batch.document_ids)
    return _fill(examples[0], missing), _fill(examples[1], missing)


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


def _sequence_losses(
    forward: Callable[..., DualOutput],
    example: Example,
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """Return Σ w·CE / T of each row: (B,) float64 on the CPU."""
    device = torch.device(device)
    plan = plan_attention(
        example.attention, example.document_ids, backend=backend, device=device, dtype=dtype
    )
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
    return (output.nll.cpu().double() * example.weights).mean(1)


def _sum_over_ranks(losses: Tensor, device: torch.device | str) -> Tensor:
    # One rank's number and zeros: the sum is exact, whatever the order of the additions.
    shared = losses.to(device)
    dist.all_reduce(shared)
    return shared.cpu()


def _standard_errors(losses: Tensor) -> list[float]:
    """Return the standard error of each row's mean; 0 for a single sequence."""
    count = losses.shape[1]
    if count < 2:
        return [0.0] * len(losses)
    return (losses.std(1) / math.sqrt(count)).tolist()
