"""The raw gradient's norm, and clipping by it, against one process that computes all slots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.engine_workers import MUON, slot_tokens, tiny_model
from helpers.gradient_workers import (
    CLIP_NORM,
    LEARNING_RATE,
    LOSS_SCALES,
    Cell,
    Trained,
    train_cells,
)
from helpers.ranks import PaperOptimizer, on_ranks

FP32 = [
    Cell(stage, optimizer, accumulation)
    for stage in range(4)
    for optimizer in ("muon", "adamw")
    for accumulation in (1, 4)
]
BFLOAT16 = [Cell(stage, accumulation=4, precision="bf16") for stage in range(4)]
OFFLOADED = [Cell(stage, accumulation=4, offload=True) for stage in (1, 2, 3)]
OFFLOADED += [replace(cell, optimizer="adamw") for cell in OFFLOADED]
OFFLOADED += [Cell(stage, accumulation=4, offload=True, precision="bf16") for stage in (1, 2, 3)]
UNCLIPPED = [Cell(stage, accumulation=4, clip_norm=None) for stage in range(4)]
DEEPSPEEDS = [
    Cell(stage, clip_norm=None, deepspeed_clipping=CLIP_NORM, offload=offload)
    for stage, offload in ((1, False), (2, False), (3, False), (1, True), (3, True))
]


def reference(cell: Cell, ranks: int) -> Trained:
    """The cell on one process in plain PyTorch, from the mean over all slots."""
    model = tiny_model()
    parameters = dict[str, torch.Tensor](model.named_parameters())
    optimizer = PaperOptimizer(parameters, MUON if cell.optimizer == "muon" else ())
    slots = cell.accumulation * ranks
    trained = Trained()
    for step, scale in enumerate(LOSS_SCALES):
        model.zero_grad()
        for slot in range(slots):
            (model(slot_tokens(step, slot)) * scale / slots).backward()
        gradients = {key: p.grad.clone() for key, p in parameters.items() if p.grad is not None}
        norm = (
            float(sum(gradient.double().square().sum() for gradient in gradients.values())) ** 0.5
        )
        trained.norms.append(norm)
        if step == 0:
            trained.seen = gradients
        clip_norm = cell.clip_norm or cell.deepspeed_clipping or norm
        factor = min(1.0, clip_norm / norm)
        clipped = {key: gradient * factor for key, gradient in gradients.items()}
        optimizer.step(clipped, LEARNING_RATE)
    trained.parameters = {key: value.detach() for key, value in parameters.items()}
    return trained


def distance(first: Trained, second: Trained) -> float:
    """Largest distance of a parameter in one result from the other, per distance it was moved."""
    start = dict(tiny_model().named_parameters())
    return max(
        float((first.parameters[key] - value).norm() / (value - start[key].detach()).norm())
        for key, value in second.parameters.items()
    )


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_norm_and_clipped_update_are_those_of_the_raw_gradient(ranks: int, tmp_path: Path):
    cells = FP32 + BFLOAT16 + OFFLOADED + UNCLIPPED + DEEPSPEEDS
    results = on_ranks(train_cells, cells, ranks=ranks, tmp_path=tmp_path)
    for cell, *trained in zip(cells, *results, strict=True):
        expected = reference(cell, ranks)
        first = trained[0]
        assert all(other.norms == first.norms for other in trained), cell
        if cell in DEEPSPEEDS:
            # What the other cells would be if the orthogonalised update were clipped.
            assert distance(first, expected) > 0.1, cell
            continue
        # fp32: the order of additions. bf16: products, and at most one sum, have 8 bits.
        relative = 1e-5 if cell.precision == "fp32" else 2e-2
        assert first.norms == pytest.approx(expected.norms, rel=relative), cell
        # As in test_engine: Newton-Schulz amplifies rounding, and Adam divides by it.
        assert distance(first, expected) < (1e-4 if cell.precision == "fp32" else 0.2), cell
        for key, gradient in expected.seen.items():
            if cell.precision == "fp32":
                torch.testing.assert_close(first.seen[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_clipping_changes_the_result_by_far_more_than_the_tolerance(optimizer):
    cell = Cell(0, optimizer, accumulation=4)
    clipped, unclipped = reference(cell, 1), reference(replace(cell, clip_norm=None), 1)
    assert min(unclipped.norms) < CLIP_NORM < max(unclipped.norms)
    assert distance(clipped, unclipped) > 0.01
