"""From logits to tokens: what may be produced, with which probability, and the draw.

Pure functions on (N, V) float32 logits, one row a token to be chosen, on any device. Repetition
penalty, temperature, top-k and top-p mean what they mean in transformers, in its order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dualtrain.generate.settings import Settings


def choose(logits: Tensor, settings: Settings, numbers: Tensor | None) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: (N, V) float32, minus infinity for what must not be produced.
        settings: Its repetition penalty is not applied here: see :func:`penalise`.
        numbers: (N,) float64 in [0, 1), one random number a row; not looked at where the
            choice is greedy, and then None will do.

    Returns:
        (N,) int64 token ids.
    """
    if settings.is_greedy:
        return logits.argmax(-1)
    assert numbers is not None
    logits = logits / settings.temperature
    if settings.top_k is not None:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p is not None:
        logits = keep_top_p(logits, settings.top_p)
    return draw(logits, numbers)


@lru_cache(maxsize=16)
def banned_tokens(size: int, vocab_size: int, ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Mark what must never be produced.

    Args:
        size: V, columns of the logits.
        vocab_size: Ids from here on are padding of the embedding.

    Returns:
        (V,) bool; the same one for the same question, so not to be changed.
    """
    banned = torch.zeros(size, dtype=torch.bool)
    banned[list(ids)] = True
    banned[vocab_size:] = True
    return banned.to(device)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens less likely that the text has already (Keskar et al. 2019, arXiv 1909.05858).

    Args:
        logits: (N, V).
        seen: (N, V) bool, which tokens the prompt and the text so far have.
        penalty: Divides positive logits and multiplies negative ones.
    """
    lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, lowered, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Leave the k likeliest tokens of each row, and those that equal the last of them."""
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Leave the fewest tokens of each row that together reach the probability p.

    A token goes if it and all less likely ones together have a probability of at most 1 - p. Summed
    from the least likely on, where float32 is exact enough for a p close to 1.
    """
    # Of equals the one with the greatest id goes first: stable, so the same on every device.
    order = logits.flip(-1).sort(dim=-1, stable=True)
    index = logits.shape[-1] - 1 - order.indices
    dropped = order.values.softmax(-1).cumsum(-1) <= 1 - p
    dropped[:, -1] = False
    return logits.masked_fill(dropped.scatter(-1, index, dropped), -torch.inf)


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw a token from each row's softmax, by the inverse of its cumulative distribution.

    One random number a token, so that what a row draws is its own generator's business, and a
    rounding error in the logits hardly ever changes the token.

    Args:
        logits: (N, V); minus infinity is never drawn.
        numbers: (N,) float64 in [0, 1).

    Returns:
        (N,) int64.
    """
    reached = logits.double().softmax(-1).cumsum(-1)
    # The sum differs from 1 by a rounding error, and the product must stay below it.
    whole = reached[:, -1:]
    wanted = numbers.to(logits.device)[:, None] * whole
    wanted = wanted.minimum(whole.nextafter(torch.zeros_like(whole)))
    return torch.searchsorted(reached, wanted, right=True)[:, 0]
