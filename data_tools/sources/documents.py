"""What a corpus delivers: documents and bad input, in blocks that a worker can parse.

One process walks a corpus: it reads, decompresses and cuts at document boundaries, nothing more,
and gives out :class:`Block` after block. The dear part, from bytes to texts, is
`Block.documents()` and can run in any process. The sequence of blocks depends on the files and the
options only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dualtrain.common.compression import BrokenFile
from dualtrain.common.errors import UserError
from dualtrain.common.file_kinds import LARGEST_POINTER, pointer_problem
from dualtrain.common.files import in_utf8

BLOCK_BYTES = 1 << 20
"""Content of a block: enough to hide the cost of passing it on, little enough to hold many."""

_PART_OVERHEAD = 256
"""Counted for each part, so that very many empty files do not gather in one block."""


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file that a corpus is read from."""

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
    """Empty where `ids` are given: only who knows their tokenizer can read them."""
    where: str
    """``path:line``, ``path``, ``path: row 7``, ``builtin:python-docs: name``, from 1 on."""
    ids: np.ndarray | None = None
    """(tokens,) of whole numbers, of a document that is tokenized already."""


@dataclass(frozen=True, slots=True)
class BadInput:
    """A document, or the rest of a file, that cannot be had."""

    kind: str
    """Short stable phrase under which it is counted, such as ``not JSON``."""
    error: UserError
    """What a conversion that stops at the first one says."""

    @classmethod
    def at(cls, kind: str, where: str, what: str, expected: str = "", hint: str = "") -> BadInput:
        return cls(kind, UserError(where, what, expected, hint))


class Unusable(Exception):
    """What is left of a file cannot be used."""

    def __init__(self, bad: BadInput) -> None:
        self.bad = bad
        super().__init__(str(bad.error))


class BlockPart(ABC):
    """What a block has of one file; can be sent to another process."""

    @property
    @abstractmethod
    def content_bytes(self) -> int:
        """About how much memory it takes."""

    @abstractmethod
    def documents(self) -> Iterator[Document | BadInput]:
        """Parse it; bad content stands in its place."""


@dataclass(frozen=True, slots=True)
class Parsed(BlockPart):
    """Documents that were texts from the beginning, and what stands where one could not be read."""

    ready: tuple[Document | BadInput, ...]

    @property
    def content_bytes(self) -> int:
        return sum(len(item.text) for item in self.ready if isinstance(item, Document))

    def documents(self) -> Iterator[Document | BadInput]:
        yield from self.ready


@dataclass(frozen=True, slots=True)
class Unparsed(BlockPart):
    """Content of a file, from its line `first_line` on."""

    name: str
    data: bytes
    first_line: int = 1

    @property
    def content_bytes(self) -> int:
        return len(self.data)


class Reader(ABC):
    """Cuts one file, or what is like a file, into parts of blocks."""

    file: CorpusFile

    def parts(self) -> Iterator[tuple[BlockPart, int]]:
        """Parts in order, each with the bytes of the file used up when it ends.

        Bad content does not raise: it stands in the place of what cannot be read.
        """
        name, used = self.file.name, 0
        try:
            is_small = 0 < self.file.bytes <= LARGEST_POINTER
            if is_small and (error := pointer_problem(self.file.path)):
                raise Unusable(BadInput("pointer of Git LFS", error))
            for part, used in self._read():
                yield part, used
            return
        except Unusable as error:
            bad = error.bad
        except BrokenFile as error:
            bad = BadInput.at(error.kind, name, error.what, hint=error.hint)
        except OSError as error:
            bad = BadInput.at("unreadable file", name, f"cannot be read: {error.strerror or error}")
        yield Parsed((bad,)), max(used, self.file.bytes)

    @abstractmethod
    def _read(self) -> Iterator[tuple[BlockPart, int]]:
        """As :meth:`parts`.

        Raises:
            Unusable, BrokenFile, OSError: The rest cannot be read.
        """


@dataclass(frozen=True, slots=True)
class Block:
    """Some consecutive documents, not parsed yet: a large part, or many small ones of any files."""

    position: int
    """Bytes of the corpus, as it is on disk, that are used up when this block ends."""
    parts: tuple[BlockPart, ...]
    is_val: bool = False
    """Whether its documents are held out, as their source says."""

    def documents(self) -> Iterator[Document | BadInput]:
        """Parse the block; bad content is delivered as :class:`BadInput` in its place."""
        for part in self.parts:
            for item in part.documents():
                # Whatever the kind of file, no text has this character.
                if isinstance(item, Document) and "\0" in item.text:
                    item = not_text(item.where)
                yield item


def not_text(where: str) -> BadInput:
    """What to say of a NUL character."""
    return BadInput.at(
        "not text",
        where,
        "holds a NUL character: it is binary data, or text in UTF-16",
        "text in UTF-8",
        "convert UTF-16 with iconv -f UTF-16LE -t UTF-8, or leave it out with --on-error skip",
    )


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The documents of several readers, one after another."""

    readers: tuple[Reader, ...]
    block_bytes: int
    """Content of a block; one that ends with a large document has more."""
    ignored: tuple[str, ...]
    """What stands in the searched directories and is no text: other kinds, hidden files."""
    notes: tuple[str, ...]
    """What else whoever reads it should know: which texts were left where they are."""
    repeatable: bool
    """Whether the documents can be had again: not from standard input."""
    at_end: Callable[[], None]
    """Called when all is read; raises what shows only then."""

    @property
    def files(self) -> tuple[CorpusFile, ...]:
        """What the documents are read from."""
        return tuple(reader.file for reader in self.readers)

    @property
    def bytes(self) -> int:
        """Size of all files together; 0 when it is not known beforehand."""
        return sum(reader.file.bytes for reader in self.readers) if self.repeatable else 0

    def blocks(self) -> Iterator[Block]:
        packed: list[BlockPart] = []
        size = position = 0
        for part, position in self._parts():
            packed.append(part)
            size += part.content_bytes + _PART_OVERHEAD
            if 2 * size >= self.block_bytes:  # a part just short of a block is one, too
                yield Block(position, tuple(packed))
                packed, size = [], 0
        if packed:
            yield Block(position, tuple(packed))
        self.at_end()

    def documents(self) -> Iterator[Document | BadInput]:
        """All documents, parsed in this process."""
        for block in self.blocks():
            yield from block.documents()

    def _parts(self) -> Iterator[tuple[BlockPart, int]]:
        before = 0
        for reader in self.readers:
            used = 0
            for part, used in reader.parts():
                yield part, before + used
            # The size of standard input shows only now; a file may have grown since it was found.
            before += reader.file.bytes or used
