"""What a recipe's model takes: parameters, checkpoint size, memory of a rank, operations.

Called by ``derive``. Parameters and operations are exact; bytes are estimates, made from how
DeepSpeed keeps weights, gradients and states at each ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dualtrain.engine.config import BFloat16, DsConfig, bfloat16_mode
from dualtrain.engine.groups import ParameterGroup, group_parameters
from dualtrain.method.mixing import Objective
from dualtrain.network.arithmetic import (
    ModelSizes,
    flops_per_token,
)
from dualtrain.recipe.schema import Recipe

FP32, BF16 = 4, 2

LOGIT_ROWS = 2048
"""Positions whose logits exist at the same time, roughly: the loss works in chunks."""


@dataclass(frozen=True)
class ModelCost:
    """What a model takes.

    Attributes:
        muon_parameters: Those that Muon updates, if it is used.
        groups: How the optimizer divides them, unless an algorithm changes the model.
        flops_per_token: Operations of training on an input token, by objective.
        training_flops: Operations of the whole run, forward and backward.
    """

    parameters: int
    without_vocabulary: int
    muon_parameters: int
    groups: tuple[ParameterGroup, ...]
    flops_per_token: Mapping[Objective, float]
    training_flops: float
    checkpoint_bytes: int
    memory: Memory


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on the device of one rank.

    Attributes:
        weights: What the forward pass uses; 0 where they are in host memory, from which it takes
            a few at a time.
        gradients: Accumulated and, where they differ, those of the backward pass.
        optimizer: fp32 master weights and states; 0 where they are in host memory.
        activations: Saved for the backward pass, and the logits of a chunk; rough.
        host: Of all these, what is in host memory instead.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.gradients + self.optimizer + self.activations


def model_cost(
    recipe: Recipe,
    sizes: ModelSizes,
    ds_config: DsConfig,
    *,
    world_size: int,
    ar_tokens: int,
    diffusion_tokens: int,
) -> ModelCost:
    """Compute what the recipe's model takes.

    Args:
        ar_tokens: Input tokens of the run's AR slots.
        diffusion_tokens: Input tokens of its diffusion slots.
    """
    parameters = sizes.parameters
    groups = optimizer_groups(recipe, sizes)
    muon = sum(group.elements for group in groups if group.uses_muon)
    length = recipe.sequence_length
    flops: dict[Objective, float] = {
        "ar": flops_per_token(sizes, length, "causal"),
        "diffusion": flops_per_token(sizes, length, "full"),
    }
    mode = bfloat16_mode(recipe.engine.precision, ds_config.stage)
    # AdamW keeps two moments, Muon one momentum.
    states = FP32 * (2 * parameters - muon)
    return ModelCost(
        parameters=parameters,
        without_vocabulary=parameters - sizes.elements(sizes.vocabulary),
        muon_parameters=muon,
        groups=groups,
        flops_per_token=flops,
        training_flops=ar_tokens * flops["ar"] + diffusion_tokens * flops["diffusion"],
        checkpoint_bytes=_checkpoint_bytes(parameters, states, ds_config.stage, mode),
        memory=_memory(
            parameters, states, _activations(recipe, sizes), ds_config, mode, world_size
        ),
    )


def optimizer_groups(recipe: Recipe, sizes: ModelSizes) -> tuple[ParameterGroup, ...]:
    """The groups that the engine will have."""
    muon = sizes.muon_matrices if recipe.optim.name == "muon" else ()
    return tuple(group_parameters(sizes.shapes, muon))


def _checkpoint_bytes(parameters: int, states: int, stage: int, mode: BFloat16) -> int:
    """fp32 weights for use elsewhere, and DeepSpeed's files: module, master weights, states."""
    module = parameters * (BF16 if mode == "weights" else FP32)
    # At stage 3 the module has no weights of its own; at stage 0 it is its own master.
    own = (0 if stage == 3 else module) + (0 if stage == 0 else FP32 * parameters)
    return FP32 * parameters + own + states


def _memory(
    parameters: int, states: int, activations: int, ds_config: DsConfig, mode: BFloat16, ranks: int
) -> Memory:
    stage = ds_config.stage
    weights = parameters * (BF16 if mode == "weights" else FP32) // (ranks if stage == 3 else 1)
    # BF16_Optimizer accumulates bf16 gradients into whole fp32 ones.
    gradients = parameters * (FP32 + BF16 * (mode == "weights" and stage == 1))
    master = FP32 * parameters if stage >= 1 else 0
    optimizer = (master + states) // (ranks if stage >= 1 else 1)
    moved_optimizer = optimizer if ds_config.offloads_optimizer else 0
    moved_weights = weights if ds_config.offloads_parameters else 0
    return Memory(
        weights=weights - moved_weights,
        gradients=gradients // (ranks if stage >= 2 else 1),
        optimizer=optimizer - moved_optimizer,
        activations=activations,
        host=moved_optimizer + moved_weights,
    )


def _activations(recipe: Recipe, sizes: ModelSizes) -> int:
    """Bytes that a micro-batch leaves for its backward pass.

    A block saves about ten vectors of the width (two residuals, two normalised inputs, queries,
    keys and values before and after rotation, the attention's output) and four of the MLP's.
    """
    tokens = recipe.micro_batch * recipe.sequence_length
    size = BF16 if recipe.engine.precision == "bf16" else FP32
    block = tokens * (10 * sizes.hidden_size + 4 * sizes.intermediate_size) * size
    if recipe.model.activation_checkpointing:
        body = sizes.num_hidden_layers * tokens * sizes.hidden_size * size + block
    else:
        body = sizes.num_hidden_layers * block
    logits = 2 * min(tokens, LOGIT_ROWS) * sizes.vocab_size * FP32
    return body + logits
