"""Encoded documents between the source's order and the order on disk.

Conversion shuffles documents, and a corpus may be larger than memory: tokens wait in a flat file.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np


class Spool:
    """Tokens of one split in the order of the source, in a flat file."""

    def __init__(self, file: Path, dtype: np.dtype) -> None:
        self.file = file
        self.dtype = dtype
        self.lengths = array("q")
        self.bytes = 0
        self._stream = file.open("wb")

    def add(self, tokens: np.ndarray, size: int) -> None:
        """Append a document of `size` bytes of text."""
        self._stream.write(tokens.astype(self.dtype).tobytes())
        self.lengths.append(len(tokens))
        self.bytes += size

    def close(self) -> None:
        """End writing; :meth:`documents` may be read from now on."""
        self._stream.close()

    def documents(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """The documents in the given order, each (tokens,) of `dtype`."""
        tokens = np.memmap(self.file, dtype=self.dtype, mode="r")
        ends = np.cumsum(np.frombuffer(self.lengths, dtype=np.int64))
        for document in order.tolist():
            end = int(ends[document])
            yield np.asarray(tokens[end - self.lengths[document] : end])
