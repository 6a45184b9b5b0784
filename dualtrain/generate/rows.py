"""Rows of token ids through the model, and what may be produced from them."""

from __future__ import annotations

import torch
from torch import Tensor

from dualtrain.generate.choose import banned_tokens
from dualtrain.model.handle import ModelHandle
from dualtrain.network.attention import AttentionPlan


def allowed_logits(
    model: ModelHandle,
    rows: Tensor,
    plan: AttentionPlan,
    selection: Tensor,
    *,
    positions: Tensor | None = None,
    may_stop: bool,
) -> Tensor:
    """Run the model, and rule out what must never be produced.

    Args:
        rows: (B, T) int64 token ids.
        selection: (N,) int64: which of the B * T positions are asked.
        positions: (B, T) int64, see ``DualLM.forward``.
        may_stop: Whether the tokens that end a text are allowed.

    Returns:
        (N, V) float32 on the device.
    """
    options = {} if positions is None else {"positions": positions}
    output = model(
        rows.to(model.device), attention=plan, selection=selection.to(model.device), **options
    )
    assert output.logits is not None  # no targets ask for them
    logits, vocabulary = output.logits.float(), model.vocabulary
    banned_ids = {*vocabulary.special_ids} - {*(vocabulary.stop_ids if may_stop else ())}
    banned = banned_tokens(
        logits.shape[-1], vocabulary.size, tuple(sorted(banned_ids)), logits.device
    )
    return logits.masked_fill(banned, -torch.inf)


def fill_up(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Put rows of different lengths into one tensor.

    Returns:
        (B, T) int64, filled up with 0 behind each row, and (B, T) int32, 0 for the row and 1 for
        what fills it up: another document, which the row does not see.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(width)[None, :] >= lengths[:, None]).int()
