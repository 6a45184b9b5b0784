"""Initial weights: the paper's distributions, from a seed and a parameter's name alone.

Each parameter draws from a generator of its own, on the CPU, so its values depend neither on the
other parameters nor on the device, the number of ranks or any global generator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dualtrain.common.randomness import generator
from dualtrain.network.config import DualConfig

_TRUNCATION = 2.0  # in standard deviations
_BLOCK = 1 << 22  # numbers drawn at once: bounds the memory of a large matrix's initialisation


def initial_std(name: str, config: DualConfig) -> float:
    """Return the standard deviation, before truncation, of a matrix's initial values.

    sqrt(2 / (5 W)) for queries, keys, values, gate, up and the head's projection; gate and up of
    layer i (from 0) times sqrt(1 / (2 (i + 1))); sqrt(2 / (W + V)) for the embedding and the
    output matrix; 0 for the matrices that write into the residual stream (Samuel and Charpentier
    2025, released code).
    """
    module = name.split(".")[-2]
    body = math.sqrt(2 / (5 * config.hidden_size))
    if module in ("o_proj", "down_proj"):
        return 0.0
    if module in ("embed_tokens", "lm_head"):
        return math.sqrt(2 / (config.hidden_size + config.vocab_size))
    if module in ("gate_proj", "up_proj"):
        layer = int(name.split("layers.")[1].split(".")[0])
        return body * math.sqrt(1 / (2 * (layer + 1)))
    if module in ("q_proj", "k_proj", "v_proj", "head_projection"):
        return body
    raise ValueError(f"no initialisation for a parameter named {name!r}")


@torch.no_grad()
def initialize_parameter(name: str, parameter: Tensor, config: DualConfig, seed: int) -> None:
    """Fill one parameter of ``DualLM`` with its initial values, in place, on any device."""
    if parameter.ndim == 1:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    std = initial_std(name, config)
    if std == 0:
        parameter.zero_()
    else:
        parameter.copy_(truncated_normal(parameter.shape, std, seed, name))


def truncated_normal(shape: torch.Size, std: float, seed: int, name: str) -> Tensor:
    """Draw from a normal distribution cut at two standard deviations.

    Args:
        std: Standard deviation of the normal distribution before it is cut (what remains has
            0.88 of it).

    Returns:
        float32 on the CPU; the quantile function applied to uniform numbers.
    """
    random = generator(seed, f"initial values of {name}")
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    for block in values.view(-1).split(_BLOCK):
        block.copy_(torch.from_numpy(random.random(block.numel(), dtype="float32")))
    # P(|x| < 2 std) = erf(2 / sqrt(2)); uniform on that interval, then the inverse.
    values.mul_(2).sub_(1).mul_(math.erf(_TRUNCATION / math.sqrt(2)))
    return values.erfinv_().mul_(math.sqrt(2) * std)
