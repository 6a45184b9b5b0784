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

from collections.abc import Iterator
from functools import lru_cache, partial

import numpy as np

from dualtrain.common.randomness import KeyedPermutation, generator
from dualtrain.data.part_order import (
    BLOCK,
    Arc,
    PartOrder,
    build_order,
    find_unit,
    number_type,
    shuffle,
)
from dualtrain.data.plan_files import PlanFiles
from dualtrain.data.units import CHUNK, Span, Units
from dualtrain.method.mixing import STREAM_NUMBERS, Mixture, Stream

DATA_ORDER = 2
"""Version of the order: one more whenever a recipe comes to give other sequences than before.

Runs, sweeps and plan files of another version are not gone on with.
"""

_LOOK_AHEAD = 64  # parts in which the next that is not empty is looked for
_LAST_EPOCH = 1 << 40


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
    ) -> None:
        self._units = units
        self._mixture = mixture
        self._sequence_length = sequence_length
        self._seed = seed
        self._circle_ends: np.ndarray | None = None
        self._walked = lru_cache(maxsize=1 << 12)(self._count_walked)

    def circle(self) -> np.ndarray:
        """The units in their order round the circle; made anew each time, and never kept."""
        order = np.empty(self._units.count, dtype=number_type(self._units.count))
        shuffle(order, generator(self._seed, "circle"))
        return order

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

    def arc(self, begin: int, end: int) -> Arc:
        """What of the units is on the arc [begin, end), which is not empty."""
        circle = self.circle()
        if self._circle_ends is None:  # of each block, so little that it is kept
            self._circle_ends = self._units.block_ends(circle, BLOCK)
        first, start, _ = find_unit(circle, self._circle_ends, self._units, begin)
        last, _, stop = find_unit(circle, self._circle_ends, self._units, end - 1)
        self._units.forget_lengths()
        is_touched = np.zeros(self._units.count, dtype=bool)
        for chunk in range(first, last + 1, CHUNK):
            is_touched[circle[chunk : min(chunk + CHUNK, last + 1)]] = True
        return Arc(is_touched, int(circle[first]), begin - start, int(circle[last]), stop - end)

    def _walks(self, stream: Stream) -> bool:
        return (stream == "ar") == self._mixture.ar_walks

    def _count_walked(self, epoch: int) -> int:
        tokens = epoch * self._units.tokens
        ar = self._mixture.ar_tokens(tokens, self._sequence_length)
        return ar if self._mixture.ar_walks else tokens - ar


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
        # Of the last part only: older ones would hold the room of files that were removed.
        self._order_of: tuple[int, PartOrder] | None = None
        self._permutation_of: tuple[int, KeyedPermutation] | None = None

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
        begin = self._start(part)
        for piece in self._order(part).pieces(start - begin, stop - begin):
            document, offset = self._units.locate(piece.document)
            yield Span(document, offset + piece.start, offset + piece.stop)

    def _permutation(self, part: int, size: int) -> KeyedPermutation:
        if self._permutation_of is None or self._permutation_of[0] != part:
            key = STREAM_NUMBERS[self.stream], part
            made = KeyedPermutation(size, self._seed, "sequence order", *key)
            self._permutation_of = part, made
        return self._permutation_of[1]

    def _order(self, part: int) -> PartOrder:
        if self._order_of is None or self._order_of[0] != part:
            self._order_of = None  # unmapped before the next is built
            self._order_of = part, self._load_order(part)
        return self._order_of[1]

    def _load_order(self, part: int) -> PartOrder:
        words = self._files.load(self.stream, part, partial(self._build, part))
        for following in range(part + 1, part + 1 + _LOOK_AHEAD):
            if self._start(following) < self._start(following + 1):
                build = partial(self._build, following)
                self._files.build_ahead(self.stream, following, build, oldest=part)
                break
        return PartOrder(words, self._units)

    def _build(self, part: int) -> np.ndarray:
        """The order of a part, as :class:`PartOrder` reads it."""
        # All units are shuffled before some are picked, so that runs with different alpha see what
        # they share in the same order.
        epoch = part // 2
        rng = generator(self._seed, "document order", STREAM_NUMBERS[self.stream], epoch)
        arc = None
        if self._rotation is not None:
            arc = self._rotation.arc(*self._arcs(epoch)[part % 2])
        return build_order(self._units, rng, arc)
