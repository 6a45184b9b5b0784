"""Functions that test_engine.py runs on real ranks, with real DeepSpeed."""

from __future__ import annotations

import torch
from torch import nn

from dualtrain.engine import (
    build_engine,
    build_optimizer,
    group_parameters,
    init_distributed,
    leave_distributed,
    prepare_process,
    set_learning_rate,
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
    init_distributed(timeout_s=60)
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
            set_learning_rate(engine, groups, learning_rate)
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
    from dualtrain.recipe.merge import merge_settings

    return merge_settings(
        f"zero{stage}",
        precision=precision,
        micro_batch=1,
        accumulation=slots // world,
        world_size=world,
    )
