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
from dualtrain.generate.choose import choose, penalise
from dualtrain.generate.rows import allowed_logits, fill_up
from dualtrain.generate.settings import Settings
from dualtrain.model.handle import ModelHandle
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
    model: ModelHandle,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    generators: Sequence[np.random.Generator],
    on_token: Callable[[int, int | None], None] = lambda row, token: None,
    is_enough: Callable[[int, Sequence[int]], bool] = lambda row, ids: False,
) -> list[Continuation]:
    """Continue prompts.

    A model reads at most ``context`` tokens: a text ends (``context``) where the next token would
    take more than that. There is no sliding window: no token leaves the text behind one's back.

    Args:
        prompts: Their ids, usually beginning with ``<s>``.
        settings: Of mode ``prefix``, or of any other for a prompt that is read causally.
        generators: One for each prompt, of its random numbers.
        on_token: Told the row and each new token as it is there, and None once its text has ended.
        is_enough: Asked after each token, with the row and its new tokens, whether the text ends.

    Returns:
        One for each prompt, in order.

    Raises:
        UserError: A prompt is empty or longer than the context.
    """
    texts = []
    for number, (prompt, generator) in enumerate(zip(prompts, generators, strict=True)):
        if not 1 <= len(prompt) <= model.context:
            expected = f"1 to {model.context}, the model's context in tokens"
            raise UserError("prompt", f"{len(prompt)} tokens", expected)
        # The last one is predicted from a full context.
        most = min(settings.tokens, model.context - len(prompt) + 1)
        texts.append(_GrowingText(number, tuple(prompt), most, generator))
    going = texts
    with model.inference():
        cache, logits = _read(model, texts, "full" if settings.mode == "prefix" else "causal")
        # Which tokens each text has, for the repetition penalty.
        seen = _mark(texts, logits) if settings.repetition_penalty != 1 else None
        while going:
            drawn = _next_tokens(logits, seen, settings, going)
            for text, token in zip(going, drawn.tolist(), strict=True):
                text.passes += 1
                if text.stop is not None:
                    continue  # it is only kept in step with other ranks
                if token in model.vocabulary.stop_ids:
                    text.stop = "end"
                else:
                    text.ids.append(token)
                    on_token(text.number, token)
                    if is_enough(text.number, text.ids):
                        text.stop = "asked"
                    elif len(text.ids) == text.most:
                        text.stop = "tokens" if text.most == settings.tokens else "context"
                if text.stop is not None:
                    on_token(text.number, None)
            kept = [
                index
                for index, text in enumerate(going)
                if text.passes < text.most and (model.world_size > 1 or text.stop is None)
            ]
            if len(kept) < len(going):
                going, drawn = [going[index] for index in kept], drawn[kept]
                cache.select(kept)
                seen = None if seen is None else seen[kept]
            if going:
                if seen is not None:
                    seen.scatter_(1, drawn[:, None], True)
                logits = _step(model, cache, drawn)
    return [Continuation(tuple(text.ids), text.stop or "tokens") for text in texts]


@dataclass
class _GrowingText:
    """One text in the making, of which ``most`` tokens can be written."""

    number: int
    prompt: tuple[int, ...]
    most: int
    generator: np.random.Generator
    ids: list[int] = field(default_factory=list)
    passes: int = 0
    stop: Stop | None = None


def _read(
    model: ModelHandle, texts: Sequence[_GrowingText], kind: Literal["causal", "full"]
) -> tuple[KeyValueCache, Tensor]:
    """Read the prompts into a new cache, each different one once.

    Returns:
        The cache, and (B, V) logits of each prompt's next token.
    """
    places: dict[tuple[int, ...], int] = {}
    order = [places.setdefault(text.prompt, len(places)) for text in texts]
    ids, _ = fill_up([list(prompt) for prompt in places])
    lengths, width = [len(prompt) for prompt in places], ids.shape[1]
    # The last token of a text is never read.
    room = max(len(text.prompt) + text.most - 1 for text in texts)
    cache = KeyValueCache(len(places), room, device=model.device, dtype=model.dtype)
    plan = cache.plan_prompts(lengths, kind, width)
    last = torch.arange(len(places)) * width + torch.tensor(lengths) - 1
    logits = allowed_logits(model, ids, plan, last, may_stop=True)
    if len(places) == len(texts):
        return cache, logits
    cache.select(order)
    return cache, logits[order]


def _step(model: ModelHandle, cache: KeyValueCache, tokens: Tensor) -> Tensor:
    """Read one more token of each row, (B,) int64; return the (B, V) logits of the next."""
    plan, positions = cache.plan_next()
    rows = torch.arange(len(tokens))
    return allowed_logits(model, tokens[:, None], plan, rows, positions=positions, may_stop=True)


def _mark(texts: Sequence[_GrowingText], logits: Tensor) -> Tensor:
    """Say which tokens each prompt has: (B, V) bool on the device of the logits."""
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen[row, list(text.prompt)] = True
    return seen.to(logits.device)


def _next_tokens(
    logits: Tensor, seen: Tensor | None, settings: Settings, texts: Sequence[_GrowingText]
) -> Tensor:
    if seen is not None:
        logits = penalise(logits, seen, settings.repetition_penalty)
    numbers = None
    if not settings.is_greedy:
        numbers = torch.tensor([text.generator.random() for text in texts], dtype=torch.float64)
    return choose(logits, settings, numbers)
