"""Encoded documents between the source's order and the order on disk, kept across interruptions.

Conversion shuffles documents, and a corpus may be larger than memory: tokens wait in a flat file. A
journal says how much of the files is valid, so that a killed conversion goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np

from data_tools.encode import DOCUMENT_ROW, EncodedBlock
from data_tools.sources import BadInput
from dualtrain.common.files import replacing

_TOKENS = "tokens.spool"
_DOCUMENTS = "documents.spool"
_LEFT_OUT = "left_out.spool"
_FILES = (_TOKENS, _DOCUMENTS, _LEFT_OUT)
_JOURNAL = "journal.json"
JOURNAL_S = 5.0


@dataclass(frozen=True)
class SpoolState:
    """How far a spool is; what the journal holds."""

    blocks: int = 0
    """Blocks of the source that are done."""
    complete: bool = False
    """Whether the whole source is done."""
    position: int = 0
    """As :attr:`Block.position`."""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """What is not in the spool, by reason."""
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_FILES, 0))
    """Valid bytes of each file."""


class Spool:
    """Everything that encoding found, in the order of the source.

    Args:
        directory: Where the files are; goes on from the journal that is there.
    """

    def __init__(self, directory: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self._directory = directory
        self.state = self._load_journal()
        self._files = {name: self._open(name) for name in _FILES}
        self._journal_at = time.monotonic() + JOURNAL_S

    def add(self, block: EncodedBlock) -> None:
        """Append a block's documents, and what was left out of it."""
        rows = block.table
        data = {
            _TOKENS: block.tokens,
            _DOCUMENTS: rows.tobytes(),
            _LEFT_OUT: b"".join(map(_left_out_line, block.problems)),
        }
        for name, content in data.items():
            self._files[name].write(content)
        before = self.state
        left_out = Counter(before.left_out) + block.filtered
        left_out.update(problem.kind for problem in block.problems)
        # One assignment: whatever interrupts us, the state is of this block or of the last.
        self.state = SpoolState(
            blocks=before.blocks + 1,
            position=block.position,
            documents=before.documents + len(rows),
            tokens=before.tokens + int(rows["length"].sum()),
            text_bytes=before.text_bytes + int(rows["bytes"].sum()),
            left_out=dict(left_out),
            sizes={name: before.sizes[name] + len(data[name]) for name in _FILES},
        )
        if time.monotonic() >= self._journal_at:
            self.save()

    def finish(self) -> None:
        """Declare that the source is at its end."""
        self.state = replace(self.state, complete=True)
        self.save()

    def save(self) -> None:
        """Make what was added so far survive a crash of the machine."""
        for stream in self._files.values():
            stream.flush()
            os.fsync(stream.fileno())
        with replacing(self._directory / _JOURNAL) as file:
            file.write_text(json.dumps(asdict(self.state)))
        self._journal_at = time.monotonic() + JOURNAL_S

    def table(self) -> np.ndarray:
        """(documents,) of :data:`DOCUMENT_ROW`."""
        self._files[_DOCUMENTS].flush()
        return np.fromfile(self._directory / _DOCUMENTS, dtype=DOCUMENT_ROW)

    def read(self, lengths: np.ndarray, order: np.ndarray) -> Iterator[np.ndarray]:
        """The documents in the given order, each (tokens,) of `dtype`.

        Args:
            lengths: (documents,) of all documents, as in :meth:`table`.
        """
        self._files[_TOKENS].flush()
        size = self.dtype.itemsize
        ends = np.cumsum(lengths)
        # Not mapped: the pages of a mapping count as this process's memory.
        with (self._directory / _TOKENS).open("rb", buffering=0) as stream:
            for document in order.tolist():
                length = int(lengths[document])
                offset = (int(ends[document]) - length) * size
                data = self._read(stream.fileno(), length * size, offset)
                yield np.frombuffer(data, dtype=self.dtype)

    def _read(self, descriptor: int, count: int, offset: int) -> bytes:
        data = os.pread(descriptor, count, offset)
        while len(data) < count:  # one call gives 2 GiB at most
            more = os.pread(descriptor, count - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, "ends too early", str(self._directory / _TOKENS))
            data += more
        return data

    def copy_left_out(self, file: Path) -> None:
        """Copy the list of what could not be read to its place in the dataset, if there is any."""
        self._files[_LEFT_OUT].flush()
        if self.state.sizes[_LEFT_OUT]:
            shutil.copyfile(self._directory / _LEFT_OUT, file)

    def close(self) -> None:
        """Close the files, which stay; what could not be written was reported when it failed."""
        for stream in self._files.values():
            with contextlib.suppress(OSError):
                stream.close()

    def _open(self, name: str) -> IO[bytes]:
        file = self._directory / name
        file.touch()
        # What was written after the journal may be half of something.
        os.truncate(file, self.state.sizes[name])
        return file.open("ab")

    def _load_journal(self) -> SpoolState:
        try:
            state = SpoolState(**json.loads((self._directory / _JOURNAL).read_bytes()))
        except FileNotFoundError:
            return SpoolState()
        for name, size in state.sizes.items():
            file = self._directory / name
            if not file.exists() or file.stat().st_size < size:
                return SpoolState()  # someone removed or cut it: begin again
        return state


def _left_out_line(problem: BadInput) -> bytes:
    facts = {"kind": problem.kind, "where": problem.error.where, "what": problem.error.what}
    return json.dumps(facts).encode() + b"\n"
