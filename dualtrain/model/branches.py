"""Attention in rows that hold a prompt once and several continuations of it.

For scoring: the continuations of one prompt are branches that all see the prompt and never each
other, so the prompt is computed once. A row may hold several such documents. Each token stands at
the position it would have in a row of its own, so the model must be given :attr:`Layout.positions`;
then scores are those of separate rows.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dualtrain.model.attention import AttentionPlan, SdpaPlan, plan_attention, to_device

PROMPT = 0
"""The branch of a document that every other branch of it sees."""


@dataclass(frozen=True)
class Layout:
    """Who is who in packed rows; everything on the CPU.

    Attributes:
        documents: (B, T) int32, never decreasing within a row. What fills a row up is a document
            of its own.
        branches: (B, T) int32: 0 for a document's prompt, 1, 2, ... for its continuations.
        positions: (B, T) int64: each token's position in its own sequence, prompt and branch.
    """

    documents: Tensor
    branches: Tensor
    positions: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[tuple[int, Sequence[int]]]], length: int) -> Layout:
        """Lay out rows of documents, filled up to a length.

        Args:
            rows: For each row its documents, each as (tokens of the prompt, tokens of each branch).
            length: T.

        Raises:
            ValueError: A row is longer than that.
        """
        shape = (len(rows), length)
        documents, branches = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        positions = np.zeros(shape, np.int64)
        for row, content in enumerate(rows):
            needed = sum(prompt + sum(parts) for prompt, parts in content)
            if needed > length:
                raise ValueError(f"a row of {needed} tokens does not fit into {length}")
            at = 0
            for document, (prompt, parts) in enumerate(content):
                for branch, (begin, size) in enumerate(
                    [(0, prompt), *((prompt, n) for n in parts)]
                ):
                    stop = at + size
                    documents[row, at:stop] = document
                    branches[row, at:stop] = branch
                    positions[row, at:stop] = np.arange(begin, begin + size)
                    at = stop
            documents[row, at:] = len(content)
            positions[row, at:] = np.arange(length - at)
        return cls(
            torch.from_numpy(documents), torch.from_numpy(branches), torch.from_numpy(positions)
        )


def plan_branches(
    kind: Literal["causal", "prefix"],
    layout: Layout,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> AttentionPlan:
    """Prepare attention for rows of prompts and branches.

    Query q sees key k of the same document if k is in the prompt or in q's own branch, and k is not
    after q. With ``prefix`` every token of the document sees the whole prompt.

    Args:
        kind: causal or prefix.
        layout: The rows.
        device: Where the model runs.
        dtype: Compute type of the attention.

    Returns:
        A plan for torch's SDPA, with a dense mask unless plain causal attention is the same.
    """
    device = torch.device(device)
    last_branch = int(layout.branches.max())
    if kind == "causal" and last_branch <= 1 and int(layout.documents.max()) <= 1:
        # One document from the row's beginning and what fills it up, which no token of it sees.
        alone = torch.zeros_like(layout.documents)
        return plan_attention("causal", alone, backend="sdpa", device=device, dtype=dtype)
    documents, branches, positions = (
        to_device(tensor, device)
        for tensor in (layout.documents, layout.branches, layout.positions)
    )
    is_prompt = branches[:, None, :] == PROMPT
    seen = documents[:, :, None] == documents[:, None, :]
    seen &= is_prompt | (branches[:, :, None] == branches[:, None, :])
    earlier = positions[:, None, :] <= positions[:, :, None]
    seen &= (earlier | is_prompt) if kind == "prefix" else earlier
    mask = torch.full(seen.shape, -torch.inf, device=device, dtype=dtype)
    return SdpaPlan(kind, "sdpa", mask.masked_fill_(seen, 0.0)[:, None])
