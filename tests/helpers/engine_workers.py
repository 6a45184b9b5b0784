"""Functions that test_engine.py runs on real ranks, with real DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from dualtrain.algorithms.events import Algorithm, Event, Logger, State
from dualtrain.engine.build import (
    build_engine,
    build_optimizer,
    set_learning_rate,
)
from dualtrain.engine.groups import group_parameters
from dualtrain.engine.process import (
    init_distributed,
    leave_distributed,
    prepare_process,
)
from dualtrain.recipe.schema import OptimSection

MUON = ("wide.weight", "tall.weight", "square.weight")
LEARNING_RATES = (7e-3, 7e-3, 5e-3, 2e-3, 1e-3)


def tiny_model() -> nn.Module:
    """Matrices wider than tall, taller than wide and square; an embedding, a norm and a bias."""
    torch.manual_seed(0)
    model = nn.Module()
    model.embedding = nn.Embedding(13, 12)
    model.wide = nn.Linear(12, 5, bias=False)
    model.tall = nn.Linear(5, 20, bias=False)
    model.square = nn.Linear(20, 20, bias=False)
    model.norm = nn.LayerNorm(20)
    model.out = nn.Linear(20, 13)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        hidden = model.tall(torch.tanh(model.wide(model.embedding(tokens))))
        logits = model.out(model.norm(model.square(torch.relu(hidden))))
        return nn.functional.cross_entropy(logits.float(), (tokens * 5 + 3) % 13)

    model.forward = forward
    return model


def slot_tokens(step: int, slot: int) -> torch.Tensor:
    """(7,) int64: what one slot sees, whoever runs it."""
    generator = torch.Generator().manual_seed(1000 * step + slot)
    return torch.randint(13, (7,), generator=generator)


def train_cases(cases: list[tuple[int, str, str]], slots: int) -> list[dict[str, torch.Tensor]]:
    """Train the tiny model once for each (stage, precision, optimizer); return final parameters."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param

    prepare_process(compile_model=False)
    init_distributed(timeout_s=600)
    rank, world = dist.get_rank(), dist.get_world_size()
    results = []
    for stage, precision, name in cases:
        model = tiny_model()
        shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
        groups = group_parameters(shapes, MUON if name == "muon" else ())
        optim = OptimSection(name=name, newton_schulz="gram")
        config = ds_config(stage, precision, slots=slots, world=world)
        engine = build_engine(model, build_optimizer(model, groups, optim), config)
        for step, learning_rate in enumerate(LEARNING_RATES):
            set_learning_rate(engine, learning_rate)
            for slot in range(rank, slots, world):
                engine.backward(engine(slot_tokens(step, slot)))
                engine.step()
        final = {}
        for key, parameter in engine.module.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            final[key] = (parameter if full is None else full).detach().float().clone()
        results.append(final)
        engine.destroy()
        del engine
    leave_distributed()
    return results


def ds_config(stage: int, precision: str, *, slots: int, world: int) -> dict[str, object]:
    from dualtrain.engine.config import merge_settings

    return merge_settings(
        f"zero{stage}",
        precision=precision,
        micro_batch=1,
        accumulation=slots // world,
        world_size=world,
    )


class Shift(Algorithm):
    """Change initial values at INIT, as a user's algorithm may; keep what it found there."""

    def match(self, event: Event, state: State) -> bool:
        return event is Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        weight = state.model.head_projection.weight
        assert weight.shape == (32, 32)
        with torch.no_grad():
            weight.add_(torch.eye(32), alpha=0.5)

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        return None


def partitioned_models(precisions: list[str], folder: str) -> list[dict[str, object]]:
    """Build the same model whole and partitioned from the start, and train both a little.

    Returns:
        For each precision, by name: `values` (whole, partitioned), `groups` (likewise), `trained`
        (likewise), `loaded` (what was loaded, partitioned) and the `largest` number of elements
        that a parameter had in memory while the model was partitioned.
    """
    import torch.distributed as dist

    prepare_process(compile_model=False)
    init_distributed(timeout_s=600)
    rank, world = dist.get_rank(), dist.get_world_size()
    results = [_whole_and_partitioned(p, Path(folder), rank, world) for p in precisions]
    leave_distributed()
    return results


def _whole_and_partitioned(precision: str, folder: Path, rank: int, world: int) -> dict:
    import torch.distributed as dist
    from safetensors.torch import save_file

    from dualtrain.checkpoint.store import load_weights
    from dualtrain.engine.parameters import muon_parameter_names, parameter_shapes
    from dualtrain.model.build import build_model
    from dualtrain.recipe.schema import ModelSection

    info = SimpleNamespace(vocab_size=60, bos_id=0, eos_id=1, pad_id=2, mask_id=3)
    recipe = SimpleNamespace(
        model=ModelSection(layers=3, width=12, heads=2, mlp_width=20, head="paper"),
        seed=5,
        sequence_length=8,
    )
    config = ds_config(3, precision, slots=2 * world, world=world)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    models = [build_model(recipe, info), build_model(recipe, info, config)]
    result = {"largest": max(parameter.numel() for parameter in models[1].parameters())}
    result["values"] = [whole_values(model) for model in models]
    result["groups"] = [
        group_parameters(parameter_shapes(model), muon_parameter_names(model)) for model in models
    ]
    result["trained"] = [
        _train_dual(model, groups, config, rank)
        for model, groups in zip(models, result["groups"], strict=True)
    ]
    changed = {name: value.float() + 0.3 for name, value in result["values"][0].items()}
    if rank == 0:
        save_file(changed, folder / "weights.safetensors")
    dist.barrier()
    again = build_model(recipe, info, config)
    load_weights(folder, again)
    result["loaded"] = [changed, whole_values(again)]
    return result


def whole_values(model: nn.Module) -> dict[str, torch.Tensor]:
    from dualtrain.engine.parameters import whole_parameters

    with whole_parameters(model.parameters()):
        return {name: value.detach().clone() for name, value in model.named_parameters()}


def _train_dual(model: nn.Module, groups: list, config: dict, rank: int) -> dict:
    """Two steps of two slots on numbers that are no text."""
    from deepspeed.utils import safe_get_full_fp32_param

    engine = build_engine(model, build_optimizer(model, groups, OptimSection()), config)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(4):
        tokens = torch.randint(60, (1, 9), generator=generator)
        engine.backward(engine(tokens[:, :-1], targets=tokens[:, 1:]).loss)
        engine.step()
    final = {
        name: safe_get_full_fp32_param(parameter).clone()
        for name, parameter in engine.module.named_parameters()
    }
    engine.destroy()
    return final
