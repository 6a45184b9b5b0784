"""Cutting the content of a file at the ends of documents, with memory for a block or a document.

Here bytes are only searched, never parsed: this is all the work on text that the one process which
reads a source has to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from data_tools.sources.documents import BadInput, not_text
from dualtrain.common.compression import BrokenFile

TOO_LARGE = "file too large"
WHOLE_LIMIT = 1 << 30
"""What is parsed as a whole is held in memory several times over; above this it is refused."""

BLANK_LINE = "blank-line"
"""The separator that stands for lines of nothing but (ASCII) white space."""

BLANK_LINES = re.compile(rb"(?m)^[^\S\n]*(?:\n|\Z)")
_BLANK_LINE = re.compile(rb"\n[^\S\n]*\n")

Ends = Callable[[bytearray, int], tuple[int, int]]
"""``(buffer, seen) -> (end, seen)``: the end of the last document that ends in `buffer` behind
`seen`, or 0, and how much of `buffer` need not be looked at again when more has been added."""


def cut(chunks: Iterable[bytes], ends: Ends, block_bytes: int) -> Iterator[bytes]:
    """Cut at ends of documents, as soon as there is enough for a block.

    Raises:
        BrokenFile: As `chunks` does, after all whole documents before it.
    """
    buffer = bytearray()
    end = seen = 0
    try:
        for chunk in chunks:
            buffer += chunk
            found, seen = ends(buffer, seen)
            end = found or end
            if end and len(buffer) >= block_bytes:
                yield bytes(memoryview(buffer)[:end])
                del buffer[:end]
                seen, end = max(0, seen - end), 0
    except BrokenFile:
        if end:
            yield bytes(buffer[:end])
        raise
    if buffer:
        yield bytes(buffer)


def line_ends(buffer: bytearray, seen: int) -> tuple[int, int]:
    """Every line is a document. Lines end at \\n only: text may hold U+2028 and the like."""
    return buffer.rfind(b"\n", seen) + 1, len(buffer)


def blank_line_ends(buffer: bytearray, seen: int) -> tuple[int, int]:
    """Documents end with a line of nothing but (ASCII) white space."""
    # The search goes on from the last line end, which may be the one before a blank line.
    last = buffer.rfind(b"\n", seen)
    if last < 0:
        return 0, seen
    end = 0
    for match in _BLANK_LINE.finditer(buffer, seen):
        end = match.end()
    return end, last


def separator_ends(separator: bytes) -> Ends:
    """Documents end with `separator`."""
    pattern = re.compile(re.escape(separator))

    def ends(buffer: bytearray, seen: int) -> tuple[int, int]:
        # Always searched from the left, so that a separator that can overlap itself divides the
        # text in the same way whatever the size of blocks.
        end = 0
        for match in pattern.finditer(buffer, seen):
            end = match.end()
        return end, max(seen, end, len(buffer) - len(separator) + 1)

    return ends


def unix_newlines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Turn ``\\r\\n`` into ``\\n``, also where a chunk ends in between."""
    kept = b""
    for chunk in chunks:
        chunk = kept + chunk
        kept = b"\r" if chunk.endswith(b"\r") else b""
        chunk = chunk.removesuffix(kept)
        yield chunk.replace(b"\r\n", b"\n") if b"\r" in chunk else chunk
    if kept:
        yield kept


def gather(chunks: Iterable[bytes], into: bytearray, *, instead: str) -> None:
    """Join the chunks of a file that has to be parsed at once.

    Raises:
        BrokenFile: As `chunks` does; or the file is too large, and what to do `instead`.
    """
    for chunk in chunks:
        into += chunk
        if len(into) > WHOLE_LIMIT:
            limit = f"more than {WHOLE_LIMIT >> 20} MiB that have to be read at once"
            raise BrokenFile(TOO_LARGE, f"has {limit}", instead)


def decoded(data: bytes, name: str, first_line: int) -> str | BadInput:
    """The text, or where it is none."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        return BadInput.at(
            "not UTF-8",
            f"{name}:{line}",
            f"byte 0x{data[error.start]:02x} is not UTF-8",
            "text in UTF-8",
            "convert the file, for example with iconv",
        )
    before, nul, _ = text.partition("\0")
    return not_text(f"{name}:{first_line + before.count(chr(10))}") if nul else text


@dataclass
class Separator:
    """What divides text files; None: nothing."""

    text: str | None
    is_found: bool = False
    """Whether it was found in any file: one that is nowhere is a mistake."""

    def ends(self, buffer: bytearray, seen: int) -> tuple[int, int]:
        """Find ends of documents, as :data:`Ends`."""
        find = blank_line_ends if self.text == BLANK_LINE else separator_ends(self._bytes)
        end, seen = find(buffer, seen)
        self.is_found = self.is_found or end > 0
        return end, seen

    @property
    def pattern(self) -> re.Pattern[bytes]:
        return BLANK_LINES if self.text == BLANK_LINE else re.compile(re.escape(self._bytes))

    @property
    def _bytes(self) -> bytes:
        return (self.text or "").replace("\r\n", "\n").encode()
