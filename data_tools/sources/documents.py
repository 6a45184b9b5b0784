"""What sources of text deliver: documents and problems, in blocks that a worker can parse.

One process walks a source: it reads, decompresses and cuts at document boundaries, nothing more,
and gives out :class:`Block` after block. The dear part, from bytes to texts, is
`Block.documents()` and can run in any process. The sequence of blocks depends on the files and the
options only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from dualtrain.common.errors import UserError
from dualtrain.common.files import in_utf8

BLOCK_BYTES = 1 << 20
"""Content of a block: enough to hide the cost of passing it on, little enough to hold many."""

_PIECE_OVERHEAD = 256
"""Counted for each piece, so that very many empty files do not gather in one block."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that a source reads."""

    path: str
    """As the operating system takes it; of what is no file, its name."""
    bytes: int

    @property
    def name(self) -> str:
        """What messages and ``dataset.json`` call it."""
        return in_utf8(self.path)


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the place where it stands, for messages."""

    text: str
    where: str
    """``path:line``, ``path``, ``path: row 7``, ``builtin:python-docs: name``, from 1 on."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A document, or the rest of a file, that cannot be had."""

    kind: str
    """Short stable phrase under which such problems are counted, such as ``not JSON``."""
    error: UserError
    """What a conversion that stops at the first problem says."""

    @classmethod
    def at(cls, kind: str, where: str, what: str, expected: str = "", hint: str = "") -> Problem:
        return cls(kind, UserError(where, what, expected, hint))


class Block(ABC):
    """Some consecutive documents, not parsed yet; can be sent to another process."""

    position: int
    """Bytes of the source's files, as they are on disk, that are used up when this block ends."""

    @abstractmethod
    def documents(self) -> Iterator[Document | Problem]:
        """Parse the block; bad content is delivered as a :class:`Problem` in its place."""


class Piece(ABC):
    """The part of a block that comes from one file; can be sent to another process."""

    @property
    @abstractmethod
    def content_bytes(self) -> int:
        """About how much memory the piece takes."""

    @abstractmethod
    def documents(self) -> Iterator[Document | Problem]: ...


@dataclass(frozen=True, slots=True)
class Texts(Piece):
    """Documents that were texts from the beginning."""

    ready: tuple[Document, ...]

    @property
    def content_bytes(self) -> int:
        return sum(len(document.text) for document in self.ready)

    def documents(self) -> Iterator[Document | Problem]:
        yield from self.ready


@dataclass(frozen=True, slots=True)
class Failure(Piece):
    """Stands where a file could not be read, or not to its end."""

    problem: Problem

    @property
    def content_bytes(self) -> int:
        return 0

    def documents(self) -> Iterator[Document | Problem]:
        yield self.problem


class Reader(ABC):
    """Cuts one file, or what is like a file, into pieces."""

    file: InputFile

    @abstractmethod
    def pieces(self) -> Iterator[tuple[Piece, int]]:
        """Pieces in order, each with the bytes of the file used up when it ends.

        Bad content does not raise: a :class:`Failure` takes its place.
        """


class Source(ABC):
    """Documents in a fixed order."""

    files: tuple[InputFile, ...]
    """What the documents are read from."""
    bytes: int
    """Size of all files together; 0 when it is not known beforehand."""
    ignored: tuple[str, ...]
    """What stands in the searched directories and is no text: other kinds, hidden files."""
    notes: tuple[str, ...]
    """What else whoever reads the source should know: which texts were left where they are."""
    repeatable: bool
    """Whether the documents can be had again: not from standard input."""

    @abstractmethod
    def blocks(self) -> Iterator[Block]: ...

    def documents(self) -> Iterator[Document | Problem]:
        """All documents, parsed in this process."""
        for block in self.blocks():
            yield from block.documents()


@dataclass(frozen=True, slots=True)
class PackedBlock(Block):
    """A large piece, or many small ones, possibly of several files."""

    position: int
    pieces: tuple[Piece, ...]

    def documents(self) -> Iterator[Document | Problem]:
        for piece in self.pieces:
            for item in piece.documents():
                # Whatever the kind of file, no text has this character.
                if isinstance(item, Document) and "\0" in item.text:
                    item = not_text(item.where)
                yield item


def not_text(where: str) -> Problem:
    """What to say of a NUL character."""
    return Problem.at(
        "not text",
        where,
        "holds a NUL character: it is binary data, or text in UTF-16",
        "text in UTF-8",
        "convert UTF-16 with iconv -f UTF-16LE -t UTF-8, or leave it out with --on-error skip",
    )


class ReaderSource(Source):
    """The documents of several readers, one after another.

    Args:
        readers: In the order of their documents.
        ignored: What was found beside them and is no text.
        notes: What is to be said of what was found.
        at_end: Called when all is read; raises what shows only then.
        repeatable: Whether all of them can be read again.
        block_bytes: Content of a block; one that ends with a large document has more.
    """

    def __init__(
        self,
        readers: Iterable[Reader],
        *,
        ignored: Iterable[str],
        notes: Iterable[str],
        at_end: Callable[[], None],
        repeatable: bool,
        block_bytes: int,
    ) -> None:
        self._readers = tuple(readers)
        self._block_bytes = block_bytes
        self.files = tuple(reader.file for reader in self._readers)
        self.bytes = sum(file.bytes for file in self.files) if repeatable else 0
        self.ignored = tuple(ignored)
        self.notes = tuple(notes)
        self._at_end = at_end
        self.repeatable = repeatable

    def blocks(self) -> Iterator[Block]:
        packed: list[Piece] = []
        size = position = 0
        for piece, position in self._pieces():
            packed.append(piece)
            size += piece.content_bytes + _PIECE_OVERHEAD
            if 2 * size >= self._block_bytes:  # a piece just short of a block is one, too
                yield PackedBlock(position, tuple(packed))
                packed, size = [], 0
        if packed:
            yield PackedBlock(position, tuple(packed))
        self._at_end()

    def _pieces(self) -> Iterator[tuple[Piece, int]]:
        before = 0
        for reader in self._readers:
            used = 0
            for piece, used in reader.pieces():
                yield piece, before + used
            # The size of standard input shows only now; a file may have grown since it was found.
            before += reader.file.bytes or used
