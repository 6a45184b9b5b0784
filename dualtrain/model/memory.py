"""How many tokens a forward pass of scoring takes: chosen by memory, halved when that runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dualtrain.engine.parameters import whole_shape
from dualtrain.model.handle import ModelHandle

CPU_TOKENS = 2048
"""From here on larger batches are no faster on a CPU."""
MOST_GPU_TOKENS = 65536
_SHARE_OF_FREE_MEMORY = 0.5
# The output layer computes chunks of logits, and their softmax, of this size together.
_HEAD_BYTES = 2 << 30
# Activations of the widest moment of a block, in multiples of the model's width.
_WIDTHS = 32


def choose_tokens(model: ModelHandle) -> int:
    """Choose the tokens of a forward pass, padding included.

    On a GPU from the free memory and the width of the model, generously: a batch that does not fit
    after all is halved.
    """
    device = model.device
    if device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds and does not use is free for us.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    usable = max(0.0, free * _SHARE_OF_FREE_MEMORY - _HEAD_BYTES)
    tokens = int(usable / (4 * _WIDTHS * _width(model.model)))
    return min(max(tokens, CPU_TOKENS), MOST_GPU_TOKENS)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU's allocator and the libraries of CUDA raise nothing more specific.
    signs = ("defaultcpuallocator", "not enough memory", "out of memory", "alloc_failed")
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _width(model: Callable[..., object]) -> int:
    """Size of the model's vectors; 1024 where it cannot be seen."""
    for module in (model, getattr(model, "module", None)):
        find = getattr(module, "get_input_embeddings", None)
        if isinstance(module, nn.Module) and callable(find):
            embedding: Any = find()
            weight = embedding.weight
            # Under ZeRO-3 the parameter itself is empty.
            return whole_shape(weight)[-1]
    return 1024
