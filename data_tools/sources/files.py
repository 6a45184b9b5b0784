"""How files of a format, standard input and the embedded corpus are read.

The module of a format makes a :class:`Format`; ``formats`` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from platform import python_version
from typing import IO

from data_tools.python_docs import python_docs
from data_tools.sources.cutting import Separator
from data_tools.sources.documents import BlockPart, CorpusFile, Document, Parsed, Reader
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


Parts = Callable[[Iterator[bytes], str, ReadingOptions], Iterator[BlockPart]]
"""``(chunks, name, options)``: cuts content, which is never empty, at the ends of documents."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of file that holds text. It gives either ``parts`` or a ``reader``.

    Attributes:
        name: What ``--format`` calls it.
        suffixes: Those of its files' names, without the dot.
        has_fields: Whether documents have fields, one of which is the text.
        parts: For what is read from its beginning to its end: then it may be compressed, or come
            through standard input.
        reader: For what is read in another order.
    """

    name: str
    suffixes: tuple[str, ...]
    has_fields: bool = True
    parts: Parts | None = None
    reader: Callable[[CorpusFile, ReadingOptions], Reader] | None = None

    def open(
        self,
        file: CorpusFile,
        options: ReadingOptions,
        *,
        compression: str | None = None,
        stream: IO[bytes] | None = None,
    ) -> Reader:
        """Make the reader of a file, or of a stream in its place."""
        if self.parts is None:
            assert self.reader is not None
            return self.reader(file, options)
        return ByteReader(
            file=file, parts_of=self.parts, options=options, compression=compression, stream=stream
        )


@dataclass(kw_only=True)
class ByteReader(Reader):
    """Reads a file, or a stream, from its beginning to its end.

    Attributes:
        compression: As the name says; without, the first bytes say whether there is one.
        stream: What comes once only, in place of the file.
    """

    file: CorpusFile
    parts_of: Parts
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
            chunks = iter(content)
            first = next(chunks, None)
            if first is None:
                raise BrokenFile("empty file", "has no content")
            for part in self.parts_of(chain([first], chunks), self.file.name, self.options):
                yield part, content.position


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
