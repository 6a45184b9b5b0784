"""A tiny model for tests of scoring, its scorer, and requests."""

from __future__ import annotations

from dataclasses import replace

import torch
from helpers.models import add_noise

from dualtrain.common.vocabulary import Vocabulary
from dualtrain.evaluate.scoring import Request, Scorer
from dualtrain.model.handle import ModelHandle
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM

WORDS = 24
MASK = 4
VOCABULARY = Vocabulary(size=WORDS, special_ids=(0, 1, 2, 3, MASK), bos_id=1, eos_id=2, mask=MASK)
OPEN_VOCABULARY = replace(VOCABULARY, special_ids=())
"""Every token may be scored, so that all probabilities can be summed."""
CONTEXT = 32


def make_model(dtype: torch.dtype = torch.float64) -> DualLM:
    """Every weight matters: those of a new model's attention and MLP outputs are zero."""
    config = DualConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=44,
    )
    return add_noise(DualLM(config), 0.2).to(dtype)


def make_scorer(forward=None, dtype: torch.dtype = torch.float64, **options) -> Scorer:
    handle = make_handle(forward or make_model(dtype), dtype=dtype)
    of_model = {name: options.pop(name) for name in vars(handle).keys() & options.keys()}
    return Scorer(replace(handle, **of_model), **options)


def make_handle(model, **options) -> ModelHandle:
    return ModelHandle(model=model, context=CONTEXT, **({"vocabulary": VOCABULARY} | options))


class Recorder:
    """A forward that keeps what it is called with and what it returns."""

    def __init__(self, model, *, fixed_target: int | None = None, fail=None) -> None:
        self.model, self.fixed_target, self.fail = model, fixed_target, fail
        self.inputs, self.outputs = [], []

    def __call__(self, input_ids, *, selection, targets, **options):
        if self.fail:
            self.fail(input_ids)
        if self.fixed_target is not None:
            targets = torch.full_like(targets, self.fixed_target)
        self.inputs.append(input_ids)
        self.outputs.append(self.model(input_ids, selection=selection, targets=targets, **options))
        return self.outputs[-1]

    @property
    def tokens(self) -> int:
        return sum(ids.numel() for ids in self.inputs)


def some_requests() -> list[Request]:
    """Nested, equal, with common beginnings, with special tokens, of many lengths."""
    generator = torch.Generator().manual_seed(1)
    contexts = [(1, *torch.randint(5, WORDS, (n,), generator=generator).tolist()) for n in range(8)]
    requests = []
    for context in contexts:
        for length in (1, 2, 2, 3, 7):
            tokens = torch.randint(5, WORDS, (length,), generator=generator).tolist()
            requests.append(Request(context, tuple(tokens)))
            requests.append(Request(context, (*tokens[:-1], 9)))
        requests.append(Request(context, (8, 2, 9)))
    requests.append(Request(contexts[3][:2], contexts[3][2:] + (6, 7)))
    return requests + requests[:3]
