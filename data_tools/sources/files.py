"""Files of bytes and standard input: which kind of content is cut in which way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO

from data_tools.python_docs import python_docs
from data_tools.sources.csv_files import DELIMITERS, csv_pieces
from data_tools.sources.documents import (
    Document,
    Failure,
    InputFile,
    Piece,
    Problem,
    Reader,
    Texts,
)
from data_tools.sources.json_files import json_lines_pieces, json_pieces
from data_tools.sources.text_files import Sought, text_pieces
from dualtrain.common.compression import BrokenFile, Content
from dualtrain.common.errors import UserError

BUILTIN = "builtin:"
PYTHON_DOCS = BUILTIN + "python-docs"
STDIN_NAME = "standard input"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How content is read."""

    text_field: str
    separator: str | None
    block_bytes: int
    sought: Sought = field(default_factory=Sought)


class ByteReader(Reader):
    """Reads ``.txt``, ``.jsonl``, ``.json``, ``.csv`` and ``.tsv``, compressed or not.

    Args:
        open_raw: Opens the content for reading bytes.
        kind: ``txt``, ``jsonl``, ``json``, ``csv`` or ``tsv``.
    """

    def __init__(
        self,
        file: InputFile,
        open_raw: Callable[[], AbstractContextManager[IO[bytes]]],
        *,
        kind: str,
        compression: str | None,
        options: Options,
    ) -> None:
        self.file = file
        self._open_raw = open_raw
        self._kind = kind
        self._compression = compression
        self._options = options

    def pieces(self) -> Iterator[tuple[Piece, int]]:
        used = 0
        try:
            with self._open_raw() as raw:
                content = Content(
                    raw, self._compression, chunk_bytes=min(1 << 20, self._options.block_bytes)
                )
                for piece in self._cut(content):
                    used = content.position
                    yield piece, used
            return
        except BrokenFile as error:
            problem = Problem.at(error.kind, self.file.name, error.what, hint=error.hint)
        except OSError as error:
            what = f"cannot be read: {error.strerror or error}"
            problem = Problem.at("unreadable file", self.file.name, what)
        yield Failure(problem), max(used, self.file.bytes)

    def _cut(self, content: Content) -> Iterator[Piece]:
        chunks = iter(content)
        first = next(chunks, None)
        if first is None:
            raise BrokenFile("empty file", "has no content")
        chunks = chain([first], chunks)
        name, options = self.file.name, self._options
        size, field = options.block_bytes, options.text_field
        if self._kind == "txt":
            return text_pieces(
                chunks,
                name,
                separator=options.separator,
                sought=options.sought,
                block_bytes=size,
            )
        if delimiter := DELIMITERS.get(self._kind):
            return csv_pieces(chunks, name, delimiter=delimiter, field=field, block_bytes=size)
        cut = json_pieces if self._kind == "json" else json_lines_pieces
        return cut(chunks, name, field=field, block_bytes=size)


def file_reader(path: Path, *, kind: str, compression: str | None, options: Options) -> ByteReader:
    """Read a file on disk; without `compression` its first bytes say whether it has one."""
    return ByteReader(
        InputFile(str(path), path.stat().st_size),
        lambda: path.open("rb"),
        kind=kind,
        compression=compression or "detect",
        options=options,
    )


class StandardInput(ByteReader):
    """Reads a stream that comes once, of unknown size, compressed or not."""

    def __init__(self, stream: IO[bytes], *, kind: str, options: Options) -> None:
        self._is_read = False
        super().__init__(
            InputFile(STDIN_NAME, 0),
            lambda: nullcontext(stream),
            kind=kind,
            compression="detect",
            options=options,
        )

    def pieces(self) -> Iterator[tuple[Piece, int]]:
        if self._is_read:
            raise UserError(STDIN_NAME, "can be read only once", hint="save it to a file first")
        self._is_read = True
        yield from super().pieces()


class PythonDocs(Reader):
    """The embedded corpus of :mod:`data_tools.python_docs`."""

    def __init__(self) -> None:
        from platform import python_version

        size = sum(len(text.encode()) for _, text in python_docs())
        self.file = InputFile(f"{PYTHON_DOCS}, Python {python_version()}", size)

    def pieces(self) -> Iterator[tuple[Piece, int]]:
        used = 0
        for name, text in python_docs():
            used += len(text.encode())
            yield Texts((Document(text, f"{PYTHON_DOCS}: {name}"),)), used
