"""``.txt`` files: one document a file, or divided at blank lines or at a separator."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data_tools.sources.cutting import BLANK_LINES, cut, decoded, gather, unix_newlines
from data_tools.sources.documents import BadInput, BlockPart, Document, Unparsed
from data_tools.sources.files import Format, ReadingOptions


def text_parts(chunks: Iterable[bytes], name: str, options: ReadingOptions) -> Iterator[BlockPart]:
    """One part for a whole file; with a separator, parts of about a block."""
    separator = options.separator
    if separator.text is None:
        data = bytearray()
        gather(chunks, data, instead="divide it into documents with a separator")
        yield WholeText(name, bytes(data))
        return
    line = 1
    for data in cut(unix_newlines(chunks), separator.ends, options.block_bytes):
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

    separator: re.Pattern[bytes] = BLANK_LINES

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


TEXT = Format(name="txt", suffixes=("txt", "md"), parts=text_parts, has_fields=False)
