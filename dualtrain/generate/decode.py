"""Ids back to text, piece by piece: what is shown early adds up to what the whole decodes to.

A token may end in the middle of a character, and some tokenizers drop the space before the first
token they decode; so a piece of text is never the decoding of a piece of the ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Generic, TypeVar

from tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"

Label = TypeVar("Label")


class TextStream:
    """Decodes tokens as they come, never half a character.

    All that :meth:`add` and :meth:`rest` return, put together, is the decoding of all the ids;
    special tokens are left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Tokens from the first number on are decoded again, those before the second were returned.
        self._begin, self._returned = 0, 0

    def add(self, ids: Iterable[int]) -> str:
        """Take tokens; return the text that has become certain."""
        return "".join(self._add(token) for token in ids)

    def rest(self) -> str:
        """Return what is left: a character that was never completed."""
        return self._take(*self._decoded())

    def _add(self, token: int) -> str:
        self._ids.append(token)
        shown, text = self._decoded()
        if text.endswith(_INCOMPLETE):
            return ""
        return self._take(shown, text)

    def _take(self, shown: str, text: str) -> str:
        new = text[len(shown) :]
        if new:  # else a special token: what follows needs the text before it
            self._begin = self._returned
        self._returned = len(self._ids)
        return new

    def _decoded(self) -> tuple[str, str]:
        """Decode the tokens that were returned last, and these with all that came after."""
        again = self._ids[self._begin :]
        shown = again[: self._returned - self._begin]
        decode = self._tokenizer.decode
        return decode(shown, skip_special_tokens=True), decode(again, skip_special_tokens=True)


# No NamedTuple: Python 3.10 has none that is generic.
@dataclass(frozen=True)
class TextPiece(Generic[Label]):
    """A part of a text.

    Attributes:
        text: Without special tokens, so possibly empty.
        label: Which its tokens share.
    """

    text: str
    label: Label
    tokens: int


def label_pieces(
    ids: Sequence[int], labels: Sequence[Label], tokenizer: Tokenizer
) -> list[TextPiece[Label]]:
    """Decode ids as pieces of text, one for each run of equal labels.

    A character that begins in one piece and ends in another belongs to the latter.

    Args:
        tokenizer: Decodes; special tokens are left out.
    """
    stream, pieces = TextStream(tokenizer), []
    for label, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1]):
        tokens = [token for token, _ in run]
        pieces.append(TextPiece(stream.add(tokens), label, len(tokens)))
    rest = stream.rest()
    if rest:
        pieces[-1] = replace(pieces[-1], text=pieces[-1].text + rest)
    return pieces
