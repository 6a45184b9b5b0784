"""Models of several tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from dualtrain.network.transformer import DualLM

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

AnyModel = TypeVar("AnyModel", bound=nn.Module)
MUON = ("wide.weight", "tall.weight", "square.weight")
"""What Muon trains of :func:`tiny_model`."""


def add_noise(model: AnyModel, scale: float, seed: int = 0) -> AnyModel:
    """Make every parameter matter: the outputs of new attention and MLPs are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model


def tiny_model() -> nn.Module:
    """Matrices wider than tall, taller than wide and square; an embedding, a norm and a bias."""
    torch.manual_seed(0)
    model = nn.Module()
    model.embedding = nn.Embedding(13, 12)
    model.wide = nn.Linear(12, 5, bias=False)
    model.tall = nn.Linear(5, 20, bias=False)
    model.square = nn.Linear(20, 20, bias=False)
    model.norm = nn.LayerNorm(20)
    model.out = nn.Linear(20, 13)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        hidden = model.tall(torch.tanh(model.wide(model.embedding(tokens))))
        logits = model.out(model.norm(model.square(torch.relu(hidden))))
        return nn.functional.cross_entropy(logits.float(), (tokens * 5 + 3) % 13)

    model.forward = forward
    return model


def slot_tokens(step: int, slot: int) -> torch.Tensor:
    """(7,) int64: what one slot sees, whoever runs it."""
    generator = torch.Generator().manual_seed(1000 * step + slot)
    return torch.randint(13, (7,), generator=generator)


def to_llama(model: DualLM) -> LlamaForCausalLM:
    """The Llama that a model with the linear head is exported as, with copies of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dualtrain.model.exported import exported_config

    values = exported_config(model.config, target="next", append_eos=True)
    llama = LlamaForCausalLM(LlamaConfig.from_dict(values))
    llama.load_state_dict(model.state_dict())
    return llama.train(model.training)


def save_model(model: DualLM, directory: Path) -> None:
    """Write a model as the directory of one, without code and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(model.config.to_json_string())
    save_file(model.state_dict(), directory / "model.safetensors")


def padded(rows, *, side="left"):
    """Rows of different lengths as a batch and its attention mask."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), 3)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[number, where], mask[number, where] = row, 1
    return ids, mask
