"""Engines that test_gradients.py trains on real ranks, with their gradients' norms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from helpers.engine_workers import MUON, slot_tokens, tiny_model
from torch import Tensor

from dualtrain.engine.build import (
    build_engine,
    build_optimizer,
    set_learning_rate,
)
from dualtrain.engine.config import merge_settings
from dualtrain.engine.gradients import Gradients
from dualtrain.engine.groups import group_parameters
from dualtrain.engine.process import (
    init_distributed,
    leave_distributed,
    prepare_process,
)
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


def train_cells(cells: list[Cell]) -> list[Trained]:
    """Train the tiny model once for each cell on these ranks."""
    import torch.distributed as dist

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
