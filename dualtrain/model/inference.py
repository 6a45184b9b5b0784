"""Run a model for its outputs only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def inference(forward: Callable[..., object]) -> Iterator[None]:
    """Put the model in evaluation mode, without gradients, and put it back afterwards.

    ``torch.no_grad`` rather than ``inference_mode``: ZeRO-3 gathers parameters into tensors that
    training uses again.

    Args:
        forward: A module, a DeepSpeed engine around one, or a plain function, which has no mode.
    """
    # An engine keeps its own flag and sets its module's; the module's is the one that counts.
    inner = getattr(forward, "module", forward)
    was_training = isinstance(inner, nn.Module) and inner.training
    if was_training:
        inner.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            inner.train()
