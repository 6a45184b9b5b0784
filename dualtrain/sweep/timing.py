"""Timing a recipe's model on this machine, without a dataset and without DeepSpeed."""

from __future__ import annotations

import time

import torch

from dualtrain.mixing import Objective
from dualtrain.model import (
    DualConfig,
    DualLM,
    plan_attention,
    resolve_backend,
    select_positions,
    to_device,
)
from dualtrain.objectives import autoregressive, diffusion, masking_noise
from dualtrain.recipe.estimates import model_sizes
from dualtrain.recipe.schema import Recipe, UniformCorruption
from dualtrain.trained import choose

WARM_UPS, PASSES = 1, 3
SPECIAL = (0, 1, 2, 3, 4)


def time_slot(recipe: Recipe, vocab_size: int, objective: Objective) -> float:
    """Seconds of a forward and backward pass of one slot, on random tokens.

    Args:
        recipe: With a model of our own.
        vocab_size: Of its tokenizer.
        objective: Of the slot.
    """
    device = choose(None)
    is_bf16 = recipe.engine.precision == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    model = _model(recipe, vocab_size)
    torch.nn.Module.to(model, device)
    backend = resolve_backend(recipe.model.attention, device, dtype)
    rows, length = recipe.micro_batch, recipe.sequence_length
    inputs, targets = torch.randint(16, vocab_size, (2, rows, length))
    documents = torch.zeros(rows, length, dtype=torch.int64)
    if objective == "ar":
        example = autoregressive(inputs, targets, documents, special_ids=SPECIAL)
    else:
        example = diffusion(
            inputs,
            targets,
            documents,
            mask_id=SPECIAL[-1],
            special_ids=SPECIAL,
            noise=masking_noise(0, "timing", 0, list(range(rows)), length),
            corruption=UniformCorruption(),
        )
    selection = select_positions(example.weights)
    moved = example.to(device)
    chosen = None if selection is None else to_device(selection, device)
    began = 0.0
    for number in range(WARM_UPS + PASSES):
        if number == WARM_UPS:
            began = _now(device)
        plan = plan_attention(
            example.attention, documents, backend=backend, device=device, dtype=dtype
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            output = model(
                moved.input_ids,
                attention=plan,
                targets=moved.targets,
                weights=moved.weights,
                z_loss=recipe.objective.z_loss,
                selection=chosen,
            )
        output.loss.backward()
    return (_now(device) - began) / PASSES


def _model(recipe: Recipe, vocab_size: int) -> DualLM:
    section = recipe.model
    config = DualConfig(
        vocab_size=model_sizes(section, vocab_size).vocab_size,
        width=section.width,
        layers=section.layers,
        heads=section.heads,
        mlp_width=section.mlp_width,
        head=section.head,
        sequence_length=recipe.sequence_length,
    )
    return DualLM(config, seed=recipe.seed)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
