"""A model one can call: what scoring, sampling and held-out losses are given, whole.

``checkpoint.trained`` makes one of a checkpoint or an export; ``training`` makes one of the engine
that a run trains.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dualtrain.common.vocabulary import Vocabulary
from dualtrain.network.output import DualOutput

Target = Literal["next", "in_place"]


@dataclass(frozen=True, kw_only=True)
class ModelHandle:
    """A model, and all that has to be known to call it and to read what it returns.

    Attributes:
        model: A ``DualLM``, an ``ImportedLM``, or a DeepSpeed engine around one.
        context: The longest row it reads, in tokens.
        target: What its diffusion objective predicts at i: token i+1, or i.
        dtype: What attention is computed in, which its kernels depend on.
        autocast: Whether its fp32 weights are used in ``dtype``; an engine sees to that itself.
        backend: Attention backend for plans that leave a choice.
        world_size: Processes that call it together, each pass of all the same; under ZeRO-3 they
            gather its parameters together.
    """

    model: Callable[..., DualOutput]
    vocabulary: Vocabulary
    context: int
    target: Target = "next"
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    backend: str = "sdpa"
    rank: int = 0
    world_size: int = 1

    def __call__(self, *inputs: object, **options: object) -> DualOutput:
        """Run the model; with :meth:`inference` around."""
        if not self.autocast:
            return self.model(*inputs, **options)
        with torch.autocast(self.device.type, self.dtype):
            return self.model(*inputs, **options)

    @contextmanager
    def inference(self, *, compiled: bool = False) -> Iterator[None]:
        """Put the model in evaluation mode, without gradients, and put it back afterwards.

        ``torch.no_grad`` rather than ``inference_mode``: ZeRO-3 gathers parameters into tensors
        that training uses again.

        Args:
            compiled: Whether compiled blocks run as such; they need a graph for every shape.
        """
        # An engine keeps its own flag and sets its module's; the module's is the one that counts.
        inner: Any = getattr(self.model, "module", self.model)
        was_training = isinstance(inner, nn.Module) and inner.training
        # Where the compiler was never imported, which takes a second, nothing is compiled.
        eager = not compiled and "torch._dynamo" in sys.modules
        if was_training:
            inner.eval()
        try:
            stance = torch.compiler.set_stance("force_eager") if eager else nullcontext()
            with torch.no_grad(), stance:
                yield
        finally:
            if was_training:
                inner.train()
