"""From logits to tokens: what may be produced, with which probability, and the draw.

Pure functions on (N, V) float32 logits, one row a token to be chosen, on any device. Repetition
penalty, temperature, top-k and top-p mean what they mean in transformers, in its order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dualtrain.common.errors import UserError, raise_together

GREEDY_BELOW = 1e-6
"""Temperature below which the likeliest token is taken: float32 tells no closer logits apart."""
MOST_TEMPERATURE = 1000.0
"""Here all tokens are about equally likely already; far above, float32 has no such number."""
PENALTIES = (0.01, 100.0)
"""Beyond them, too, a logit may leave float32."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen.

    Args:
        temperature: Divides the logits; 0, or next to it, takes the likeliest token.
        top_k: Only the k likeliest tokens can be drawn; None is all.
        top_p: Only the likeliest tokens that together reach this probability can be drawn.
        repetition_penalty: The logit of a token that the text has already is divided by it if
            positive, else multiplied; 1 changes nothing. Diffusion takes 1 only.

    Raises:
        UserError: A value out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        wrong = []
        # Written so that a NaN is refused, too.
        if not 0 <= self.temperature <= MOST_TEMPERATURE:
            expected = f"0 to {MOST_TEMPERATURE:g}, where all tokens are about equally likely"
            wrong.append(UserError("--temperature", f"{self.temperature:g}", expected))
        if self.top_k is not None and self.top_k < 1:
            wrong.append(UserError("--top-k", f"{self.top_k}", "1 or more"))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            wrong.append(UserError("--top-p", f"{self.top_p:g}", "a number in (0, 1]"))
        least, most = PENALTIES
        if not least <= self.repetition_penalty <= most:
            penalty = f"{self.repetition_penalty:g}"
            expected = f"{least:g} to {most:g}; 1 changes nothing, try 1.2"
            wrong.append(UserError("--repetition-penalty", penalty, expected))
        raise_together(wrong)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, and no random number asked for."""
        return self.temperature < GREEDY_BELOW


def choose(logits: Tensor, sampling: Sampling, numbers: Tensor | None) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: (N, V) float32, minus infinity for what must not be produced.
        sampling: Its repetition penalty is not applied here: see :func:`penalise`.
        numbers: (N,) float64 in [0, 1), one random number a row; not looked at where the
            choice is greedy, and then None will do.

    Returns:
        (N,) int64 token ids.
    """
    if sampling.is_greedy:
        return logits.argmax(-1)
    assert numbers is not None
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
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
