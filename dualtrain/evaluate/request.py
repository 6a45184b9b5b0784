"""What is to be scored: modes, requests, and how they are made to fit the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from dualtrain.common.errors import UserError
from dualtrain.common.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Mode = Literal["ar", "prefix", "pll", "chain", "elbo"]
MODES: tuple[Mode, ...] = get_args(Mode)
MASKING_MODES: tuple[Mode, ...] = ("pll", "chain", "elbo")
"""Those that need a mask token, and a model trained with one."""
MOST_ELBO_SAMPLES = 10_000
"""All masks of an answer are in memory together, and more are hardly more exact."""


@dataclass(frozen=True, slots=True)
class Request:
    """A continuation to be scored after a context, both in token ids."""

    context: tuple[int, ...]  # begins with ``<s>``
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """What a request got."""

    log_likelihood: float  # nats, summed over the continuation, in the mode's sense
    is_greedy: bool | None  # whether all tokens are the likeliest; None in the modes that mask
    dropped: int  # oldest tokens of the context behind ``<s>`` that the model had no room for


@dataclass(frozen=True, slots=True)
class Passage:
    """A request as it fits the model."""

    tokens: tuple[int, ...]
    begin: int


def fit_requests(requests: Sequence[Request], longest: int) -> list[tuple[Passage, int]]:
    """Drop the oldest tokens behind ``<s>`` of contexts that leave too little room.

    Returns:
        Each request's passage, and the number of tokens that were dropped.

    Raises:
        UserError: A continuation does not fit by itself, behind ``<s>``.
        ValueError: A request without a context or without a continuation.
    """
    fitted = []
    for number, request in enumerate(requests):
        context, continuation = request.context, request.continuation
        if not context or not continuation:
            raise ValueError(f"request {number} has no {'continuation' if context else 'context'}")
        room = longest - len(continuation)
        if room < 1:
            raise UserError(
                f"request {number + 1} of {len(requests)}",
                f"its continuation has {len(continuation)} tokens",
                f"at most {longest - 1}, which the model's context has room for behind <s>",
            )
        dropped = max(0, len(context) - room)
        tokens = context[:1] + context[1 + dropped :] + continuation
        fitted.append((Passage(tokens, len(context) - dropped), dropped))
    return fitted


def check_scorable(mode: Mode, requests: Sequence[Request], vocabulary: Vocabulary) -> None:
    """Refuse what a mode cannot do.

    Raises:
        UserError: The mode masks, and the model has no mask token, or a continuation has nothing
            that may be masked.
        ValueError: There is no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    if mode not in MASKING_MODES:
        return
    if vocabulary.mask is None:
        possible = [mode for mode in MODES if mode not in MASKING_MODES]
        raise UserError(
            f"mode {mode}",
            "masks tokens, and the model's tokenizer has no mask token",
            " or ".join(possible),
        )
    special = set(vocabulary.special_ids)
    for number, request in enumerate(requests):
        if special.issuperset(request.continuation):
            raise UserError(
                f"request {number + 1} of {len(requests)}",
                f"its continuation {list(request.continuation)} has special tokens only, "
                f"which mode {mode} never masks",
                "at least one ordinary token",
            )


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, *, bos_id: int) -> Request:
    """Encode a context and its continuation together, and divide the ids between them.

    Apart they would be other tokens: many tokenizers treat the beginning of a text specially, and
    merge across the boundary.

    A token that holds the end of the context and the beginning of the continuation belongs to the
    continuation, so that none of its text is left out. The context may be empty.

    Raises:
        UserError: There is no token in the continuation.
    """
    encoding = tokenizer.encode(context + continuation, add_special_tokens=False)
    split = 0
    if context:
        stops = (stop for _, stop in encoding.offsets)
        inside = (number for number, stop in enumerate(stops) if stop > len(context))
        split = next(inside, len(encoding.ids))
    if split == len(encoding.ids):
        raise UserError("continuation", f"{continuation!r} has no tokens", "some text")
    return Request((bos_id, *encoding.ids[:split]), tuple(encoding.ids[split:]))
