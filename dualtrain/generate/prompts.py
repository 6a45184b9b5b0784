"""Prompts: text to ids, and gaps such as ``<mask:8>`` to masks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from dualtrain.common.errors import UserError

_GAP = re.compile(r" ?<mask(?::(\d{1,6}))?>")
_MARKS = ("\n", ".", "0", "|")
_GAP_REMAINS = re.compile(r"<mask\b.{0,20}", re.DOTALL)
GAP_SYNTAX = "<mask:N> with N of 1 or more, or <mask> for a single token"


class Encoding(Protocol):
    """What a tokenizer makes of a text."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def tokens(self) -> list[str]: ...

    @property
    def offsets(self) -> list[tuple[int, int]]: ...


class Tokenizer(Protocol):
    """The part of ``tokenizers.Tokenizer`` that is needed here."""

    def encode(self, sequence: str, *, add_special_tokens: bool) -> Encoding: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


def encode_prompt(text: str, tokenizer: Tokenizer, *, bos_id: int) -> list[int]:
    """Return ``<s>`` and the ids of the text; an empty text begins a document."""
    return [bos_id, *_encode(text, tokenizer)]


def has_gap(text: str) -> bool:
    """Whether there is a gap in a text, or something that was meant to be one."""
    return _GAP_REMAINS.search(text) is not None


def parse_gaps(
    text: str, tokenizer: Tokenizer, *, bos_id: int, mask_id: int, where: str = "infill"
) -> list[int]:
    """Turn a text with gaps, ``The <mask:8> sat.``, into ids with masks.

    A space before a gap belongs to the gap, since tokens carry the space before their word; the
    space after it stays with the word that follows.

    Args:
        text: The text; ``<mask:N>`` stands for N tokens, ``<mask>`` for one.
        tokenizer: Encodes the text between the gaps.
        bos_id: Put first, so that a gap at the very beginning has a predictor.
        mask_id: The id of a masked token.
        where: What to call the text in an error.

    Raises:
        UserError: There is no gap, or one is malformed.
    """
    ids, end = [bos_id], 0
    for gap in _GAP.finditer(text):
        number = int(gap.group(1) or 1)
        if number < 1:
            raise UserError(where, f"empty gap {gap.group().strip()!r}", GAP_SYNTAX)
        between = _whole(text[end : gap.start()], where)
        ids += [*_encode(between, tokenizer, inside=end > 0), *[mask_id] * number]
        end = gap.end()
    if end == 0:
        _whole(text, where)
        raise UserError(where, f"no gap in {text!r}", GAP_SYNTAX)
    return ids + _encode(_whole(text[end:], where), tokenizer, inside=True)


def _encode(text: str, tokenizer: Tokenizer, *, inside: bool = False) -> list[int]:
    """Encode a text, or one from the inside of a text, which gets no space put before it."""
    if not text:
        return []
    if inside and tokenizer.encode("a", add_special_tokens=False).tokens[:1] != ["a"]:
        # This tokenizer puts a space before every text: let it be before something else, which
        # must not be stripped, nor grow together with the text.
        for mark in _MARKS:
            begin = tokenizer.encode(mark, add_special_tokens=False).ids
            ids = tokenizer.encode(mark + text, add_special_tokens=False).ids
            if begin and ids[: len(begin)] == begin:
                return list(ids[len(begin) :])
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _whole(text: str, where: str) -> str:
    """Return the text between gaps, if it does not hold the remains of another gap."""
    remains = _GAP_REMAINS.search(text)
    if remains:
        raise UserError(where, f"malformed gap {remains.group()!r}", GAP_SYNTAX)
    return text
