"""Rows for scoring from left to right, in which shared beginnings stand once.

Sequences in lexicographic order are walked like a tree: each adds to the row only what it does not
have in common with the one before. So the choices of a question share the question, questions
share the examples before them, and a minimal pair shares all before its difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dualtrain.evaluate.packing import TreeRow
from dualtrain.evaluate.request import Passage

_KEYS_LIKE_A_TOKEN = 768
"""So many keys more to attend to cost a token as much as all the rest of the model.

Measured on a CPU at width 192, with a mask; it grows with the width. It decides how many sequences
share a row, and hardly matters to within a factor of 2.
"""


def make_trees(
    passages: Sequence[Passage], *, bidirectional: bool, limit: int
) -> tuple[list[TreeRow], list[np.ndarray]]:
    """Lay passages out in as few tokens as pays.

    A passage is added to the row before it if that costs less than the row's passages do on
    average; from there on the longer rows cost more than the shared tokens save.

    Args:
        bidirectional: Whether contexts see themselves in both directions. Then only passages with
            the same context share a row.
        limit: Tokens of a row with several passages.

    Returns:
        The rows, and for each passage the numbers of the readings that are its tokens' losses.
    """
    arrays = [np.array(passage.tokens, np.int64) for passage in passages]
    # As bytes, most significant first, since these are compared much faster than tuples.
    keys = [array.astype(">u4").tobytes() for array in arrays]
    cuts = [4 * passage.begin if bidirectional else 0 for passage in passages]
    groups = [key[:cut] for key, cut in zip(keys, cuts, strict=True)]
    order = sorted(range(len(passages)), key=lambda i: (groups[i], keys[i]))
    rows: list[TreeRow] = []
    reads = [np.empty(0, np.int64)] * len(passages)
    tree, last = _Tree(0, 0), -1
    for i in order:
        begin = passages[i].begin
        joins = last >= 0 and groups[i] == groups[last] and tree.should_take(arrays[i], limit)
        if not joins:
            if last >= 0:
                rows.append(tree.finish())
            tree = _Tree(tree.next_read, begin if bidirectional else 0)
        reads[i] = tree.add(arrays[i], begin)
        last = i
    if last >= 0:
        rows.append(tree.finish())
    return rows, reads


class _Tree:
    """A row in the making."""

    def __init__(self, first_read: int, prompt_length: int) -> None:
        self._first_read, self._prompt_length = first_read, prompt_length
        self._last = np.empty(0, np.int64)
        # Places in the row of the last sequence's tokens.
        self._path: list[int] = []
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._ends: list[int] = []
        # (place, target) to the number of the reading; those of shared tokens are shared, too.
        self._reads: dict[tuple[int, int], int] = {}
        self._parts = 0

    @property
    def next_read(self) -> int:
        """Number of the next row's first reading."""
        return self._first_read + len(self._reads)

    def should_take(self, sequence: np.ndarray, limit: int) -> bool:
        """Whether one more sequence costs less here than those that are here do."""
        before = len(self._tokens)
        after = before + len(sequence) - 1 - self._shared(sequence)
        cost = _cost(after) - _cost(before)
        return after <= limit and cost * self._parts <= _cost(before)

    def add(self, sequence: np.ndarray, begin: int) -> np.ndarray:
        """Add a sequence and return the numbers of the readings of its tokens from ``begin`` on."""
        # Nothing is predicted from the last token, so it is no input.
        shared, here = self._shared(sequence), len(self._tokens)
        self._close(shared)
        tokens = sequence.tolist()
        self._tokens += tokens[shared:-1]
        self._positions += range(shared, len(tokens) - 1)
        self._path += range(here, len(self._tokens))
        self._ends += [0] * (len(self._tokens) - here)
        self._last = sequence[:-1]
        self._parts += 1
        numbers = []
        for depth in range(begin, len(tokens)):
            key = self._path[depth - 1], tokens[depth]
            numbers.append(self._reads.setdefault(key, self.next_read))
        return np.array(numbers, np.int64)

    def finish(self) -> TreeRow:
        """Make the row."""
        self._close(0)
        at, targets = np.array(list(self._reads), np.int64).T
        return TreeRow(
            tokens=np.array(self._tokens, np.int64),
            positions=np.array(self._positions, np.int64),
            at=at,
            targets=targets,
            reads=np.arange(self._first_read, self.next_read),
            parts=self._parts,
            ends=np.array(self._ends, np.int64),
            prompt_length=self._prompt_length,
        )

    def _shared(self, sequence: np.ndarray) -> int:
        """How many of a sequence's tokens are the last one's."""
        length = min(len(self._last), len(sequence) - 1)
        differ = np.flatnonzero(self._last[:length] != sequence[:length])
        return int(differ[0]) if len(differ) else length

    def _close(self, depth: int) -> None:
        """Let nothing more descend from the last sequence's tokens at this depth and below."""
        for place in self._path[depth:]:
            self._ends[place] = len(self._tokens)
        del self._path[depth:]


def _cost(length: int) -> int:
    """What a row costs, in units of its own."""
    return length * (_KEYS_LIKE_A_TOKEN + length)
