"""A model's parameters, whole or partitioned: their shapes, gathering them, making them divided.

ZeRO stage 3 leaves every rank a part of each parameter; what is known of the whole, DeepSpeed keeps
in attributes of the parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


def is_partitioned(parameter: Tensor) -> bool:
    """Whether this rank has only a part of it."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape, of the whole where it is partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Whole shape of each trainable parameter by name, in model order."""
    return {n: whole_shape(p) for n, p in model.named_parameters() if p.requires_grad}


def muon_parameter_names(model: nn.Module) -> list[str]:
    """Name the matrices that Muon updates, in model order: all but embeddings and output matrix.

    Matrices that a Hugging Face model has fused, such as GPT-2's queries, keys and values, are one.
    """
    tables = [part.weight for part in model.modules() if isinstance(part, nn.Embedding)]
    output = cast("Any", model).get_output_embeddings().weight
    vocabulary = {id(weight) for weight in (*tables, output)}
    return [
        name
        for name, parameter in model.named_parameters()
        if len(whole_shape(parameter)) == 2 and id(parameter) not in vocabulary
    ]


def partitioned_build(config: Mapping[str, Any]) -> AbstractContextManager[object]:
    """A context in which modules are made with partitioned parameters, at stage 3 only.

    No rank ever holds the whole model then. Values that a module's ``__init__`` gives its
    parameters survive, values that come later need :func:`whole_parameters`.
    """
    zero = config["zero_optimization"]
    if zero["stage"] != 3:
        return contextlib.nullcontext()
    import deepspeed

    # It would replace torch's linear function, for the whole training and in every model.
    plain = {**config, "zero_optimization": {**zero, "memory_efficient_linear": False}}
    return deepspeed.zero.Init(config_dict_or_path=plain)


@contextlib.contextmanager
def whole_parameters(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gather those that are partitioned for the time of the block; every rank must enter.

    Changes made on rank 0 are given to all at the end; those made on other ranks are lost.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield


def gather_weights(engine: DeepSpeedEngine, *, keep: bool) -> dict[str, Tensor]:
    """The fp32 master weights by name, on the CPU; all ranks call, those that ``keep`` get them.

    Gathered one by one, so that only the keeping rank holds the whole model.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, Tensor] = {}
    for name, parameter in module_of(engine).named_parameters():
        full = None
        if is_partitioned(parameter) or parameter.dtype != torch.float32:
            # A collective, so every rank asks. None for what is frozen; elsewhere the parameter has
            # the values of its master.
            full = safe_get_full_fp32_param(parameter)
        with whole_parameters([parameter] if full is None else ()):
            if keep:
                source = parameter if full is None else full
                held = source.detach().float().cpu().contiguous()
                # A parameter that was gathered for this block alone goes with it.
                weights[name] = held.clone() if is_partitioned(parameter) else held
    return weights


def module_of(engine: DeepSpeedEngine) -> nn.Module:
    """The model that an engine wraps."""
    module = engine.module
    assert isinstance(module, nn.Module)
    return module
