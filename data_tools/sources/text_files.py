"""``.txt`` files: one document a file, or divided at blank lines or at a separator."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data_tools.sources.cutting import (
    blank_line_ends,
    cut,
    decoded,
    gather,
    separator_ends,
    unix_newlines,
)
from data_tools.sources.documents import BadInput, BlockPart, Document, Unparsed

BLANK_LINE = "blank-line"
"""The separator that stands for lines of nothing but (ASCII) white space."""

_BLANK_LINES = re.compile(rb"(?m)^[^\S\n]*(?:\n|\Z)")


@dataclass
class Separator:
    """What divides text files; None: nothing."""

    text: str | None
    is_found: bool = False
    """Whether it was found in any file: one that is nowhere is a mistake."""

    def ends(self, buffer: bytearray, seen: int) -> tuple[int, int]:
        """Find ends of documents, as :data:`~data_tools.sources.cutting.Ends`."""
        find = blank_line_ends if self.text == BLANK_LINE else separator_ends(self._bytes)
        end, seen = find(buffer, seen)
        self.is_found = self.is_found or end > 0
        return end, seen

    @property
    def pattern(self) -> re.Pattern[bytes]:
        return _BLANK_LINES if self.text == BLANK_LINE else re.compile(re.escape(self._bytes))

    @property
    def _bytes(self) -> bytes:
        return (self.text or "").replace("\r\n", "\n").encode()


def text_parts(
    chunks: Iterable[bytes], name: str, separator: Separator, block_bytes: int
) -> Iterator[BlockPart]:
    """One part for a whole file; with a separator, parts of about `block_bytes`."""
    if separator.text is None:
        data = bytearray()
        gather(chunks, data, instead="divide it into documents with a separator")
        yield WholeText(name, bytes(data))
        return
    line = 1
    for data in cut(unix_newlines(chunks), separator.ends, block_bytes):
        yield DividedText(name, data, line, separator.pattern)
        line += data.count(b"\n")


class WholeText(Unparsed):
    """A file that is one document."""

    def documents(self) -> Iterator[Document | BadInput]:
        text = decoded(self.data, self.name, first_line=1)
        if isinstance(text, str):
            yield Document(text.replace("\r\n", "\n"), self.name)
        else:
            yield text


@dataclass(frozen=True, slots=True)
class DividedText(Unparsed):
    """Whole documents of a file with a separator.

    They lose the line ends at their beginning and end; what is empty then is no document.
    """

    separator: re.Pattern[bytes] = _BLANK_LINES

    def documents(self) -> Iterator[Document | BadInput]:
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
        start = 0
        for match in self.separator.finditer(self.data):
            yield start, match.start()
            start = match.end()
        yield start, len(self.data)
