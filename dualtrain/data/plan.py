"""The packing plan: which document stands at which token of a stream, in any pass over the text.

A document is packed as positions: its tokens with ``<s>`` in front (and ``</s>`` behind, when asked
for), without the last one, which is a target only. A stream is one endless sequence of positions:
for epoch 0, 1, 2, … the documents that the stream has in that epoch, in that epoch's shuffled
order, without a break. Window i of T positions is [i·T, i·T + T): every position of a stream is in
one window. The windows that begin in the same part of an epoch are shuffled, too, so that a batch
mixes passages of many documents, as in the released code (``chunk`` in its ``dataset.py``); but
nothing is dropped where an epoch ends.

Without rotation every stream has all documents in every epoch. With rotation the streams ``ar`` and
``diffusion`` share each epoch: see :class:`Rotation`.

Positions here are packed ones; documents are numbers in the dataset.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np

from dualtrain.common.errors import UserError
from dualtrain.common.randomness import KeyedPermutation, generator
from dualtrain.data.plan_files import PlanFiles
from dualtrain.method.mixing import STREAM_NUMBERS, Mixture, Stream

Made = TypeVar("Made")

DATA_ORDER = 2
"""Version of the order: one more whenever a recipe comes to give other sequences than before.

Runs, sweeps and plan files of another version are not gone on with.
"""

_CHUNK = 1 << 20
_KEPT_PARTS = 4
_LOOK_AHEAD = 64  # parts in which the next that is not empty is looked for
_LAST_EPOCH = 1 << 40
_LARGEST_SHARE = 64
_FEWEST_SEQUENCES = 16


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

    def _cut(self, unique_tokens: int | None) -> tuple[int, int, int]:
        total = 0
        for first in range(0, len(self._lengths), _CHUNK):
            ends = total + np.cumsum(self._lengths[first : first + _CHUNK] + self._added)
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
        packed = subset.packed_lengths()
        further = []
        for document in np.flatnonzero(packed > self._longest).tolist():
            whole = int(packed[document])
            size = int(self._first_piece(whole))
            further += [(document, n, min(size, whole - n)) for n in range(size, whole, size)]
        self._further = np.array(further, dtype=np.int64).reshape(-1, 3)
        self.tokens = subset.tokens
        self.count = subset.documents + len(further)

    def lengths(self, units: np.ndarray) -> np.ndarray:
        """(n,) int64: positions of each of the units."""
        if not len(self._further):
            return self._subset.packed_lengths(units)
        number = units - self._subset.documents
        is_further = number >= 0
        lengths = self._first_piece(self._subset.packed_lengths(np.where(is_further, 0, units)))
        lengths[is_further] = self._further[number[is_further], 2]
        return lengths

    def locate(self, unit: int) -> tuple[int, int]:
        """The document of a unit, and the position at which it begins in it."""
        number = unit - self._subset.documents
        if number < 0:
            return unit, 0
        return int(self._further[number, 0]), int(self._further[number, 1])

    def _first_piece(self, whole: np.ndarray | int) -> np.ndarray:
        pieces = -(-np.asarray(whole) // self._longest)
        return -(-np.asarray(whole) // pieces)


class Rotation:
    """How the objectives take turns over the text, so that each token gets its share of both.

    The units stand in a seeded order round a circle of N tokens. One objective, of which there is
    less, walks round it: in epoch e it has the tokens [w(e), w(e+1)) of the circle, where w(e) is
    how many it reads in the run's first e·N (``Mixture.ar_tokens``). The other one has the rest of
    the circle. So in every epoch each token is read once, and after E epochs the walker has read it
    floor(w(E)/N) or ceil(w(E)/N) times: for any corpus, alpha and schedule.

    So that this holds in the middle of an epoch, too, each stream reads an epoch in up to two
    parts, one after the other: first what its objective has had less often so far. The walker's
    second part begins where it comes round the circle; the other's first part lies behind the
    walker, up to the beginning of the circle.

    Where its part of an epoch ends within a document, the walker goes on with the rest of it in the
    next epoch, without a break; for the other one that document is cut.

    Args:
        sequence_length: T.
    """

    def __init__(
        self,
        units: Units,
        *,
        mixture: Mixture,
        sequence_length: int,
        seed: int,
        files: PlanFiles,
    ) -> None:
        self._units = units
        self._mixture = mixture
        self._sequence_length = sequence_length
        self._seed = seed
        self._starts = np.asarray(files.load("circle", 0, self._place))
        self._walked = lru_cache(maxsize=1 << 12)(self._count_walked)

    def start(self, unit: int) -> int:
        """Where a unit begins on the circle."""
        return int(self._starts[unit])

    def epoch_start(self, stream: Stream, epoch: int) -> int:
        """Position of a stream at which an epoch begins."""
        walked = self._walked(epoch)
        return walked if self._walks(stream) else epoch * self._units.tokens - walked

    def parts(self, stream: Stream, epoch: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The two arcs [begin, end) of the circle that a stream has in an epoch; may be empty."""
        round_, begin = divmod(self._walked(epoch), self._units.tokens)
        end = self._walked(epoch + 1) - round_ * self._units.tokens
        over = max(0, end - self._units.tokens)
        if self._walks(stream):
            return (begin, end - over), (0, over)
        return (over, begin), (end - over, self._units.tokens)

    def pick(self, order: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The units of an arc and their lengths within it, in an order of all units.

        The one that the arc's beginning cuts comes first, the one that its end cuts last, so that
        both are whole in the stream of the walker.
        """
        stops = self._starts + self._units.lengths(np.arange(self._units.count))
        is_touched = (self._starts < end) & (stops > begin)
        order = order[is_touched[order]]
        starts, stops = self._starts[order], stops[order]
        begins, ends = np.maximum(starts, begin), np.minimum(stops, end)
        place = (ends < stops).astype(np.int8) - (begins > starts)
        by_place = np.argsort(place, kind="stable")
        return order[by_place], (ends - begins)[by_place]

    def _walks(self, stream: Stream) -> bool:
        return (stream == "ar") == self._mixture.ar_walks

    def _count_walked(self, epoch: int) -> int:
        tokens = epoch * self._units.tokens
        ar = self._mixture.ar_tokens(tokens, self._sequence_length)
        return ar if self._mixture.ar_walks else tokens - ar

    def _place(self) -> np.ndarray:
        order = generator(self._seed, "circle").permutation(self._units.count)
        starts = np.empty(self._units.count, dtype=np.int64)
        lengths = self._units.lengths(order)
        starts[order] = np.cumsum(lengths) - lengths
        return starts


class StreamPlan:
    """Random access to one stream.

    A part is what is shuffled together: number 2·e and 2·e + 1 are those of epoch e.

    Args:
        stream: Its name; streams shuffle independently of each other.
        rotation: Decides what the stream has of each epoch; None: all of it.
        sequence_length: T.
    """

    def __init__(
        self,
        units: Units,
        *,
        stream: Stream,
        rotation: Rotation | None,
        sequence_length: int,
        seed: int,
        files: PlanFiles,
    ) -> None:
        self.stream: Stream = stream
        self._units = units
        self._rotation = rotation
        self._length = sequence_length
        self._seed = seed
        self._files = files
        self._latest = 0
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()
        self._permutations: OrderedDict[int, KeyedPermutation] = OrderedDict()

    def epoch_start(self, epoch: int) -> int:
        """Stream position at which an epoch begins."""
        if self._rotation is None:
            return epoch * self._units.tokens
        return self._rotation.epoch_start(self.stream, epoch)

    def epoch_at(self, position: int) -> int:
        """The epoch that a stream position belongs to; one in which the stream is empty has none.

        Raises:
            ValueError: The stream ends before that position, or the position is negative.
        """
        if position < 0:
            raise ValueError(f"stream '{self.stream}' has no token {position}")
        low = self._latest  # asked for in order, as a rule
        if self.epoch_start(low) > position:
            low = 0
        step = 1
        while self.epoch_start(low + step) <= position:
            low, step = low + step, 2 * step
            if low > _LAST_EPOCH:
                raise ValueError(f"stream '{self.stream}' has no token {position}")
        high = low + step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.epoch_start(middle) <= position else (low, middle)
        self._latest = low
        return low

    def sequence(self, index: int) -> list[Span]:
        """The pieces of the T positions that the stream has as its sequence `index`."""
        part, window = self._part_at(index * self._length), index
        first = -(-self._start(part) // self._length)
        inside = self._start(part + 1) // self._length - first
        # The one that lies across the part's end comes last: the next part begins in it.
        if index < first + inside:
            window = first + self._permutation(part, inside)[index - first]
        return self.pieces(window * self._length, (window + 1) * self._length)

    def pieces(self, start: int, stop: int) -> list[Span]:
        """The pieces of documents that make up stream positions [start, stop), in order."""
        pieces: list[Span] = []
        part = self._part_at(start)
        while start < stop:
            end = min(stop, self._start(part + 1))
            for piece in self._pieces_within(part, start, end) if start < end else ():
                before = pieces[-1] if pieces else None
                if before and (before.document, before.stop) == (piece.document, piece.start):
                    piece = Span(before.document, pieces.pop().start, piece.stop)
                pieces.append(piece)
            start, part = max(start, end), part + 1
        return pieces

    def _start(self, part: int) -> int:
        """Stream position at which a part begins."""
        epoch, second = divmod(part, 2)
        if not second:
            return self.epoch_start(epoch)
        begin, end = self._arcs(epoch)[0]
        return self.epoch_start(epoch) + max(0, end - begin)

    def _part_at(self, position: int) -> int:
        epoch = self.epoch_at(position)
        return 2 * epoch + (position >= self._start(2 * epoch + 1))

    def _arcs(self, epoch: int) -> tuple[tuple[int, int], tuple[int, int]]:
        if self._rotation is None:
            return (0, self._units.tokens), (0, 0)
        return self._rotation.parts(self.stream, epoch)

    def _pieces_within(self, part: int, start: int, stop: int) -> Iterator[Span]:
        """The pieces of stream positions [start, stop), which lie in one part."""
        order, ends = self._order(part)
        begin = self._start(part)
        for piece in pieces_between(order, ends, start - begin, stop - begin):
            unit = piece.document
            document, offset = self._units.locate(unit)
            if self._rotation is not None and unit == order[0]:
                # What the arc has of its first unit need not be its beginning.
                offset += max(0, self._arcs(part // 2)[part % 2][0] - self._rotation.start(unit))
            yield Span(document, offset + piece.start, offset + piece.stop)

    def _permutation(self, part: int, size: int) -> KeyedPermutation:
        key = STREAM_NUMBERS[self.stream], part
        make = partial(KeyedPermutation, size, self._seed, "sequence order", *key)
        return _recent(self._permutations, part, make)

    def _order(self, part: int) -> np.ndarray:
        return _recent(self._orders, part, partial(self._load_order, part))

    def _load_order(self, part: int) -> np.ndarray:
        order = self._files.load(self.stream, part, partial(self._build, part))
        for following in range(part + 1, part + 1 + _LOOK_AHEAD):
            if self._start(following) < self._start(following + 1):
                self._files.build_ahead(self.stream, following, partial(self._build, following))
                break
        self._files.remove_below(self.stream, part - 2)
        return order

    def _build(self, part: int) -> np.ndarray:
        """(2, units in the part) int64: their numbers, and where each ends in the part."""
        # All units are shuffled before some are picked, so that runs with different alpha see what
        # they share in the same order.
        epoch = part // 2
        rng = generator(self._seed, "document order", STREAM_NUMBERS[self.stream], epoch)
        order = rng.permutation(self._units.count)
        if self._rotation is None:
            lengths = self._units.lengths(order)
        else:
            order, lengths = self._rotation.pick(order, *self._arcs(epoch)[part % 2])
        return np.stack([order, np.cumsum(lengths)])


def _recent(kept: OrderedDict[int, Made], part: int, make: Callable[[], Made]) -> Made:
    """What belongs to a part, made anew unless it is one of the last few."""
    if part not in kept:
        kept[part] = make()
        if len(kept) > _KEPT_PARTS:
            kept.popitem(last=False)
    return kept[part]


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
