"""From hidden states to what was asked for: logits, the loss, or the losses of single tokens.

Shared by ``DualLM`` and by models imported from Hugging Face, whose bodies differ and whose output
layers do not.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from dualtrain.network.loss import OutputLayer, select_positions


class DualOutput(NamedTuple):
    """What ``DualLM`` returns; fields that were not asked for are None.

    A tuple because ZeRO-3 finds tensors in no class of one's own.

    Attributes:
        loss: Scalar float32, to differentiate: ``cross_entropy + z_loss``.
        cross_entropy: Scalar float32, ``sum w * CE / (B * T)`` in nats, without gradient.
        z_loss: Scalar float32, the z-loss term with its factor, without gradient.
        nll: (B, T) float32, each position's cross-entropy in nats, without gradient; (N,) where a
            target was given for each selected position.
        is_top: (N,) bool, whether that target is the likeliest token.
        logits: (B, T, V), or (N, V) for selected positions.
    """

    loss: Tensor | None = None
    cross_entropy: Tensor | None = None
    z_loss: Tensor | None = None
    nll: Tensor | None = None
    is_top: Tensor | None = None
    logits: Tensor | None = None


class HasHead(Protocol):
    """A model as its head sees it."""

    def get_output_embeddings(self) -> OutputLayer: ...

    def prepare_head(self, hidden: Tensor) -> Tensor:
        """What comes before the output matrix, position by position, such as a norm."""
        ...


def head_output(
    model: HasHead,
    hidden: Tensor,
    *,
    targets: Tensor | None,
    weights: Tensor | None,
    z_loss: float,
    selection: Tensor | None,
    reduction: Literal["mean", "none"],
) -> DualOutput:
    """Run the output layer for the positions that need it."""
    head, prepare = model.get_output_embeddings(), model.prepare_head
    if targets is None:
        chosen = hidden if selection is None else _pick(hidden, selection)
        return DualOutput(logits=head(prepare(chosen)))
    if targets.ndim == 1:
        if selection is None:
            raise ValueError("targets of single positions need a selection")
        losses, is_top = head(prepare(_pick(hidden, selection)), targets, with_top=True)
        return DualOutput(nll=losses, is_top=is_top)
    if weights is None:
        weights = torch.ones(targets.shape, device=targets.device)
    elif selection is None and weights.device.type == "cpu":
        selection = select_positions(weights)
    hidden = prepare(_pick(hidden, selection))
    if reduction == "none":
        return DualOutput(nll=_token_losses(head, hidden, targets, weights, selection))
    loss, cross_entropy, z_term = head(
        hidden,
        _pick(targets, selection),
        _pick(weights, selection),
        positions=targets.numel(),
        z_loss=z_loss,
    )
    return DualOutput(loss=loss, cross_entropy=cross_entropy, z_loss=z_term)


def _token_losses(
    head: OutputLayer,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    selection: Tensor | None,
) -> Tensor:
    """Return (B, T) losses, 0 where the weight is 0."""
    targets = torch.where(weights == 0, 0, targets)
    losses = head(hidden, _pick(targets, selection))
    if selection is not None:
        everywhere = torch.zeros(targets.numel(), dtype=losses.dtype, device=losses.device)
        losses = everywhere.index_copy(0, selection, losses)
    return torch.where(weights == 0, 0, losses.view(targets.shape))


def _pick(tensor: Tensor, selection: Tensor | None) -> Tensor:
    """Flatten (B, T, ...) to (N, ...): the selected positions, or all."""
    flat = tensor.flatten(0, 1)
    return flat if selection is None else flat.index_select(0, selection)
