"""A random model for the samplers' tests, and its outputs by one plain pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dualtrain.common import randomness
from dualtrain.model.handle import ModelHandle
from dualtrain.network.attention import plan_attention
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM

WORDS, CONTEXT, SPECIAL, MASK = 30, 32, (0, 1, 2, 3, 4), 4


def random_model(vocabulary: int = WORDS, head: str = "paper") -> DualLM:
    """As made, the blocks would add nothing, and the context would not matter."""
    config = DualConfig(
        vocabulary,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        head=head,
        max_position_embeddings=CONTEXT,
    )
    model = DualLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval()


def with_ids(model: ModelHandle, **changes: object) -> ModelHandle:
    """The same with another vocabulary."""
    return replace(model, vocabulary=replace(model.vocabulary, **changes))


def logits_of(model: DualLM, ids: list[int], kind: str = "causal", prefix: int = 0) -> Tensor:
    """The logits of a row, (T, V)."""
    plan = plan_attention(
        kind,
        torch.zeros(1, len(ids), dtype=torch.int32),
        backend="sdpa",
        device="cpu",
        in_prefix=torch.arange(len(ids))[None] < prefix if kind == "prefix" else None,
    )
    with torch.no_grad():
        return model(torch.tensor([ids]), attention=plan).logits[0]


def allowed(logits: Tensor, *, may_stop: bool) -> Tensor:
    """Logits without special tokens, but for those that end a text."""
    logits = logits.clone()
    logits[..., [token for token in SPECIAL if not (may_stop and token in (1, 2))]] = -torch.inf
    return logits


def generators(rows: int, seed: int = 0) -> list[np.random.Generator]:
    return [randomness.generator(seed, "generate", row, 0) for row in range(rows)]
