"""Prompts: text to ids, and gaps such as ``<mask:8>`` to masks."""

from __future__ import annotations

import re

from tokenizers import Tokenizer

from dualtrain.common.errors import UserError

_MARKS = ("\n", ".", "0", "|")
_GAP = re.compile(r" ?<mask(?::0*([1-9]\d{0,5}))?>")
_MEANT_AS_GAP = re.compile(r"<mask\b[^>]{0,20}>?")
_GAP_SYNTAX = "a whole number from 1 to 999999, such as <mask:8>, or <mask> for one token"


def encode_prompt(text: str, tokenizer: Tokenizer, *, bos_id: int) -> list[int]:
    """Return ``<s>`` and the ids of the text; an empty text begins a document."""
    return [bos_id, *_encode(text, tokenizer)]


def has_gap(text: str) -> bool:
    """Whether there is a gap in a text, or something that was meant to be one."""
    return _MEANT_AS_GAP.search(text) is not None


def split_gaps(text: str, where: str) -> list[str | int]:
    """Split a text with gaps, ``The <mask:8> sat.``, into text and numbers of masked tokens.

    A space before a gap belongs to the gap, since tokens carry the space before their word; the
    space after it stays with the word that follows.

    Args:
        where: What to call the text in an error.

    Raises:
        UserError: There is no gap, or one is malformed.
    """
    parts: list[str | int] = []
    end = 0
    for gap in _GAP.finditer(text):
        parts += [text[end : gap.start()], int(gap.group(1) or 1)]
        end = gap.end()
    parts.append(text[end:])
    for part in parts:
        malformed = _MEANT_AS_GAP.search(part) if isinstance(part, str) else None
        if malformed:
            raise UserError(where, f"{malformed.group()!r} is no gap", _GAP_SYNTAX)
    if len(parts) == 1:
        raise UserError(where, f"no gap in {text!r}", _GAP_SYNTAX)
    return parts


def parse_gaps(
    text: str, tokenizer: Tokenizer, *, bos_id: int, mask_id: int, where: str = "infill"
) -> list[int]:
    """Turn a text with gaps into ids with masks, behind ``<s>``, so that a first one is predicted.

    Raises:
        UserError: As :func:`split_gaps`.
    """
    ids = [bos_id]
    for number, part in enumerate(split_gaps(text, where)):
        if isinstance(part, int):
            ids += [mask_id] * part
        else:
            ids += _encode(part, tokenizer, inside=number > 0)
    return ids


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
