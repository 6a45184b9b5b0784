"""The order of the units in one part of a stream: four bytes for each, built, stored and read.

``plan`` has a part's order built in one process, and every rank of the machine maps it. Where each
unit ends is stored for blocks only; within one it is computed from the lengths when it is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dualtrain.data.units import CHUNK, Span, Units

ORDER_FORMAT = 2
"""Version of the stored arrays; files of another one are not read."""

BLOCK = 1 << 10
"""Units between two stored ends."""

_SMALL_NUMBERS = 1 << 32
_FACTS = 3


@dataclass(frozen=True)
class Arc:
    """What a part has of the units.

    Attributes:
        is_touched: (units,) bool.
        first: The unit that the arc's beginning may cut, with positions of it that lie before it.
        last: The unit that the arc's end may cut, with positions of it that lie behind it.
    """

    is_touched: np.ndarray
    first: int
    before: int
    last: int
    behind: int


class PartOrder:
    """The units of a part in their order, and where each ends.

    Args:
        words: What :func:`build_order` made, perhaps mapped from a file.
    """

    def __init__(self, words: np.ndarray, units: Units) -> None:
        self._units = units
        words = np.asarray(words)  # as a mapped file's own type every slice would cost more
        wide = 8 // words.itemsize
        tail = words[-_FACTS * wide :].view(np.int64)
        count, self._before, self._behind = tail.tolist()
        self._order = words[:count]
        blocks = -(-count // BLOCK)
        self._ends = words[-(blocks + _FACTS) * wide : -_FACTS * wide].view(np.int64)

    def pieces(self, start: int, stop: int) -> list[Span]:
        """The pieces of units that make up positions [start, stop) of the part.

        Returns:
            In order; `document` is the number of the unit.
        """
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        order = self._order[first * BLOCK : (last + 1) * BLOCK]
        lengths = self._units.lengths(order)
        if first == 0:
            lengths[0] -= self._before
        if last == len(self._ends) - 1:
            lengths[-1] -= self._behind
        base = int(self._ends[first - 1]) if first else 0
        pieces = pieces_between(order, np.cumsum(lengths), start - base, stop - base)
        if self._before and pieces[0].document == self._order[0] and first == 0:
            # What the arc has of its first unit is not its beginning.
            cut = pieces[0]
            pieces[0] = Span(cut.document, cut.start + self._before, cut.stop + self._before)
        return pieces


def build_order(units: Units, rng: np.random.Generator, arc: Arc | None) -> np.ndarray:
    """Shuffle all units and keep those of an arc, in little more than the room of the result.

    The unit that the arc's beginning cuts comes first, the one that its end cuts last, so that both
    are whole in the stream of the objective that walks round the circle.

    Returns:
        (words,) uint32, or int64 from 2^32 units on: the units in their order; then, in int64, the
        positions up to the end of each block, the number of units, and what is missing of the
        first and of the last.
    """
    kind = number_type(units.count)
    wide = 8 // np.dtype(kind).itemsize
    room = units.count + 2 + (-(-units.count // BLOCK) + _FACTS) * wide
    words = np.empty(room, dtype=kind)
    count = units.count
    if arc is None:
        shuffle(words[:count], rng)
    else:
        # One place later, so that the first unit can be put in front of what is picked.
        everyone = words[1 : 1 + count]
        shuffle(everyone, rng)
        count = _pick(words, everyone, arc)
    ends = units.block_ends(words[:count], BLOCK)
    before, behind = (arc.before, arc.behind) if arc is not None else (0, 0)
    facts = np.array([count, before, behind], dtype=np.int64)
    # A cut unit loses its part in every block behind it.
    ends -= before
    ends[-1] -= behind
    tail = np.concatenate([ends, facts]).view(kind)
    place = -(-count // wide) * wide
    words[place : place + len(tail)] = tail
    return words[: place + len(tail)]


def _pick(words: np.ndarray, everyone: np.ndarray, arc: Arc) -> int:
    """Move the units of an arc to the front of `words`, in which `everyone` begins at 1."""
    count = 0
    is_single = arc.first == arc.last
    if arc.before and not is_single:
        arc.is_touched[arc.first] = False
        words[0], count = arc.first, 1
    if arc.behind and not is_single:
        arc.is_touched[arc.last] = False
    for begin in range(0, len(everyone), CHUNK):
        some = everyone[begin : begin + CHUNK]
        picked = some[arc.is_touched[some]]
        words[count : count + len(picked)] = picked
        count += len(picked)
    if arc.behind and not is_single:
        words[count], count = arc.last, count + 1
    return count


def number_type(count: int) -> type[np.integer]:
    """The type that holds numbers of so many units."""
    return np.uint32 if count <= _SMALL_NUMBERS else np.int64


def shuffle(out: np.ndarray, rng: np.random.Generator) -> None:
    """Fill with ``rng.permutation(len(out))``, which would be int64."""
    for begin in range(0, len(out), CHUNK):
        out[begin : begin + CHUNK] = np.arange(begin, min(begin + CHUNK, len(out)))
    rng.shuffle(out)


def find_unit(
    order: np.ndarray, ends: np.ndarray, units: Units, position: int
) -> tuple[int, int, int]:
    """Which unit has a position when they follow one another in an order.

    Args:
        ends: As :meth:`~dualtrain.data.units.Units.block_ends` gives them.

    Returns:
        Its place in the order; where it begins and ends.
    """
    block = int(np.searchsorted(ends, position, side="right"))
    base = int(ends[block - 1]) if block else 0
    inside = base + np.cumsum(units.lengths(order[block * BLOCK : (block + 1) * BLOCK]))
    place = int(np.searchsorted(inside, position, side="right"))
    return block * BLOCK + place, int(inside[place - 1]) if place else base, int(inside[place])


def pieces_between(order: np.ndarray, ends: np.ndarray, start: int, stop: int) -> list[Span]:
    """The pieces of tokens [start, stop) of documents that follow one another.

    Args:
        order: (n,) document numbers.
        ends: (n,) int64, position after each document's last token.
        stop: Position after the last one, at most ``ends[-1]``.
    """
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, stop, side="left"))
    begin = int(ends[first - 1]) if first else 0
    pieces = []
    for document, end in zip(
        order[first : last + 1].tolist(), ends[first : last + 1].tolist(), strict=True
    ):
        pieces.append(Span(document, max(start, begin) - begin, min(stop, end) - begin))
        begin = end
    return pieces
