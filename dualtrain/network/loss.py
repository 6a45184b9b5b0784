"""The output layer and its loss, computed chunk by chunk so that the logits never exist as a whole.

At 51,200 tokens of vocabulary the logits of a micro-batch are larger than everything else
together. :class:`OutputLayer` therefore never returns them during training: it computes a chunk of
them, takes from it the loss *and its gradient*, and forgets it. Only positions whose weight is not
zero get there at all (:func:`select_positions`).

Shapes: N positions (of the B*T of a micro-batch), W width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import shutil
from functools import cache
from os import environ
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits in a chunk. CUDA: 1 GB of temporaries, few and large kernels. CPU: stays in the cache.
_CHUNK_ELEMENTS = {"cuda": 1 << 27, "cpu": 1 << 19}
# Logits in a compiled chunk, which needs no temporaries: 0.5 GB in bf16.
_COMPILED_ELEMENTS = 1 << 28
# So many compiled chunks at least, as a last one that is not full costs as much as one that is.
_COMPILED_CHUNKS = 4
# The number of selected positions is rounded up to a multiple of this share of all of them, so
# that a run sees at most so many different shapes.
_CAPACITY_STEPS = 16


def select_positions(weights: Tensor) -> Tensor | None:
    """List the positions that have a loss, padded to one of few possible lengths.

    Args:
        weights: (B, T) float32 **on the CPU**, zero where nothing is to be learned. Done there, the
            device is never waited for.

    Returns:
        (N,) int64 indices into the flattened batch, all different: those with a non-zero weight in
        order, then some of the others to fill up. None if (nearly) all positions are needed.
    """
    if weights.device.type != "cpu":
        raise ValueError("weights must be on the CPU: positions are selected without the device")
    unused = (weights == 0).flatten()
    step = -(-unused.numel() // _CAPACITY_STEPS)
    needed = unused.numel() - int(unused.sum())
    capacity = max(1, -(-needed // step)) * step
    if capacity >= unused.numel():
        return None
    others = unused.nonzero()[: capacity - needed, 0]
    return torch.cat([(~unused).nonzero()[:, 0], others])


class OutputLayer(nn.Linear):
    """The matrix from hidden states to the vocabulary, with the loss inside.

    The loss is computed by the module that owns the matrix because ZeRO-3 holds a parameter whole
    only during the forward pass of its own module.
    """

    chunk_rows: int | None = None
    """Positions in a chunk; None chooses by device."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is: ``DualLM`` fills it."""

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        positions: int = 1,
        z_loss: float = 0.0,
        with_top: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return logits, losses of single positions, or the loss of all.

        Args:
            targets: (N,) int64; None asks for the logits.
            weights: (N,) float32; None asks for each position's loss. Where a weight is 0 the
                target may be anything.
            positions: What the weighted sums are divided by: B*T, all positions.
            with_top: Without weights: also tell where the target is the likeliest token.

        Returns:
            Without targets (N, V) logits. Without weights (N,) cross-entropies in nats, without a
            gradient, and (N,) bool if asked for. Else three scalars: the loss to differentiate,
            ``sum w * CE / positions + z_loss * sum w * lse^2 / positions``, and its two terms,
            without gradients. Losses are float32 (float64 for a float64 model).
        """
        if targets is None:
            return super().forward(hidden)
        in_place = weights is not None and torch.is_grad_enabled() and compiles_for(hidden.device)
        if self.chunk_rows:
            rows = self.chunk_rows
        elif in_place:
            # By all positions, not by those selected in this slot: a constant of the run.
            rows = _constant_rows(max(positions, len(hidden)), self.out_features)
        else:
            rows = _chunk_rows(len(hidden), self.out_features, hidden.device)
        if weights is None:
            losses, is_top = _token_losses(hidden, self.weight, self.bias, targets, rows, with_top)
            return (losses, is_top) if with_top else losses
        return _FusedLoss.apply(
            hidden,
            self.weight,
            self.bias,
            torch.where(weights == 0, 0, targets),
            weights / positions,
            _FusedSettings(z_loss, rows, torch.is_grad_enabled(), in_place),
        )


class _FusedSettings(NamedTuple):
    z_loss: float
    rows: int
    with_gradients: bool  # of whoever calls: inside a Function they are never enabled
    in_place: bool


class _FusedLoss(torch.autograd.Function):
    """Loss and gradients in one pass: the backward pass only has to multiply by a scalar.

    The logits' gradient is known as soon as the logits are, so the second product with the matrix
    that a recomputing backward pass would need is saved; and backward does not need the matrix,
    which under ZeRO-3 is then on other ranks.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        settings: _FusedSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        compute = compute_type(weight)
        matrix = weight.to(compute)
        offset = None if bias is None else bias.to(compute)
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        run = _in_place if settings.in_place else _by_chunks
        with torch.autocast(hidden.device.type, enabled=False):
            sums, gradients = run(hidden, matrix, offset, targets, weights, settings)
        if gradients is not None:
            # Not attributes of ctx: these are freed by the backward pass, not with the last
            # reference to the loss.
            ctx.save_for_backward(*gradients)
        cross_entropy, z_term = sums[0], settings.z_loss * sums[1]
        ctx.mark_non_differentiable(cross_entropy, z_term)
        return cross_entropy + z_term, cross_entropy, z_term

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if gradient is None or not needed else _scaled(gradient, scale, dtype)
            for gradient, needed, dtype in zip(
                ctx.saved_tensors, ctx.needs_input_grad, ctx.types, strict=False
            )
        )
        return (*gradients, None, None, None)


Gradients = tuple[Tensor, Tensor, Tensor | None]


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * scale in a type, in one pass on a GPU, and without changing what is saved.

    A second backward pass, after ``retain_graph``, needs that again.
    """
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _by_chunks(
    hidden: Tensor,
    matrix: Tensor,
    offset: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    settings: _FusedSettings,
) -> tuple[Tensor, Gradients | None]:
    """Compute (2,) sums of the two losses, and what to multiply in the backward pass."""
    z_loss, compute = settings.z_loss, matrix.dtype
    exact = torch.promote_types(compute, torch.float32)
    gradients = None
    sums = torch.zeros(2, dtype=exact, device=hidden.device)
    if settings.with_gradients:
        gradients = (
            torch.empty(hidden.shape, dtype=compute, device=hidden.device),
            torch.zeros(matrix.shape, dtype=exact, device=hidden.device),
            torch.zeros_like(offset, dtype=exact) if offset is not None else None,
        )
    for begin in range(0, len(hidden), settings.rows):
        chunk = slice(begin, begin + settings.rows)
        inputs = hidden[chunk].to(compute)
        logits = F.linear(inputs, matrix, offset)
        log_p = torch.log_softmax(logits, dim=-1, dtype=exact)
        target = targets[chunk, None]
        weight_here = weights[chunk, None].to(exact)
        log_p_target = log_p.gather(1, target)
        # log p = logit - lse: the normaliser, without a second pass over the vocabulary.
        lse = logits.gather(1, target).to(exact) - log_p_target
        sums[0] -= (weight_here * log_p_target).sum()
        sums[1] += (weight_here * lse.square()).sum()
        if gradients is not None:
            gradient = log_p.exp_().mul_(weight_here * (1 + 2 * z_loss * lse))
            gradient.scatter_add_(1, target, -weight_here)
            _accumulate(gradients, chunk, gradient, inputs, matrix)
    return sums, gradients


def _in_place(
    hidden: Tensor,
    matrix: Tensor,
    offset: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    settings: _FusedSettings,
) -> tuple[Tensor, Gradients]:
    """Compute the same as :func:`_by_chunks`, in one buffer of a constant number of rows.

    Of a chunk that is not full the products have only its rows, and what is compiled gets zeros
    without weight behind them: one graph for every number of positions.
    """
    rows, compute = settings.rows, matrix.dtype
    exact = torch.promote_types(compute, torch.float32)
    turn = _compiled_turn()
    logits = torch.empty(rows, len(matrix), dtype=compute, device=hidden.device)
    sums = torch.zeros(2, dtype=exact, device=hidden.device)
    to_hidden = torch.empty(hidden.shape, dtype=compute, device=hidden.device)
    to_weight = to_bias = None
    for begin in range(0, len(hidden), rows):
        chunk = slice(begin, begin + rows)
        inputs = hidden[chunk].to(compute)
        spare = rows - len(inputs)
        filled = logits[: len(inputs)]
        if offset is None:
            torch.mm(inputs, matrix.T, out=filled)
        else:
            torch.addmm(offset, inputs, matrix.T, out=filled)
        logits[len(inputs) :].zero_()
        target = F.pad(targets[chunk], (0, spare))
        weight_here = F.pad(weights[chunk].to(exact), (0, spare))
        chunk_sums, of_bias = turn(logits, target, weight_here, settings.z_loss, offset is not None)
        sums += chunk_sums
        if of_bias is not None:
            to_bias = of_bias if to_bias is None else to_bias.add_(of_bias)
        torch.mm(filled, matrix, out=to_hidden[chunk])
        product = filled.T @ inputs
        to_weight = product.to(exact) if to_weight is None else to_weight.add_(product)
    if to_weight is None:  # no positions
        to_weight = torch.zeros_like(matrix, dtype=exact)
        to_bias = None if offset is None else torch.zeros_like(offset, dtype=exact)
    return sums, (to_hidden, to_weight, to_bias)


def _turn_into_gradient(
    logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Turn (n, V) logits into their gradient in place: three passes over them when compiled.

    Args:
        weights: (n,) in float32 at least.

    Returns:
        (2,) the sums ``w * CE`` and ``w * lse^2``; (V,) the gradient of the bias, if there is one.
    """
    exact = logits.to(weights.dtype)
    lse = torch.logsumexp(exact, dim=-1)
    of_target = logits.gather(1, targets[:, None])[:, 0].to(weights.dtype)
    sums = torch.stack([(weights * (lse - of_target)).sum(), (weights * lse.square()).sum()])
    gradient = torch.exp(exact - lse[:, None]) * (weights * (1 + 2 * z_loss * lse))[:, None]
    # A comparison with every column, where a scatter would end the fused pass.
    column = torch.arange(logits.shape[1], device=logits.device)
    is_target = column[None] == targets[:, None]
    gradient = torch.where(is_target, gradient - weights[:, None], gradient)
    logits.copy_(gradient)
    return sums, gradient.sum(0) if with_bias else None


@cache
def _compiled_turn():
    return torch.compile(_turn_into_gradient, dynamic=False)


def compiles_for(device: torch.device) -> bool:
    """Whether what is compiled for a device may be: on CUDA, where triton and a C compiler are."""
    return device.type == "cuda" and _has_compilers()


@cache
def _has_compilers() -> bool:
    # What triton itself looks for, to build the code that starts a kernel.
    compiler = environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and importlib.util.find_spec("triton") is not None


def _accumulate(
    gradients: Gradients,
    chunk: slice,
    gradient: Tensor,
    inputs: Tensor,
    matrix: Tensor,
) -> None:
    """Add what a chunk's logits' gradient (n, V) means for the layer's input and parameters."""
    to_hidden, to_weight, to_bias = gradients
    if to_bias is not None:
        to_bias += gradient.sum(0)
    gradient = gradient.to(matrix.dtype)
    torch.mm(gradient, matrix, out=to_hidden[chunk])
    if to_weight.dtype == matrix.dtype:
        to_weight.addmm_(gradient.T, inputs)
    else:
        to_weight += gradient.T @ inputs


@torch.no_grad()
def _token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: int,
    with_top: bool,
) -> tuple[Tensor, Tensor]:
    """Return each position's cross-entropy, (N,) nats in float32, and where it is the likeliest.

    The latter, (N,) bool, is False everywhere unless asked for.
    """
    compute = compute_type(weight)
    exact = torch.promote_types(compute, torch.float32)
    matrix = weight.to(compute)
    offset = None if bias is None else bias.to(compute)
    losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
    is_top = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for begin in range(0, len(hidden), rows):
            chunk = slice(begin, begin + rows)
            logits = F.linear(hidden[chunk].to(compute), matrix, offset)
            losses[chunk] = F.cross_entropy(logits.to(exact), targets[chunk], reduction="none")
            if with_top:
                # Equality with the maximum: argmax is ten times slower on a CPU.
                of_target = logits.gather(1, targets[chunk, None])[:, 0]
                is_top[chunk] = of_target == logits.amax(-1)
    return losses, is_top


def compute_type(tensor: Tensor) -> torch.dtype:
    """The type that matrix products of a tensor are computed in: autocast's, else its own."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype


def _chunk_rows(positions: int, vocab_size: int, device: torch.device) -> int:
    """Return the positions in a chunk: as many as the budget allows, in chunks of one size."""
    budget = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"])
    most = max(64, budget // vocab_size)
    chunks = max(1, -(-positions // most))
    return max(1, -(-positions // chunks))


def _constant_rows(positions: int, vocab_size: int) -> int:
    """Return the rows of a compiled chunk: of one size, if all positions have a loss."""
    most = max(64, _COMPILED_ELEMENTS // vocab_size)
    chunks = max(_COMPILED_CHUNKS, -(-positions // most))
    return max(1, -(-positions // chunks))
