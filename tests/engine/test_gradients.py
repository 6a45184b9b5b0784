"""Tests of: dualtrain.engine.gradients.

The raw gradient's norm, and clipping by it, against one process that computes all slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import pytest
import torch
import torch.distributed as dist
from helpers.models import MUON, slot_tokens, tiny_model
from helpers.paper_optimizer import PaperOptimizer
from helpers.ranks import on_ranks
from torch import Tensor

from dualtrain.engine.build import build_engine, build_optimizer, set_learning_rate
from dualtrain.engine.config import merge_settings
from dualtrain.engine.gradients import Gradients
from dualtrain.engine.groups import group_parameters
from dualtrain.engine.process import init_distributed, leave_distributed, prepare_process
from dualtrain.recipe.schema import OptimSection

LOSS_SCALES = (1.0, 9.0, 0.2, 3.0)
"""Factor on the losses of each step: gradients are long in one and short in the next."""
LEARNING_RATE = 7e-3
CLIP_NORM = 2.0
"""Between the norms of the steps, so that some are clipped and some are not."""


@dataclass(frozen=True)
class Cell:
    """One engine's settings.

    Attributes:
        stage: ZeRO stage.
        optimizer: ``optim.name``.
        accumulation: Slots of a rank in a step.
        precision: ``engine.precision``.
        clip_norm: ``optim.clip_norm``.
        offload: Whether the optimizer is in host memory.
        deepspeed_clipping: DeepSpeed's own ``gradient_clipping``, which dualtrain leaves at 0.
    """

    stage: int
    optimizer: Literal["muon", "adamw"] = "muon"
    accumulation: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    clip_norm: float | None = CLIP_NORM
    offload: bool = False
    deepspeed_clipping: float = 0.0

    def ds_config(self, world_size: int) -> dict[str, object]:
        config = merge_settings(
            f"zero{self.stage}",
            precision=self.precision,
            micro_batch=1,
            accumulation=self.accumulation,
            world_size=world_size,
        )
        config["gradient_clipping"] = self.deepspeed_clipping
        zero = cast("dict[str, object]", config["zero_optimization"])
        # Nothing is small enough to stay whole at stage 3.
        zero["stage3_param_persistence_threshold"] = 0
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        return config


@dataclass
class Trained:
    """What became of a cell.

    Attributes:
        norms: Of every step's gradient.
        parameters: fp32 masters after the last step.
        seen: The first step's whole gradient as ``safe_get_full_grad`` shows it before the update.
    """

    norms: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)


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


def train_cells(cells: list[Cell]) -> list[Trained]:
    """Train the tiny model once for each cell on these ranks."""
    prepare_process(compile_model=False)
    init_distributed(timeout_s=600)
    results = [train_cell(cell, dist.get_rank(), dist.get_world_size()) for cell in cells]
    leave_distributed()
    return results


def train_cell(cell: Cell, rank: int, world_size: int) -> Trained:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    model = tiny_model()
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    groups = group_parameters(shapes, MUON if cell.optimizer == "muon" else ())
    optim = OptimSection(name=cell.optimizer, newton_schulz="gram")
    optimizer = build_optimizer(model, groups, optim)
    engine = build_engine(model, optimizer, cell.ds_config(world_size))
    gradients = Gradients(engine, clip_norm=cell.clip_norm)
    trained = Trained()
    set_learning_rate(engine, LEARNING_RATE)
    for step, scale in enumerate(LOSS_SCALES):
        for slot in range(rank, cell.accumulation * world_size, world_size):
            if slot >= world_size:
                engine.step()
            engine.backward(engine(slot_tokens(step, slot)) * scale)
        if step == 0:
            for key, parameter in model.named_parameters():
                whole = safe_get_full_grad(parameter)
                trained.seen[key] = torch.empty(0) if whole is None else whole.clone()
        gradients.prepare()
        engine.step()
        trained.norms.append(float(gradients.norm))
    for key, parameter in model.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        trained.parameters[key] = (parameter if full is None else full).detach().float().clone()
    engine.destroy()
    return trained


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
