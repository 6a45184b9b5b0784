"""Keys and values kept from one forward pass to the next, for generating token by token.

A :class:`KeyValueCache` makes the attention plan of each pass. Plans are called once by every
layer, in order; those of a cache also store what they are given, so the models need not know of
caches at all: neither ``DualLM`` nor one imported from Hugging Face. Not for compiled or training
models.

Shapes: B rows, t new tokens, C slots, H heads of size D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dualtrain.network.attention import AttentionPlan, plan_attention, to_device


class KeyValueCache:
    """The keys and values of B rows, which may be of different lengths.

    Args:
        capacity: C, tokens that a row can have in the end.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.capacity = capacity
        self.device, self.dtype = torch.device(device), dtype
        self._layers: list[tuple[Tensor, Tensor]] = []

    def plan_prompts(
        self, lengths: Sequence[int], kind: Literal["causal", "full"], width: int
    ) -> AttentionPlan:
        """Plan the first pass, over the prompts.

        Args:
            lengths: (B,) tokens of each prompt; rows are filled up behind them.
        """
        if self._layers:
            raise ValueError("prompts come first")
        if max(lengths) > width or width > self.capacity:
            raise ValueError(f"prompts of {max(lengths)} tokens in rows of {width}")
        self.lengths = torch.tensor(lengths, dtype=torch.int64)
        fills = torch.arange(width)[None, :] >= self.lengths[:, None]
        inner = plan_attention(
            kind, fills.int(), backend="sdpa", device=self.device, dtype=self.dtype
        )
        return _PromptPlan(kind, "sdpa", self._layers, self.capacity, inner)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows, in this order; one named twice is continued twice."""
        self.lengths = self.lengths[list(rows)]
        index = to_device(torch.tensor(rows, dtype=torch.int64), self.device)
        for layer, (keys, values) in enumerate(self._layers):
            self._layers[layer] = keys[index], values[index]

    def plan_next(self) -> tuple[AttentionPlan, Tensor]:
        """Plan a pass of one more token for every row.

        Returns:
            The plan, and (B, 1) int64 positions of the tokens, on the device.
        """
        if int(self.lengths.max()) >= self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens")
        slots = self.lengths
        self.lengths = slots + 1
        used = int(self.lengths.max())
        hidden = torch.arange(used)[None, :] > slots[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf)
        plan = _NextPlan(
            "causal",
            "sdpa",
            iter(self._layers),
            to_device(slots, self.device),
            to_device(mask, self.device)[:, None, None],
        )
        return plan, to_device(slots[:, None], self.device)


@dataclass(frozen=True, eq=False)
class _PromptPlan(AttentionPlan):
    """Attends as planned, and stores; each call is the next layer's."""

    layers: list[tuple[Tensor, Tensor]]
    capacity: int
    inner: AttentionPlan

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Of prompts that fill no row, what lies behind them is overwritten before it is seen.
        rows, width, heads, size = key.shape
        empty = key.new_zeros(rows, self.capacity, heads, size)
        keys, values = empty, empty.clone()
        keys[:, :width], values[:, :width] = key, value
        self.layers.append((keys, values))
        return self.inner.attend(query, key, value)


@dataclass(frozen=True, eq=False)
class _NextPlan(AttentionPlan):
    """One token a row, (B, 1, H, D): stores it, and attends to all that the row has.

    Attributes:
        layers: Keys and values, (B, C, H, D) each, of the layers that have not been called yet.
        slots: (B,) int64, where the token goes.
        mask: (B, 1, 1, S), over the first S slots.
    """

    layers: Iterator[tuple[Tensor, Tensor]]
    slots: Tensor
    mask: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = next(self.layers)
        rows = torch.arange(len(key), device=key.device)
        keys[rows, self.slots], values[rows, self.slots] = key[:, 0], value[:, 0]
        used = self.mask.shape[-1]
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys[:, :used].transpose(1, 2),
            values[:, :used].transpose(1, 2),
            attn_mask=self.mask.to(query.dtype),
        )
        return output.transpose(1, 2)
