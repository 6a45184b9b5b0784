"""Which documents go to which split, and in what order: pure functions of what encoding found.

A document's split depends on the hash of its text alone, so equal texts are never on both sides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dualtrain.common.errors import UserError
from dualtrain.common.randomness import generator
from dualtrain.data.dataset import Split
from dualtrain.recipe.schema import BuildSection

SPLITS: tuple[Split, ...] = ("train", "val")
VAL_FRACTION = 0.05
_HASHES = 1 << 64


@dataclass(frozen=True)
class Choice:
    """The documents of each split."""

    order: dict[Split, np.ndarray]
    """Numbers of the documents, in their order on disk."""
    left_out: Counter[str]
    """Documents in no split, by reason."""


def below_fraction(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Whether each (documents,) uint64 hash belongs to the lowest `fraction` of all hashes."""
    return hashes < np.uint64(min(int(fraction * _HASHES), _HASHES - 1))


def choose_documents(
    lengths: np.ndarray,
    hashes: np.ndarray,
    options: BuildSection,
    *,
    where: str,
    is_val: np.ndarray | None = None,
) -> Choice:
    """Divide documents into splits and put each split in order.

    Args:
        lengths: (documents,) int64, tokens of each, in the order of the source.
        hashes: (documents,) uint64, of their texts.
        is_val: (documents,) bool, whose source is held out; None: the hashes decide.

    Returns:
        The choice. What `is_val` holds out is left out of train. With `val_fraction` alone,
        documents added to the source never move another to the other split. With `val_tokens` they
        can move one from val to train, when their hashes are lower, and never one from train to
        val; with both, what moves out of val is left out.

    Raises:
        UserError: Nothing is left, or nothing for one of the splits.
    """
    left_out: Counter[str] = Counter()
    kept = _drop(lengths > 0, "without tokens", np.arange(len(lengths)), left_out)
    if is_val is not None:
        is_also_held_out = ~is_val[kept] & np.isin(hashes[kept], hashes[kept][is_val[kept]])
        kept = _drop(~is_also_held_out, "held out by val_source", kept, left_out)
    if options.drop_duplicates:
        _, first = np.unique(hashes[kept], return_index=True)
        is_first = np.zeros(len(kept), dtype=bool)
        is_first[first] = True
        kept = _drop(is_first, "duplicate", kept, left_out)
    if not len(kept):
        raise no_documents(where, left_out)
    if is_val is None:
        held_out, unused = _held_out(lengths[kept], hashes[kept], options, where)
    else:
        held_out, unused = is_val[kept], np.zeros(len(kept), dtype=bool)
        _check_sides(held_out, where)
    if unused.any():
        left_out["held out beyond val_tokens"] += int(unused.sum())
    chosen = {"train": kept[~held_out & ~unused], "val": kept[held_out]}
    order: dict[Split, np.ndarray] = {}
    for number, split in enumerate(SPLITS):
        order[split] = in_order(chosen[split], number, options.shuffle_seed)
    if options.max_tokens is not None:
        order["train"], cut = _first(order["train"], lengths, options.max_tokens)
        if cut:
            left_out["beyond max_tokens"] += cut
    return Choice(order, left_out)


def no_documents(where: str, left_out: Mapping[str, int]) -> UserError:
    """What to say when all were left out, or there were none."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    what = f"no documents are left: {reasons}" if reasons else "has no documents"
    return UserError(where, what, "some text")


def may_be_held_out(sizes: np.ndarray, hashes: np.ndarray, options: BuildSection) -> np.ndarray:
    """(documents,) bool: documents that must not shape the tokenizer, before tokens are known.

    Args:
        sizes: (documents,) int64, bytes of text of each.
        hashes: (documents,) uint64.
    """
    if options.val_sources:
        return np.zeros(len(sizes), dtype=bool)
    if options.val_tokens is None:
        return below_fraction(hashes, options.val_fraction or VAL_FRACTION)
    if options.val_fraction is not None:
        return below_fraction(hashes, options.val_fraction)
    # A token has a few bytes of text: sixteen times as many bytes are more than enough.
    order = np.argsort(hashes, kind="stable")
    count = int(np.searchsorted(np.cumsum(sizes[order]), 16 * options.val_tokens)) + 1
    held_out = np.zeros(len(sizes), dtype=bool)
    held_out[order[: min(count, len(order) // 2)]] = True
    return held_out


def _drop(keep: np.ndarray, reason: str, numbers: np.ndarray, left_out: Counter[str]) -> np.ndarray:
    if dropped := int((~keep).sum()):
        left_out[reason] += dropped
    return numbers[keep]


def _check_sides(held_out: np.ndarray, where: str) -> None:
    """Refuse a split without documents where the sources decide."""
    if held_out.all() or not held_out.any():
        side = "train" if held_out.all() else "val"
        what = f"there are no documents for {side}"
        raise UserError(where, what, "text in source and in val_source", "see what was left out")


def _held_out(
    lengths: np.ndarray, hashes: np.ndarray, options: BuildSection, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Two of (documents,) bool: which are held out, and which are in no split."""
    tokens, fraction = options.val_tokens, options.val_fraction
    if tokens is None:
        fraction = fraction or VAL_FRACTION
    if len(hashes) == 1 or (hashes == hashes[0]).all():
        raise UserError(
            where,
            "one document cannot be divided into train and val"
            if len(hashes) == 1
            else "all documents are the same",
            "at least two different documents",
            "divide the text into several files or JSON lines, or give --separator for .txt files",
        )
    candidates = below_fraction(hashes, fraction) if fraction else np.ones(len(hashes), dtype=bool)
    held_out = candidates
    if tokens is not None:
        held_out = candidates & (
            hashes <= np.uint64(_bound(lengths, hashes, candidates, tokens, where))
        )
    if not held_out.any():
        raise UserError(
            where,
            f"none of its {len(hashes):,} documents is among the {fraction:.4g} with the lowest "
            "hashes, which are held out",
            "at least one document for val",
            f"give more text, or hold out a share of {_reaching(int(hashes.min()))} "
            "(--val-fraction, in a recipe val_fraction)",
        )
    unused = candidates & ~held_out & bool(fraction)
    if (held_out | unused).all():
        raise UserError(
            where,
            f"all of its {len(hashes):,} documents are held out",
            "some documents for train",
            "lower val_fraction or val_tokens",
        )
    return held_out, unused


def _bound(
    lengths: np.ndarray, hashes: np.ndarray, candidates: np.ndarray, tokens: int, where: str
) -> int:
    """The hash of the document with which the candidates, by hash, reach `tokens`."""
    numbers = np.flatnonzero(candidates)
    order = numbers[np.argsort(hashes[numbers], kind="stable")]
    ends = np.cumsum(lengths[order])
    if not len(order) or ends[-1] < tokens:
        raise UserError(
            where,
            f"val_tokens is {tokens:,}, and the documents to choose from have "
            f"{int(ends[-1]) if len(order) else 0:,} tokens",
            "enough documents",
            "lower val_tokens, or raise or leave out val_fraction",
        )
    return int(hashes[order[int(np.searchsorted(ends, tokens))]])


def _reaching(lowest: int) -> str:
    """A short fraction that holds out the document with this hash."""
    share = (lowest + 1) / _HASHES
    digit = 10.0 ** (math.floor(math.log10(share)) - 1)
    return f"{math.ceil(share / digit) * digit:.2g}"


def in_order(numbers: np.ndarray, split: int, seed: int | None) -> np.ndarray:
    """The documents of a split, by its number, in the order of a seed; None keeps theirs."""
    if seed is None:
        return numbers
    return numbers[generator(seed, "documents on disk", split).permutation(len(numbers))]


def _first(order: np.ndarray, lengths: np.ndarray, tokens: int) -> tuple[np.ndarray, int]:
    """The first documents that reach `tokens`, and how many come after."""
    count = int(np.searchsorted(np.cumsum(lengths[order]), tokens)) + 1
    return order[:count], max(0, len(order) - count)
