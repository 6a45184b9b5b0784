"""Tests of: dualtrain.engine.norm_gains, network.norms.

Norm gains stay fp32 in bf16 runs: in every forward pass, at every ZeRO stage.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import pytest
import torch
from helpers.fidelity import Parameters, masters
from helpers.imported import imported_model, stock_model
from helpers.models import add_noise
from helpers.ranks import on_ranks
from torch import Tensor, nn

from dualtrain.checkpoint import store as checkpoint
from dualtrain.engine.build import build_engine, build_optimizer, set_learning_rate
from dualtrain.engine.config import bfloat16_mode, merge_settings
from dualtrain.engine.groups import group_parameters
from dualtrain.engine.parameters import muon_parameter_names
from dualtrain.engine.process import init_distributed, leave_distributed, prepare_process
from dualtrain.launch.world import World, current_world
from dualtrain.model.imported import ImportedLM
from dualtrain.network.config import DualConfig
from dualtrain.network.norms import norm_parameters
from dualtrain.network.transformer import DualLM
from dualtrain.recipe.schema import OptimSection

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

VOCABULARY = 96
LEARNING_RATE = 3e-3
SLOTS = 4
HALF, WHOLE = 1, 2
"""Steps to the checkpoint, and to the end."""


@dataclass(frozen=True)
class Cell:
    """One engine's settings.

    Attributes:
        stage: ZeRO stage.
        family: ``dual``, or one that is imported.
        offload: What lives in host memory.
        persistence: Largest parameter that stage 3 keeps whole.
        recompute: Activation checkpointing.
        moved_to: Stage of another engine that takes its checkpoint, too.
    """

    stage: int
    family: str = "dual"
    offload: Literal["nothing", "optimizer", "parameters"] = "nothing"
    persistence: int = 0
    recompute: bool = False
    moved_to: int | None = None

    def ds_config(self, world_size: int) -> dict[str, object]:
        config = merge_settings(
            f"zero{self.stage}",
            precision="bf16",
            micro_batch=1,
            accumulation=SLOTS // world_size,
            world_size=world_size,
        )
        zero = cast("dict[str, object]", config["zero_optimization"])
        zero["stage3_param_persistence_threshold"] = self.persistence
        if self.offload != "nothing":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        if self.offload == "parameters":
            zero["offload_param"] = {"device": "cpu", "pin_memory": False}
        return config

    def make_model(self) -> DualLM | ImportedLM:
        """The model, with gains that bf16 cannot hold."""
        if self.family == "dual":
            model = DualLM(
                DualConfig(
                    VOCABULARY,
                    hidden_size=12,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    intermediate_size=20,
                    head="paper",
                )
            )
        else:
            torch.manual_seed(0)
            model = imported_model(stock_model(self.family)).train()
        add_noise(model, 0.1, seed=5)
        model.activation_checkpointing = self.recompute
        return model


@dataclass
class Trained:
    """What a rank saw of a cell.

    Attributes:
        start: fp32 masters of the new engine.
        saved: When the checkpoint was made.
        final: After the last step.
        resumed: Likewise, after the second half was run again from the checkpoint.
        moved: Masters, and what norms use, of the engine of another stage.
        used: What the norms computed with after the last step, in evaluation.
        types: Of all parameters at the end, by name.
        loss: Of :func:`tokens` after the last step.
        losses: Of every step's last slot.
        resumed_losses: Of the second half, again.
    """

    start: Parameters
    saved: Parameters
    final: Parameters
    resumed: Parameters
    moved: tuple[Parameters, Parameters] | None
    used: Parameters
    types: dict[str, torch.dtype]
    loss: Tensor
    losses: list[float]
    resumed_losses: list[float]


CELLS = (
    Cell(0),
    Cell(1, moved_to=3),
    Cell(2),
    Cell(3, moved_to=1),
    Cell(3, persistence=10**6, recompute=True),
    Cell(1, family="qwen3", offload="optimizer"),
    Cell(3, family="gpt2", offload="parameters"),
)


def train_cells(cells: list[Cell], folder: Path) -> list[Trained]:
    """Train an engine for each cell on these ranks."""
    prepare_process(compile_model=False)
    init_distributed(timeout_s=600)
    world = current_world()
    assert world is not None
    results = [_train(cell, folder / str(n), world) for n, cell in enumerate(cells)]
    leave_distributed()
    return results


def _train(cell: Cell, folder: Path, world: World) -> Trained:
    engine = _engine(cell, world)
    start = masters(engine)
    losses = _steps(engine, range(HALF), world)
    path = checkpoint.save(
        folder, engine=engine, world=world, step=HALF, texts={}, facts={}, rank_state={}
    )
    saved = masters(engine)
    losses += _steps(engine, range(HALF, WHOLE), world)
    model = cast("DualLM", engine.module)
    used, loss = _evaluate(engine, model)
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    final = masters(engine)
    engine.destroy()
    again = _engine(cell, world)
    checkpoint.load(path, again, world, checkpoint.load_rank_states(path, world))
    resumed_losses = _steps(again, range(HALF, WHOLE), world)
    resumed = masters(again)
    again.destroy()
    moved = None
    if cell.moved_to is not None:
        other = _engine(replace(cell, stage=cell.moved_to), world)
        checkpoint.load(path, other, world, checkpoint.load_rank_states(path, world))
        moved = masters(other), _evaluate(other, cast("nn.Module", other.module))[0]
        other.destroy()
    return Trained(start, saved, final, resumed, moved, used, types, loss, losses, resumed_losses)


def _engine(cell: Cell, world: World) -> DeepSpeedEngine:
    model = cell.make_model()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    groups = group_parameters(shapes, muon_parameter_names(model))
    optimizer = build_optimizer(model, groups, OptimSection(newton_schulz="gram"))
    engine = build_engine(model, optimizer, cell.ds_config(world.world_size))
    set_learning_rate(engine, LEARNING_RATE)
    return engine


def _steps(engine: DeepSpeedEngine, steps: range, world: World) -> list[float]:
    losses = []
    for step in steps:
        for slot in range(world.rank, SLOTS, world.world_size):
            ids = tokens(SLOTS * step + slot)
            loss = engine(ids[:, :-1], targets=ids[:, 1:]).loss
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
    return losses


def tokens(seed: int) -> Tensor:
    """(1, 17) int64."""
    return torch.randint(VOCABULARY, (1, 17), generator=torch.Generator().manual_seed(seed))


def _evaluate(engine: DeepSpeedEngine, model: nn.Module) -> tuple[Parameters, Tensor]:
    """The parameters that norms compute with in an evaluation, and its loss."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    used: Parameters = {}

    def look(norm: nn.Module, _: object) -> None:
        for parameter in norm.parameters(recurse=False):
            used[names[id(parameter)]] = parameter.detach().clone()

    owners = {id(p) for p in norm_parameters(model)}
    handles = [
        module.register_forward_pre_hook(look)  # stage 3 takes them away afterwards
        for module in model.modules()
        if any(id(p) in owners for p in module.parameters(recurse=False))
    ]
    ids = tokens(1000)
    with torch.no_grad():
        loss = engine(ids[:, :-1], targets=ids[:, 1:]).loss
    for handle in handles:
        handle.remove()
    return used, loss


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[tuple[Cell, Trained]]:
    """Each cell on two ranks, and what both saw of it."""
    folder = tmp_path_factory.mktemp("norm-gains")
    ranks = on_ranks(train_cells, CELLS, folder, ranks=2, tmp_path=folder)
    return [(cell, found) for rank in ranks for cell, found in zip(CELLS, rank, strict=True)]


def is_of_norm(name: str) -> bool:
    return "norm" in name or ".ln_" in name


def test_the_forward_pass_uses_the_masters_of_the_gains(outcomes):
    for cell, found in outcomes:
        assert found.used.keys() == {name for name in found.final if is_of_norm(name)}
        assert len(found.used) == {"dual": 5, "qwen3": 9, "gpt2": 10}[cell.family]
        for name, value in found.used.items():
            assert torch.equal(value, found.final[name]), (cell, name)
            assert not torch.equal(value, found.start[name]), (cell, name)
            # The test could fail: bf16 holds none of them.
            rounded = value.bfloat16().float()
            assert (value != rounded).float().mean() > 0.9, (cell, name)


def test_matrices_are_bf16_at_stages_1_and_3(outcomes):
    for cell, found in outcomes:
        for name, dtype in found.types.items():
            is_cast = cell.stage in (1, 3) and not is_of_norm(name)
            assert dtype == (torch.bfloat16 if is_cast else torch.float32), (cell, name)


def test_an_engine_starts_from_the_gains_of_its_model(outcomes):
    for cell, found in outcomes:
        for name, parameter in cell.make_model().named_parameters():
            exact = is_of_norm(name) or cell.stage in (0, 2)
            expected = parameter if exact else parameter.bfloat16().float()
            assert torch.equal(found.start[name], expected), (cell, name)


def test_losses_are_those_of_fp32_gains_beside_bf16_matrices(outcomes):
    for cell, found in outcomes:
        # The same operations in the same order, so bit for bit.
        assert torch.equal(found.loss, reference_loss(cell, found)), cell
        rounded = reference_loss(cell, found, gains=torch.bfloat16)
        assert not torch.equal(found.loss, rounded), cell


def reference_loss(cell: Cell, found: Trained, *, gains: torch.dtype = torch.float32) -> Tensor:
    """The loss of a plain model with the masters of the last step, its gains rounded or not."""
    model = cell.make_model()
    mode = bfloat16_mode("bf16", cell.stage)
    ids = tokens(1000)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found.final[name])
            if is_of_norm(name):
                parameter.copy_(parameter.to(gains))
            elif mode == "weights":
                parameter.data = parameter.bfloat16()
        casting = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext()
        with casting:
            return model(ids[:, :-1], targets=ids[:, 1:]).loss


def test_resuming_is_bit_for_bit(outcomes):
    for cell, found in outcomes:
        assert found.resumed_losses == found.losses[HALF:], cell
        for name, value in found.final.items():
            assert torch.equal(value, found.resumed[name]), (cell, name)


def test_another_stage_takes_the_gains_as_they_were(outcomes):
    moved = [(cell, found) for cell, found in outcomes if found.moved is not None]
    assert len(moved) == 2 * 2
    for cell, found in moved:
        masters, used = found.moved
        for name, value in found.saved.items():
            assert torch.equal(masters[name], value), (cell, name)
            assert name not in used or torch.equal(used[name], value), (cell, name)
        assert len(used) == len(found.used)
