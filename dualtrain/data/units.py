"""The documents that a run trains on, and the units in which they are shuffled.

A packed document has its tokens and what is added to them as positions; ``plan`` orders units.
Lengths lie in a mapped file of eight bytes a document: they are read block by block, and what was
read is given back, so that no process holds them all.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dualtrain.common.errors import UserError

CHUNK = 1 << 18
"""Numbers that are worked on at once."""

_LARGEST_SHARE = 64
_FEWEST_SEQUENCES = 16
_SLICES = 4
_FEWEST_IN_SLICE = 1 << 22


@dataclass(frozen=True, slots=True)
class Span:
    """A run of positions [start, stop) of one document; 0 is its ``<s>``."""

    document: int
    start: int
    stop: int


class Subset:
    """The unique subset: the prefix of the documents that holds a given number of positions.

    Its last document is cut, so that the number is met exactly and smaller subsets are prefixes of
    larger ones.

    Args:
        lengths: (documents,) int64, tokens of each document of the dataset.
        unique_tokens: Positions of the subset; None takes the whole dataset.
        append_eos: Whether documents end with ``</s>``.
    """

    def __init__(self, lengths: np.ndarray, *, unique_tokens: int | None, append_eos: bool) -> None:
        self._lengths = lengths
        self._added = int(append_eos)
        self.documents, self.tokens, self._last = self._cut(unique_tokens)

    def packed_lengths(self, documents: np.ndarray | None = None) -> np.ndarray:
        """Positions of the given documents, or of all in the subset, as int64."""
        if documents is None:
            documents = np.arange(self.documents)
        packed = self._lengths[documents] + self._added
        packed[documents == self.documents - 1] = self._last
        return packed

    def forget_lengths(self) -> None:
        """Give back the memory of what was read of a mapped file; the page cache keeps it."""
        base = self._lengths.base
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap):
            base.madvise(mmap.MADV_DONTNEED)

    def _cut(self, unique_tokens: int | None) -> tuple[int, int, int]:
        total = 0
        for first in range(0, len(self._lengths), CHUNK):
            self.forget_lengths()
            ends = total + np.cumsum(self._lengths[first : first + CHUNK] + self._added)
            if unique_tokens is not None and ends[-1] >= unique_tokens:
                cut = int(np.searchsorted(ends, unique_tokens))
                before = int(ends[cut - 1]) if cut else total
                return first + cut + 1, unique_tokens, unique_tokens - before
            total = int(ends[-1])
        if unique_tokens is not None:
            counted = ", its tokens with </s>" if self._added else ""
            raise UserError(
                "unique_tokens",
                f"{unique_tokens:,} tokens are more than the dataset has",
                f"at most {total:,}{counted}",
                "use unique_tokens: all, or more repetitions",
            )
        return len(self._lengths), total, int(self._lengths[-1]) + self._added


class Units:
    """What is shuffled: the documents of a subset, but long ones in pieces of equal length.

    So the text of one huge document is mixed as that of many is. A piece has no more than 1/64 of
    the subset, but always room for 16 sequences: shorter ones would take context away.

    Unit u is document u, or its first piece; the further pieces come after all documents.

    Args:
        sequence_length: T.
    """

    def __init__(self, subset: Subset, *, sequence_length: int) -> None:
        self._subset = subset
        self._longest = max(
            -(-subset.tokens // _LARGEST_SHARE), _FEWEST_SEQUENCES * sequence_length
        )
        further = []
        for document, whole in self._long_documents():
            size = int(self._first_piece(whole))
            further += [(document, n, min(size, whole - n)) for n in range(size, whole, size)]
        self._further = np.array(further, dtype=np.int64).reshape(-1, 3)
        self.tokens = subset.tokens
        self.count = subset.documents + len(further)

    def lengths(self, units: np.ndarray) -> np.ndarray:
        """(n,) int64: positions of each of the units, whose numbers may be of any type."""
        units = units.astype(np.int64)  # unsigned ones cannot be less than zero
        if not len(self._further):
            return self._subset.packed_lengths(units)
        number = units - self._subset.documents
        is_further = number >= 0
        lengths = self._first_piece(self._subset.packed_lengths(np.where(is_further, 0, units)))
        lengths[is_further] = self._further[number[is_further], 2]
        return lengths

    def forget_lengths(self) -> None:
        """As :meth:`Subset.forget_lengths`."""
        self._subset.forget_lengths()

    def locate(self, unit: int) -> tuple[int, int]:
        """The document of a unit, and the position at which it begins in it."""
        number = unit - self._subset.documents
        if number < 0:
            return unit, 0
        return int(self._further[number, 0]), int(self._further[number, 1])

    def block_ends(self, order: np.ndarray, block: int) -> np.ndarray:
        """Where each block of units ends when they follow one another.

        The lengths are read slice by slice of the file, not in the order of the units: at any time
        one quarter of them is in memory.

        Args:
            order: (n,) units.
            block: Units in a block, a divisor of :data:`CHUNK`.

        Returns:
            (ceil(n / block),) int64: positions up to the end of each.
        """
        sums = np.zeros(-(-len(order) // block), dtype=np.int64)
        size = max(_FEWEST_IN_SLICE, -(-self.count // _SLICES))
        for first in range(0, self.count, size):
            for begin in range(0, len(order), CHUNK):
                units = order[begin : begin + CHUNK]
                places = np.flatnonzero((units >= first) & (units < first + size))
                lengths = self.lengths(units[places])
                # Summed as float64, which is exact: a block is far below 2^53 positions.
                added = np.bincount(places // block, weights=lengths).astype(np.int64)
                sums[begin // block :][: len(added)] += added
            self.forget_lengths()
        return np.cumsum(sums)

    def _long_documents(self) -> Iterator[tuple[int, int]]:
        """Documents that are too long for one piece, with their positions."""
        for first in range(0, self._subset.documents, CHUNK):
            stop = min(first + CHUNK, self._subset.documents)
            packed = self._subset.packed_lengths(np.arange(first, stop))
            for place in np.flatnonzero(packed > self._longest).tolist():
                yield first + place, int(packed[place])
            self._subset.forget_lengths()

    def _first_piece(self, whole: np.ndarray | int) -> np.ndarray:
        pieces = -(-np.asarray(whole) // self._longest)
        return -(-np.asarray(whole) // pieces)
