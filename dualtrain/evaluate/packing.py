"""Rows of scoring, the batches they are run in, and the attention inside them.

``scoring`` plans every call as rows, each with the positions that are read from it; ``tree`` and
``masks`` make them. A row may hold several sequences: as a tree of tokens, in which what they have
in common stands once, or as documents one after another.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dualtrain.network.attention import AttentionPlan, SdpaPlan, plan_attention, to_device


@dataclass(frozen=True, eq=False)
class Row:
    """Tokens of one row and what is read from it."""

    tokens: np.ndarray  # (n,) int64
    positions: np.ndarray  # (n,) int64, each token's place in its own sequence
    at: np.ndarray  # (m,) int64, places whose output is read; one may occur more than once
    targets: np.ndarray  # (m,) int64, the tokens whose loss is read there
    reads: np.ndarray  # (m,) int64, the numbers of these readings in the plan
    parts: int  # sequences in the row; a row with one cannot be divided

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether plain attention over the whole row is what it needs."""
        return self.parts == 1


@dataclass(frozen=True, eq=False)
class TreeRow(Row):
    """A tree of tokens in depth-first order: every token sees those it descends from."""

    ends: np.ndarray  # (n,) int64: all from a token up to here, exclusively, descend from it
    prompt_length: int  # so many tokens at the row's beginning are seen by all; 0 is causal

    @property
    def is_chain(self) -> bool:
        return bool((self.ends == len(self)).all())


@dataclass(frozen=True, eq=False)
class PackedRow(Row):
    """Documents that see themselves bidirectionally, and not each other."""

    documents: np.ndarray  # (n,) int32, 0, 1, ... along the row


@dataclass(frozen=True)
class RowBatch:
    """Rows that are run together: all trees or all packed, longest first."""

    rows: Sequence[Row]

    @property
    def width(self) -> int:
        return max(map(len, self.rows))

    @property
    def tokens(self) -> int:
        """B·T, what the model computes."""
        return len(self.rows) * self.width

    @property
    def parts(self) -> int:
        """Sequences in all rows; a batch of one cannot be divided."""
        return sum(row.parts for row in self.rows)

    @property
    def reads(self) -> np.ndarray:
        """(N,) int64, numbers of what is read, in the order of :meth:`inputs`."""
        return np.concatenate([row.reads for row in self.rows])

    def inputs(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Make the model's inputs, on the device: ids; positions, selection and targets."""
        width = self.width
        ids, positions = np.zeros((2, len(self.rows), width), np.int64)
        for number, row in enumerate(self.rows):
            ids[number, : len(row)] = row.tokens
            positions[number, : len(row)] = row.positions
        at = [number * width + row.at for number, row in enumerate(self.rows)]
        arrays = {
            "positions": positions,
            "selection": np.concatenate(at),
            "targets": np.concatenate([row.targets for row in self.rows]),
        }
        options = {name: to_device(torch.from_numpy(a), device) for name, a in arrays.items()}
        return to_device(torch.from_numpy(ids), device), options

    def plan(self, backend: str, device: torch.device, dtype: torch.dtype) -> AttentionPlan:
        """Prepare the attention."""
        if isinstance(self.rows[0], TreeRow):
            return _plan_trees(cast(Sequence[TreeRow], self.rows), self.width, device, dtype)
        documents = np.zeros((len(self.rows), self.width), np.int32)
        for number, row in enumerate(cast(Sequence[PackedRow], self.rows)):
            documents[number, : len(row)] = row.documents
            documents[number, len(row) :] = row.parts
        ids = torch.from_numpy(documents)
        return plan_attention("full", ids, backend=backend, device=device, dtype=dtype)


def make_batches(rows: Sequence[Row], tokens: int, *, overhead_tokens: int) -> list[RowBatch]:
    """Divide rows into batches of similar lengths.

    Args:
        rows: Of one kind, in any order.
        tokens: What a batch may hold, padding included. A longer row has a batch of its own.
        overhead_tokens: How many tokens cost as much as a batch does by itself. A batch is closed
            before it is full where filling it would pad more than that.

    Returns:
        The batches, longest rows first, so that one that does not fit shows at once. Rows that
        need a mask are not with rows that need none.
    """
    ordered = sorted(rows, key=lambda row: (row.is_chain, -len(row)))
    batches, begin = [], 0
    while begin < len(ordered):
        width = len(ordered[begin])
        full = min(begin + max(1, tokens // width), len(ordered))
        stop = begin + 1
        while (
            stop < full
            and ordered[stop].is_chain == ordered[begin].is_chain
            and (full - stop) * (width - len(ordered[stop])) <= overhead_tokens
        ):
            stop += 1
        batches.append(RowBatch(ordered[begin:stop]))
        begin = stop
    return batches


def _plan_trees(
    rows: Sequence[TreeRow], width: int, device: torch.device, dtype: torch.dtype
) -> AttentionPlan:
    """Prepare attention inside trees: key k is seen by q if k <= q < end of k, or k is in a prompt.

    A dense mask for torch's SDPA, unless plain causal attention is the same.
    """
    prompts = np.array([row.prompt_length for row in rows])
    if not prompts.any() and all(row.is_chain for row in rows):
        return SdpaPlan("causal", "sdpa", None)
    # What fills a row up sees itself, since a softmax over nothing would be no number.
    ends = np.tile(np.arange(1, width + 1), (len(rows), 1))
    for number, row in enumerate(rows):
        ends[number, : len(row)] = row.ends
    end, prompt = (to_device(torch.from_numpy(array), device) for array in (ends, prompts))
    place = torch.arange(width, device=device)
    seen = (place[:, None] >= place) & (place[:, None] < end[:, None, :])
    seen |= (place < prompt[:, None])[:, None, :]
    mask = torch.full(seen.shape, -torch.inf, device=device, dtype=dtype)
    kind = "prefix" if prompts.any() else "causal"
    return SdpaPlan(kind, "sdpa", mask.masked_fill_(seen, 0.0)[:, None])
