"""The packing plan: which document stands at which token of a stream, in any epoch.

A stream is one endless sequence of tokens: for epoch 0, 1, 2, … the documents of that stream in
that epoch's shuffled order, each as ``<s>`` + tokens (+ ``</s>``), without a break. Sequence i of T
tokens is stream tokens [i·T, i·T + T]: T inputs, and one more that is the last target and the next
sequence's first input. So every token is a target exactly once in each pass.

With rotation, a document of group g is in the AR stream in epoch e iff (g + e) mod G < α·G and
otherwise in the diffusion stream, hence in α·R of R epochs exactly. The tokens of an epoch depend
on e mod G only, which gives closed-form offsets and random access.

Positions here count packed tokens, with ``<s>`` and ``</s>``; documents are numbers in the dataset.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from dualtrain.data.plan_files import PlanFiles
from dualtrain.errors import UserError
from dualtrain.mixing import STREAM_NUMBERS, Stream, is_autoregressive, rotation_groups
from dualtrain.randomness import generator

_CHUNK = 1 << 20
_GREEDY_ROWS = 20_000
_KEPT_EPOCHS = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of packed tokens [start, stop) of one document; 0 is its ``<s>``."""

    document: int
    start: int
    stop: int


class Subset:
    """The unique subset: the prefix of the documents that holds a given number of packed tokens.

    Its last document is cut, so that the number is met exactly and smaller subsets are prefixes of
    larger ones.

    Args:
        lengths: (documents,) int64, tokens of each document of the dataset.
        unique_tokens: Packed tokens of the subset; None takes the whole dataset.
        append_eos: Whether documents are packed with ``</s>``.

    Raises:
        UserError: The dataset has fewer tokens than that.
    """

    def __init__(self, lengths: np.ndarray, *, unique_tokens: int | None, append_eos: bool) -> None:
        self._lengths = lengths
        self._added = 2 if append_eos else 1
        self.documents, self.tokens, self._last = self._cut(unique_tokens)

    def packed_lengths(self, documents: np.ndarray | None = None) -> np.ndarray:
        """Packed tokens of the given documents, or of all in the subset, as int64."""
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
            marks = "<s> and </s>" if self._added == 2 else "<s>"
            raise UserError(
                "unique_tokens",
                f"{unique_tokens:,} tokens are more than the dataset has",
                f"at most {total:,}, its tokens with {marks}",
                "use unique_tokens: all, or more repetitions",
            )
        return len(self._lengths), total, int(self._lengths[-1]) + self._added


class Rotation:
    """Which documents of a subset are autoregressive in which epoch.

    Args:
        subset: The documents.
        alpha: AR share.
        seed: Of the run.
        files: Where the groups are kept.
    """

    def __init__(self, subset: Subset, *, alpha: Fraction, seed: int, files: PlanFiles) -> None:
        self.alpha = alpha
        self.groups = rotation_groups(alpha)
        self._subset = subset
        self._seed = seed
        self._group_of = files.load("groups", 0, self._assign)
        tokens = files.load("grouptokens", 0, self._count)
        self._group_tokens = np.asarray(tokens)

    def belongs(self, documents: np.ndarray, epoch: int, stream: Stream) -> np.ndarray:
        """(n,) bool: which of the documents are in `stream` in that epoch."""
        autoregressive = np.asarray(
            is_autoregressive(self._group_of[documents], epoch, self.groups, self.alpha)
        )
        return autoregressive if stream == "ar" else ~autoregressive

    def period_tokens(self, stream: Stream) -> np.ndarray:
        """(groups,) int64: packed tokens of `stream` in each epoch of one period."""
        everyone = np.arange(self.groups)
        in_ar = np.stack(
            [is_autoregressive(everyone, e, self.groups, self.alpha) for e in range(self.groups)]
        )
        return (in_ar if stream == "ar" else ~in_ar).astype(np.int64) @ self._group_tokens

    def _assign(self) -> np.ndarray:
        return balanced_groups(
            self._subset.packed_lengths(),
            self.groups,
            generator(self._seed, "document groups", self.groups),
        )

    def _count(self) -> np.ndarray:
        # float64 adds whole numbers exactly up to 2**53 tokens.
        return np.bincount(
            self._group_of, weights=self._subset.packed_lengths(), minlength=self.groups
        ).astype(np.int64)


def balanced_groups(lengths: np.ndarray, groups: int, rng: np.random.Generator) -> np.ndarray:
    """Deal documents into groups of nearly equal token counts.

    The longest documents, `groups` at a time, go to the groups that have least so far; the mass of
    short ones is dealt back and forth.

    Args:
        lengths: (documents,) int64.
        groups: At most 256.
        rng: Decides between documents of equal length.

    Returns:
        (documents,) uint8, the group of each document.
    """
    shuffled = rng.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows = -(-len(order) // groups)
    table = np.empty((rows, groups), dtype=np.uint8)
    table[0::2] = np.arange(groups)
    table[1::2] = np.arange(groups)[::-1]
    totals = np.zeros(groups, dtype=np.int64)
    for row in range(min(rows, _GREEDY_ROWS)):
        dealt = lengths[order[row * groups : (row + 1) * groups]]
        table[row] = np.argsort(totals, kind="stable")
        totals[table[row, : len(dealt)]] += dealt
    group_of = np.empty(len(order), dtype=np.uint8)
    group_of[order] = table.reshape(-1)[: len(order)]
    return group_of


class StreamPlan:
    """Random access to one stream.

    Args:
        subset: The documents.
        stream: Its name; streams shuffle independently of each other.
        rotation: Decides the stream's documents in each epoch; None takes all, in every epoch.
        seed: Of the run.
        files: Where epochs are kept.
    """

    def __init__(
        self,
        subset: Subset,
        *,
        stream: Stream,
        rotation: Rotation | None,
        seed: int,
        files: PlanFiles,
    ) -> None:
        self.stream: Stream = stream
        self._subset = subset
        self._rotation = rotation if stream != "all" else None
        self._seed = seed
        self._files = files
        tokens = [subset.tokens] if self._rotation is None else self._rotation.period_tokens(stream)
        self._period = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def epoch_start(self, epoch: int) -> int:
        """Stream position of the first token of an epoch."""
        periods, rest = divmod(epoch, len(self._period) - 1)
        return periods * int(self._period[-1]) + int(self._period[rest])

    def epoch_at(self, position: int) -> int:
        """The epoch that a stream position belongs to; epochs without documents have none.

        Raises:
            ValueError: The stream is empty (alpha is 0 or 1), or the position negative.
        """
        if self._period[-1] == 0 or position < 0:
            raise ValueError(f"stream '{self.stream}' has no token {position}")
        periods, rest = divmod(position, int(self._period[-1]))
        within = int(np.searchsorted(self._period, rest, side="right")) - 1
        return periods * (len(self._period) - 1) + within

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The pieces of documents that make up stream tokens [start, stop), in order."""
        pieces: list[Piece] = []
        epoch = self.epoch_at(start)
        while start < stop:
            first, end = self.epoch_start(epoch), self.epoch_start(epoch + 1)
            if start < end:
                order, ends = self._load(epoch)
                pieces += pieces_between(order, ends, start - first, min(stop, end) - first)
                start = end
            epoch += 1
        return pieces

    def sequence(self, index: int, length: int) -> list[Piece]:
        """The pieces of sequence `index`: `length` inputs and the token after them."""
        return self.pieces(index * length, index * length + length + 1)

    def _load(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._files.load(self.stream, epoch, self._builder(epoch))
            self._files.build_ahead(self.stream, epoch + 1, self._builder(epoch + 1))
            self._files.remove_below(self.stream, epoch - 1)
        while len(self._epochs) > _KEPT_EPOCHS:
            self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _builder(self, epoch: int) -> Callable[[], np.ndarray]:
        return lambda: self._build(epoch)

    def _build(self, epoch: int) -> np.ndarray:
        """(2, documents in the epoch) int64: their numbers, and where each ends in the epoch."""
        # All documents are shuffled before some are picked, so that runs with different alpha see
        # what they share in the same order.
        rng = generator(self._seed, "document order", STREAM_NUMBERS[self.stream], epoch)
        order = rng.permutation(self._subset.documents)
        if self._rotation is not None:
            order = order[self._rotation.belongs(order, epoch, self.stream)]
        return np.stack([order, np.cumsum(self._subset.packed_lengths(order))])


def pieces_between(order: np.ndarray, ends: np.ndarray, start: int, stop: int) -> list[Piece]:
    """The pieces of tokens [start, stop) of documents that follow one another.

    Args:
        order: (n,) document numbers.
        ends: (n,) int64, position after each document's last token.
        start: First position.
        stop: Position after the last one, at most ``ends[-1]``.
    """
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, stop, side="left"))
    begin = int(ends[first - 1]) if first else 0
    pieces = []
    for document, end in zip(
        order[first : last + 1].tolist(), ends[first : last + 1].tolist(), strict=True
    ):
        pieces.append(Piece(document, max(start, begin) - begin, min(stop, end) - begin))
        begin = end
    return pieces
