"""``.txt`` files: one document a file, or divided at blank lines or at a separator."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data_tools.sources.cutting import (
    Ends,
    blank_line_ends,
    cut,
    decoded,
    gather,
    separator_ends,
    unix_newlines,
)
from data_tools.sources.documents import Document, Piece, Problem

BLANK_LINE = "blank-line"
"""The separator that stands for lines of nothing but (ASCII) white space."""


class Sought:
    """Whether the separator was found in any file: one that is nowhere is a mistake."""

    found = False

    def noting(self, ends: Ends) -> Ends:
        """The same, remembering whether it found an end."""

        def noted(buffer: bytearray, seen: int) -> tuple[int, int]:
            end, seen = ends(buffer, seen)
            self.found = self.found or end > 0
            return end, seen

        return noted


_BLANK_LINES = re.compile(rb"(?m)^[^\S\n]*(?:\n|\Z)")


def text_pieces(
    chunks: Iterable[bytes],
    name: str,
    *,
    separator: str | None,
    sought: Sought,
    block_bytes: int,
) -> Iterator[Piece]:
    """One piece for a whole file; with a separator, pieces of about `block_bytes`."""
    if separator is None:
        data = bytearray()
        gather(chunks, data, instead="divide it into documents with a separator")
        yield WholeText(name, bytes(data))
        return
    separator = separator.replace("\r\n", "\n")
    ends = blank_line_ends if separator == BLANK_LINE else separator_ends(separator.encode())
    line = 1
    for data in cut(unix_newlines(chunks), sought.noting(ends), block_bytes):
        yield DividedText(name, line, data, separator)
        line += data.count(b"\n")


@dataclass(frozen=True, slots=True)
class WholeText(Piece):
    """A file that is one document."""

    name: str
    data: bytes

    @property
    def content_bytes(self) -> int:
        return len(self.data)

    def documents(self) -> Iterator[Document | Problem]:
        text = decoded(self.data, self.name, first_line=1)
        if isinstance(text, str):
            yield Document(text.replace("\r\n", "\n"), self.name)
        else:
            yield text


@dataclass(frozen=True, slots=True)
class DividedText(Piece):
    """Whole documents of a file with a separator.

    They lose the line ends at their beginning and end; what is empty then is no document.
    """

    name: str
    first_line: int
    data: bytes
    separator: str

    @property
    def content_bytes(self) -> int:
        return len(self.data)

    def documents(self) -> Iterator[Document | Problem]:
        line, counted = self.first_line, 0
        for start, end in self._parts():
            part = self.data[start:end].lstrip(b"\r\n")
            start = end - len(part)
            part = part.rstrip(b"\r\n")
            if not part:
                continue
            line += self.data.count(b"\n", counted, start)
            counted = start
            text = decoded(part, self.name, line)
            yield Document(text, f"{self.name}:{line}") if isinstance(text, str) else text

    def _parts(self) -> Iterator[tuple[int, int]]:
        literal = re.compile(re.escape(self.separator.encode()))
        pattern = _BLANK_LINES if self.separator == BLANK_LINE else literal
        start = 0
        for match in pattern.finditer(self.data):
            yield start, match.start()
            start = match.end()
        yield start, len(self.data)
