"""Files of bytes, standard input and the embedded corpus: which content is cut in which way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from platform import python_version
from typing import IO

from data_tools.python_docs import python_docs
from data_tools.sources.csv_files import DELIMITERS, csv_parts
from data_tools.sources.documents import BlockPart, CorpusFile, Document, Parsed, Reader
from data_tools.sources.json_files import json_lines_parts, json_parts
from data_tools.sources.text_files import Separator, text_parts
from dualtrain.common.compression import BrokenFile, Content
from dualtrain.common.errors import UserError

BUILTIN = "builtin:"
PYTHON_DOCS = BUILTIN + "python-docs"
STDIN_NAME = "standard input"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingOptions:
    """How content is read."""

    text_field: str
    separator: Separator
    block_bytes: int


@dataclass(kw_only=True)
class ByteReader(Reader):
    """Reads ``.txt``, ``.jsonl``, ``.json``, ``.csv`` and ``.tsv``.

    Attributes:
        kind: ``txt``, ``jsonl``, ``json``, ``csv`` or ``tsv``.
        compression: As the name says; without, the first bytes say whether there is one.
        stream: What comes once only, in place of the file.
    """

    file: CorpusFile
    kind: str
    options: ReadingOptions
    compression: str | None = None
    stream: IO[bytes] | None = field(default=None, repr=False)
    _is_read: bool = False

    def _read(self) -> Iterator[tuple[BlockPart, int]]:
        if self.stream is not None and self._is_read:
            raise UserError(STDIN_NAME, "can be read only once", hint="save it to a file first")
        self._is_read = True
        with nullcontext(self.stream) if self.stream else open(self.file.path, "rb") as raw:
            size = min(1 << 20, self.options.block_bytes)
            content = Content(raw, self.compression or "detect", chunk_bytes=size)
            for part in self._cut(content):
                yield part, content.position

    def _cut(self, content: Content) -> Iterator[BlockPart]:
        chunks = iter(content)
        first = next(chunks, None)
        if first is None:
            raise BrokenFile("empty file", "has no content")
        chunks, name = chain([first], chunks), self.file.name
        size, text_field = self.options.block_bytes, self.options.text_field
        if self.kind == "txt":
            return text_parts(chunks, name, self.options.separator, size)
        if delimiter := DELIMITERS.get(self.kind):
            return csv_parts(chunks, name, delimiter, text_field, size)
        cut = json_parts if self.kind == "json" else json_lines_parts
        return cut(chunks, name, text_field, size)


class PythonDocs(Reader):
    """The embedded corpus of :mod:`data_tools.python_docs`."""

    def __init__(self) -> None:
        size = sum(len(text.encode()) for _, text in python_docs())
        self.file = CorpusFile(f"{PYTHON_DOCS}, Python {python_version()}", size)

    def _read(self) -> Iterator[tuple[BlockPart, int]]:
        used = 0
        for name, text in python_docs():
            used += len(text.encode())
            yield Parsed((Document(text, f"{PYTHON_DOCS}: {name}"),)), used
