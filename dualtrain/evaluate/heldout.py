"""Held-out losses in all three modes: the same text and the same masks at every evaluation.

``train`` calls :func:`held_out_losses` on all ranks at once; ``compare`` asks for
:func:`document_losses`, of which it is the sum. The result does not depend on the number of ranks:
sequences are scored in the same micro-batches whoever scores them, and what the ranks exchange are
the losses of what each sequence has of a document.

The three modes score the same targets (``objectives.scored_targets``). The diffusion loss bounds
their negative log-likelihood from above, in expectation over masks: uniform corruption whatever the
training's, and without the published scheme's small deviations from the bound
(``objectives.diffusion(exact=True)``). A model trained in place is scored on inputs instead, which
is what it predicts.

Prefix mode: of each document, as far as a sequence holds it, the first half is a prompt whose
tokens all see each other; the second half is scored causally after it. All documents of a sequence
at once, at the positions of training. Second halves are easier to predict than whole documents, so
the figure to compare with is the AR loss of the very same tokens, which comes along.

Documents are what is independent of one another, so standard errors are over documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dualtrain.data.batches import Batch, ValidationData
from dualtrain.evaluate.statistics import Floats
from dualtrain.method.objectives import (
    Example,
    MaskingNoise,
    autoregressive,
    diffusion,
    hidden_targets,
    validation_noise,
)
from dualtrain.model.handle import ModelHandle
from dualtrain.network.attention import plan_attention, to_device
from dualtrain.network.loss import select_positions
from dualtrain.progress.metrics import EvalRecord
from dualtrain.recipe.schema import UniformCorruption

_CORRUPTION = UniformCorruption()


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Losses on held-out text in nats per token, the same on every rank.

    Bits per byte are by the bytes of text that the scored tokens stand for. Errors are standard
    errors over documents, nan where there is one document only.
    """

    ar_nll: float
    ar_bits_per_byte: float
    ar_error: float
    diffusion_nll: float  # an upper bound in expectation over masks
    diffusion_bits_per_byte: float
    diffusion_error: float  # too large: rates of sequences are spread rather than independent
    prefix_nll: float  # of documents' second halves, after first halves read both ways
    prefix_bits_per_byte: float
    prefix_error: float
    ar_nll_same_tokens: float  # AR loss of the tokens that prefix_nll is the mean of
    prefix_minus_ar_error: float  # of the paired difference
    prefix_tokens: int
    documents: int  # parts of which are scored
    sequences: int
    tokens: int

    def record(self, step: int, elapsed_s: float) -> EvalRecord:
        """Make the record of ``metrics.jsonl``."""
        values: Any = {"kind": "eval", "step": step, **asdict(self), "elapsed_s": elapsed_s}
        del values["sequences"]
        return values

    def metrics(self) -> dict[str, float]:
        """Return the losses by name, for algorithms."""
        values = asdict(self).items()
        return {k: v for k, v in values if isinstance(v, float) and not k.endswith("_error")}


@dataclass(frozen=True)
class DocumentLosses:
    """Losses of each held-out document, as far as it is scored; all arrays are (D,)."""

    documents: NDArray[np.int64]  # numbers in the dataset's held-out split
    tokens: Floats  # scored by AR
    bytes: Floats  # of those tokens' text
    ar: Floats  # nats
    diffusion_tokens: Floats
    diffusion_bytes: Floats
    diffusion: Floats  # nats, an upper bound in expectation over masks
    prefix_tokens: Floats  # in the documents' second halves
    prefix_bytes: Floats
    prefix: Floats  # nats of those tokens in prefix mode
    ar_same_tokens: Floats  # nats of the same tokens in AR


def held_out_losses(
    model: ModelHandle, validation: ValidationData, *, micro_batch: int, seed: int = 0
) -> HeldOut:
    """Score held-out sequences in all three modes; arguments as for :func:`document_losses`."""
    found = document_losses(model, validation, micro_batch=micro_batch, seed=seed)
    losses: dict[str, float] = {}
    for mode, tokens, size in (
        ("ar", found.tokens, found.bytes),
        ("diffusion", found.diffusion_tokens, found.diffusion_bytes),
        ("prefix", found.prefix_tokens, found.prefix_bytes),
    ):
        nats: Floats = getattr(found, mode)
        losses[f"{mode}_nll"], losses[f"{mode}_error"] = mean_and_error(nats, tokens)
        losses[f"{mode}_bits_per_byte"] = _bits_per_byte(nats, size)
    same, second = found.ar_same_tokens, found.prefix_tokens
    return HeldOut(
        **losses,
        ar_nll_same_tokens=mean_and_error(same, second)[0],
        prefix_minus_ar_error=mean_and_error(found.prefix - same, second)[1],
        prefix_tokens=int(second.sum()),
        documents=len(found.documents),
        sequences=len(validation),
        tokens=int(found.tokens.sum()),
    )


def document_losses(
    model: ModelHandle, validation: ValidationData, *, micro_batch: int, seed: int = 0
) -> DocumentLosses:
    """Score held-out sequences in all three modes, by document. Called by all ranks at once.

    Args:
        micro_batch: Sequences of a forward pass. Every rank makes the same number of passes, of
            the same shape, as ZeRO-3 and compiled models want it.
    """
    count = len(validation)
    batches = -(-count // micro_batch)
    found: list[tuple[NDArray[np.int64], Floats]] = []
    with model.inference(compiled=True):
        for turn in range(-(-batches // model.world_size)):
            number = turn * model.world_size + model.rank
            # A rank without a batch left goes through the first one again, for the others' sake.
            first = number * micro_batch if number < batches else 0
            batch = validation.batch(first, min(micro_batch, count - first))
            noise = validation_noise(seed, batch.sequence_ids, count, batch.inputs.shape[1])
            examples = _examples(model, batch, noise)
            nlls = [_token_losses(model, _fill(e, micro_batch)) for e in examples]
            if number < batches:
                columns = _columns(model, batch, examples, nlls, validation.token_bytes)
                found.append(_by_document(batch, columns))
    if model.world_size > 1:
        gathered: list = [None] * model.world_size
        dist.all_gather_object(gathered, found)
        found = [part for parts in gathered for part in parts]
    # Added up in the order of the sequences, whoever scored them.
    found.sort(key=lambda part: part[0][0, 0])
    numbers = np.concatenate([part[0] for part in found], axis=1)[1]
    documents, places = np.unique(numbers, return_inverse=True)
    sums = np.zeros((len(found[0][1]), len(documents)))
    for row, values in enumerate(np.concatenate([part[1] for part in found], axis=1)):
        np.add.at(sums[row], places, values)
    return DocumentLosses(documents, *sums)


def mean_and_error(sums: Floats, counts: Floats) -> tuple[float, float]:
    """Return Σ sums / Σ counts over documents, and its standard error; nan where nothing counts.

    The error of a ratio of two means, by linearisation (Cochran, "Sampling Techniques", 1977); nan
    for a single document, from which it cannot be known.
    """
    if not counts.any():
        return math.nan, math.nan
    mean, number = sums.sum() / counts.sum(), np.count_nonzero(counts)
    if number < 2:
        return float(mean), math.nan
    spread = np.square(sums - mean * counts).sum() * number / (number - 1)
    return float(mean), float(np.sqrt(spread) / counts.sum())


def in_prompt(context_ids: Tensor) -> Tensor:
    """Tell which inputs are of the first half of their context, which prefix mode reads at once.

    What a row holds of a document counts as the whole of it; of n inputs the first ceil(n / 2).
    """
    length = context_ids.shape[1]
    index = torch.arange(length)
    is_last = hidden_targets(context_ids)
    is_first = torch.cat([torch.ones_like(is_last[:, :1]), is_last[:, :-1]], dim=1)
    begin = torch.where(is_first, index, 0).cummax(1).values
    end = torch.where(is_last, index, length).flip(1).cummin(1).values.flip(1)
    return index - begin < (end - begin + 2) // 2


def _bits_per_byte(nats: Floats, size: Floats) -> float:
    total = float(size.sum())
    return float(nats.sum()) / (math.log(2) * total) if total else math.nan


def _examples(
    model: ModelHandle, batch: Batch, noise: MaskingNoise
) -> tuple[Example, Example, Example]:
    """Make the examples of AR, diffusion and prefix."""
    ar = autoregressive(batch, model.vocabulary)
    diffused = diffusion(
        batch, model.vocabulary, noise, _CORRUPTION, target=model.target, exact=True
    )
    # The first token of a second half is predicted by the last one of the prompt.
    prompt = F.pad(in_prompt(batch.context_ids)[:, 1:], (0, 1))
    second = ar.weights * (~prompt | hidden_targets(batch.context_ids))
    return ar, diffused, replace(ar, weights=second, attention="prefix")


def _fill(example: Example, rows: int) -> Example:
    """Fill an example up to a number of rows, with ones that count nothing."""
    missing = rows - len(example.input_ids)
    if not missing:
        return example
    tensors = {
        name: F.pad(value, (0, 0, 0, missing))
        for name, value in vars(example).items()
        if isinstance(value, Tensor)
    }
    return replace(example, **tensors)


def _token_losses(model: ModelHandle, example: Example) -> Tensor:
    """Return each position's cross-entropy, 0 where the weight is: (B, T) float64 on the CPU."""
    contexts = example.document_ids
    plan = plan_attention(
        example.attention,
        contexts,
        backend=model.backend,
        device=model.device,
        dtype=model.dtype,
        in_prefix=in_prompt(contexts) if example.attention == "prefix" else None,
    )
    selection = select_positions(example.weights)
    moved = example.to(model.device)
    output = model(
        moved.input_ids,
        attention=plan,
        targets=moved.targets,
        weights=moved.weights,
        selection=None if selection is None else to_device(selection, model.device),
        reduction="none",
    )
    assert output.nll is not None  # reduction="none" asks for it
    return output.nll.cpu().double()


def _columns(
    model: ModelHandle,
    batch: Batch,
    examples: Sequence[Example],
    nlls: Sequence[Tensor],
    token_bytes: Tensor,
) -> Tensor:
    """What each position adds to the columns of :class:`DocumentLosses`: (10, B, T) float64.

    Args:
        nlls: (·, T) float64 cross-entropies of each example, perhaps with more rows.
    """
    rows = len(batch.inputs)
    ar, diffused, prefix = (nll[:rows] for nll in nlls)
    scored, weights, second = (example.weights.double() for example in examples)
    size = token_bytes[batch.targets]
    masked, masked_size = scored, size
    if model.target == "in_place":
        special = torch.tensor(model.vocabulary.special_ids)
        masked = (~torch.isin(batch.inputs, special)).double()
        masked_size = token_bytes[batch.inputs]
    of_ar = scored, size * scored, ar * scored
    of_diffusion = masked, masked_size * masked, diffused * weights
    return torch.stack([*of_ar, *of_diffusion, second, size * second, prefix * second, ar * second])


def _by_document(batch: Batch, columns: Tensor) -> tuple[NDArray[np.int64], Floats]:
    """Add up what each row has of each document.

    Returns:
        (2, n) numbers of sequence and document, and (K, n) sums of the (K, B, T) columns.
    """
    found = [
        (int(sequence), document, columns[:, row, batch.document_ids[row] == number].sum(1))
        for row, sequence in enumerate(batch.sequence_ids)
        for number, document in enumerate(batch.documents[row])
    ]
    numbers = np.array([[sequence, document] for sequence, document, _ in found])
    return numbers.T, torch.stack([sums for _, _, sums in found], dim=1).numpy()
