"""The model: configuration, transformer, attention plans, fused loss.

Names are loaded when they are first used, so that counting parameters costs no import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dualtrain.model.arithmetic import (
        ImportedSizes,
        ModelSizes,
        ParameterCount,
        count_parameters,
        flops_per_token,
    )
    from dualtrain.model.attention import (
        AttentionPlan,
        plan_attention,
        resolve_backend,
        to_device,
    )
    from dualtrain.model.cache import KeyValueCache
    from dualtrain.model.config import DualConfig
    from dualtrain.model.imported import ImportedLM
    from dualtrain.model.loss import OutputLayer, select_positions
    from dualtrain.model.output import DualOutput
    from dualtrain.model.transformer import DualLM, muon_parameter_names

_HOMES = {
    "arithmetic": (
        "ImportedSizes",
        "ModelSizes",
        "ParameterCount",
        "count_parameters",
        "flops_per_token",
    ),
    "attention": ("AttentionPlan", "plan_attention", "resolve_backend", "to_device"),
    "cache": ("KeyValueCache",),
    "config": ("DualConfig",),
    "imported": ("ImportedLM",),
    "loss": ("OutputLayer", "select_positions"),
    "output": ("DualOutput",),
    "transformer": ("DualLM", "muon_parameter_names"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AttentionPlan",
    "DualConfig",
    "DualLM",
    "DualOutput",
    "ImportedLM",
    "ImportedSizes",
    "KeyValueCache",
    "ModelSizes",
    "OutputLayer",
    "ParameterCount",
    "count_parameters",
    "flops_per_token",
    "muon_parameter_names",
    "plan_attention",
    "resolve_backend",
    "select_positions",
    "to_device",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
