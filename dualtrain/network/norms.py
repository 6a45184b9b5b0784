"""Norms, whose gains stay fp32 where the rest of a model is made bf16.

A gain is near 1, where bf16 has steps of 0.4 to 0.8 %: most updates are smaller, so a rounded gain
stands still for many steps and then jumps. A norm whose ``keeps_float32`` is true takes input of
any type beside fp32 parameters of its own, and returns the input's type.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn


def exempt_norms(model: nn.Module) -> None:
    """Let the norms of a transformers model have fp32 parameters in a bf16 model."""
    for module in model.modules():
        # Every family has an RMSNorm of its own.
        if type(module).__name__.endswith("Norm"):
            cast("Any", module).keeps_float32 = True
            # Not a class: zero.Init would take one that is made inside it for the model's own.
            module.forward = MethodType(_forward, module)


def _forward(norm: nn.Module, hidden: Tensor) -> Tensor:
    if torch.is_autocast_enabled(hidden.device.type):
        return type(norm).forward(norm, hidden)
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return type(norm).forward(norm, hidden.to(weight.dtype)).to(hidden.dtype)


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The gains, and biases, of the norms that keep them in fp32."""
    norms = (module for module in model.modules() if getattr(module, "keeps_float32", False))
    return [parameter for norm in norms for parameter in norm.parameters(recurse=False)]
