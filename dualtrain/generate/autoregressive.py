"""Text from left to right, one token a pass, with a key-value cache.

A batch of prompts of any lengths, read causally, or bidirectionally (prefix mode); what follows is
causal either way. Equal prompts are read once. Every row has its own random numbers, so that its
text does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dualtrain.common.errors import UserError
from dualtrain.generate.choose import Sampling, choose, penalise
from dualtrain.generate.text_model import TextModel, fill_up
from dualtrain.network.cache import KeyValueCache

Stop = Literal["end", "asked", "tokens", "context", "filled"]
"""Why a text ended: a token that ends texts, a caller that has enough, as many tokens as were asked
for, no room, no gap left."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What follows a prompt.

    Attributes:
        ids: New tokens; the one that ended the text is left out.
    """

    ids: tuple[int, ...]
    stop: Stop


def continue_prompts(
    model: TextModel,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    generators: Sequence[np.random.Generator],
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    kind: Literal["causal", "full"] = "causal",
    on_token: Callable[[int, int | None], None] | None = None,
    is_enough: Callable[[int, Sequence[int]], bool] | None = None,
) -> list[Continuation]:
    """Continue prompts.

    A model reads at most ``context`` tokens: a text ends (``context``) where the next token would
    take more than that. There is no sliding window: no token leaves the text behind one's back.

    Args:
        prompts: Their ids, usually beginning with ``<s>``.
        tokens: Tokens to generate for each, at most.
        generators: One for each prompt, of its random numbers.
        kind: How a prompt sees itself; ``full`` is prefix mode.
        on_token: Told the row and each new token as it is there, and None once its text has ended.
        is_enough: Asked after each token, with the row and its new tokens, whether the text ends.

    Returns:
        One for each prompt, in order.

    Raises:
        UserError: A prompt is empty or longer than the context, or no token is asked for.
    """
    rows = [
        _Row(number, len(prompt), generator)
        for number, (prompt, generator) in enumerate(zip(prompts, generators, strict=True))
    ]
    _check(model, rows, tokens)
    tell = on_token or (lambda row, token: None)
    is_enough = is_enough or (lambda row, ids: False)
    going = rows
    with model.inference():
        limits = [row.limit(tokens, model.context) for row in rows]
        cache, logits = _read(model, prompts, limits, kind)
        # Which tokens each text has, for the repetition penalty.
        seen = _mark(prompts, logits) if sampling.repetition_penalty != 1 else None
        while going:
            drawn = _next_tokens(logits, seen, sampling, going)
            for row, token in zip(going, drawn.tolist(), strict=True):
                row.take(token, model, tokens, tell, is_enough)
            kept = [
                index
                for index, row in enumerate(going)
                if row.passes < limits[row.number] and (model.lockstep or row.stop is None)
            ]
            if len(kept) < len(going):
                going, drawn = [going[index] for index in kept], drawn[kept]
                cache.select(kept)
                seen = None if seen is None else seen[kept]
            if going:
                if seen is not None:
                    seen.scatter_(1, drawn[:, None], True)
                logits = _step(model, cache, drawn)
    return [Continuation(tuple(row.ids), row.stop or "tokens") for row in rows]


@dataclass
class _Row:
    """One text in the making."""

    number: int
    prompt: int
    generator: np.random.Generator
    ids: list[int] = field(default_factory=list)
    passes: int = 0
    stop: Stop | None = None

    def limit(self, tokens: int, context: int) -> int:
        """Tokens there can be: the last one is predicted from a full context."""
        return min(tokens, context - self.prompt + 1)

    def take(
        self,
        token: int,
        model: TextModel,
        tokens: int,
        tell: Callable[[int, int | None], None],
        is_enough: Callable[[int, Sequence[int]], bool],
    ) -> None:
        """Add a token, unless the text has ended and is only kept in step with other ranks."""
        self.passes += 1
        if self.stop is not None:
            return
        if token in model.stop_ids:
            self.stop = "end"
        else:
            self.ids.append(token)
            tell(self.number, token)
            if is_enough(self.number, self.ids):
                self.stop = "asked"
            elif len(self.ids) >= self.limit(tokens, model.context):
                self.stop = "tokens" if len(self.ids) >= tokens else "context"
        if self.stop is not None:
            tell(self.number, None)


def _check(model: TextModel, rows: Sequence[_Row], tokens: int) -> None:
    for row in rows:
        if not 1 <= row.prompt <= model.context:
            expected = f"1 to {model.context}, the model's context in tokens"
            raise UserError("prompt", f"{row.prompt} tokens", expected)
    if tokens < 1:
        raise UserError("--tokens", f"{tokens}", "1 or more")


def _read(
    model: TextModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    kind: Literal["causal", "full"],
) -> tuple[KeyValueCache, Tensor]:
    """Read the prompts into a new cache, each different one once.

    Returns:
        The cache, and (B, V) logits of each prompt's next token.
    """
    places: dict[tuple[int, ...], int] = {}
    order = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    ids, _ = fill_up([list(prompt) for prompt in places])
    lengths, width = [len(prompt) for prompt in places], ids.shape[1]
    # The last token of a text is never read.
    room = max(len(prompt) + limit - 1 for prompt, limit in zip(prompts, limits, strict=True))
    cache = KeyValueCache(len(places), room, device=model.device, dtype=model.dtype)
    plan = cache.plan_prompts(lengths, kind, width)
    last = torch.arange(len(places)) * width + torch.tensor(lengths) - 1
    logits = model.logits(ids, plan, last, may_stop=True)
    if len(places) == len(prompts):
        return cache, logits
    cache.select(order)
    return cache, logits[order]


def _step(model: TextModel, cache: KeyValueCache, tokens: Tensor) -> Tensor:
    """Read one more token of each row, (B,) int64; return the (B, V) logits of the next."""
    plan, positions = cache.plan_next()
    rows = torch.arange(len(tokens))
    return model.logits(tokens[:, None], plan, rows, positions=positions, may_stop=True)


def _mark(prompts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """Say which tokens each prompt has: (B, V) bool on the device of the logits."""
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen.to(logits.device)


def _next_tokens(
    logits: Tensor, seen: Tensor | None, sampling: Sampling, rows: Sequence[_Row]
) -> Tensor:
    if seen is not None:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    numbers = None
    if not sampling.is_greedy:
        numbers = torch.tensor([row.generator.random() for row in rows], dtype=torch.float64)
    return choose(logits, sampling, numbers)
