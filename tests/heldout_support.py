"""A tiny model and held-out sequences, and what test_heldout.py runs on real ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dualtrain.data.batches import Batch
from dualtrain.evaluate import HeldOut, held_out_losses
from dualtrain.model import DualConfig, DualLM

VOCABULARY, LENGTH, MASK, SPECIAL = 40, 16, 4, (0, 1, 2, 3, 4)
OPTIONS = {"mask_id": MASK, "special_ids": SPECIAL}


def tiny_model(seed: int = 0) -> DualLM:
    config = DualConfig(VOCABULARY, width=16, layers=2, heads=2, mlp_width=24, head="linear")
    model = DualLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # as made, the blocks add nothing: every position would see only itself
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


@dataclass
class Sequences:
    """Random sequences with a document's beginning at ``start``, or anywhere."""

    count: int
    start: int | None = None
    bytes_per_token: float = 3.0

    def __len__(self) -> int:
        return self.count

    def batch(self, first: int, count: int) -> Batch:
        assert 0 <= first < first + count <= self.count
        rows = [self._row(number) for number in range(first, first + count)]
        tokens = torch.stack(rows)
        starts = tokens[:, :-1] == 1
        starts[:, 0] = False
        return Batch(
            tokens,
            starts.cumsum(1).int(),
            torch.arange(first, first + count),
            "all",
            tuple((0,) for _ in rows),
        )

    def _row(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        row = torch.randint(5, VOCABULARY, (LENGTH + 1,), generator=generator)
        row[number % (LENGTH + 1) if self.start is None else self.start] = 1
        return row


class Counting:
    """Count the passes of a model, and remember their shapes."""

    def __init__(self, model: DualLM) -> None:
        self.module = model
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, **options):
        assert not self.module.training and not torch.is_grad_enabled()
        self.shapes.append(tuple(input_ids.shape))
        return self.module(input_ids, **options)


def score(counts: list[int], store: str) -> list[tuple[HeldOut, list[tuple[int, ...]]]]:
    """The losses of so many sequences, and the shapes of this rank's passes, for each count."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = []
    for count in counts:
        forward = Counting(tiny_model())
        losses = held_out_losses(
            forward, Sequences(count), micro_batch=2, rank=rank, world_size=world, **OPTIONS
        )
        found.append((losses, forward.shapes))
    dist.destroy_process_group()
    return found
