"""Micro-batches of clean sequences, for training and for the held-out split.

``train`` and ``prefetch`` ask :class:`TrainingData` for a slot's sequences by stream and absolute
index; nothing here remembers what was asked before, so any process gives the same answer.

Shapes: B sequences of T tokens; the token after each sequence comes along as its last target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dualtrain.data.dataset import TokenDataset
from dualtrain.data.plan import Piece, Rotation, StreamPlan, Subset, pieces_between
from dualtrain.data.plan_files import PlanFiles
from dualtrain.errors import UserError
from dualtrain.mixing import Stream

# Below this many documents an epoch's plan is built faster than a file is opened.
DOCUMENTS_IN_MEMORY = 1 << 18


@dataclass
class Batch:
    """Consecutive sequences of one stream."""

    tokens: Tensor
    """(B, T+1) int64: T inputs and the token after them."""
    document_ids: Tensor
    """(B, T) int32: 0 for the row's first document, one more after each ``<s>``."""
    sequence_ids: Tensor
    """(B,) int64: absolute index of each sequence in its stream."""
    stream: Stream
    documents: tuple[tuple[int, ...], ...]
    """Per row, the numbers in the dataset of its documents, in order."""

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for copies to a GPU that do not wait."""
        return Batch(
            self.tokens.pin_memory(),
            self.document_ids.pin_memory(),
            self.sequence_ids.pin_memory(),
            self.stream,
            self.documents,
        )


class TrainingData:
    """The training split as streams of packed sequences; for one thread at a time.

    Args:
        dataset: The ``train`` split.
        sequence_length: T.
        micro_batch: Sequences of a batch.
        seed: Of the run: decides groups and shuffles.
        unique_tokens: Size of the unique subset with ``<s>`` and ``</s>``; None takes everything.
        alpha: AR share by which documents rotate between the streams ``ar`` and ``diffusion``;
            None gives every document to every stream in every epoch.
        append_eos: End each document with ``</s>``.
        plan_dir: Local directory for plan files, shared by the ranks of a node and by any runs;
            used only for large corpora. None keeps plans in memory.

    Raises:
        UserError: `unique_tokens` exceeds the dataset; `plan_dir` cannot be written.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        sequence_length: int,
        micro_batch: int,
        seed: int,
        unique_tokens: int | None,
        alpha: Fraction | None,
        append_eos: bool = False,
        plan_dir: Path | None = None,
    ) -> None:
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.micro_batch = micro_batch
        subset = Subset(dataset.lengths, unique_tokens=unique_tokens, append_eos=append_eos)
        self.unique_tokens = subset.tokens
        self.documents = subset.documents
        key = repr((dataset.info, seed, subset.tokens, alpha, append_eos))
        files = _plan_files(plan_dir, subset.documents, key)
        rotation = None
        if alpha is not None and 0 < alpha < 1:
            rotation = Rotation(subset, alpha=alpha, seed=seed, files=files)
        names: tuple[Stream, ...] = ("ar", "diffusion", "all")
        self._plans: dict[Stream, StreamPlan] = {
            name: StreamPlan(subset, stream=name, rotation=rotation, seed=seed, files=files)
            for name in names
        }

    def batch(self, stream: Stream, first_sequence: int) -> Batch:
        """Sequences first_sequence, …, first_sequence + micro_batch - 1 of a stream.

        Raises:
            UserError: A shard is missing or damaged; names it.
        """
        length = self.sequence_length
        start = first_sequence * length
        pieces = self._plans[stream].pieces(start, start + self.micro_batch * length + 1)
        return _pack(self.dataset, pieces, stream, first_sequence, self.micro_batch, length)

    def epoch(self, stream: Stream, sequence: int) -> int:
        """The epoch in which a sequence of a stream begins."""
        return self._plans[stream].epoch_at(sequence * self.sequence_length)


class ValidationData:
    """The held-out split as a fixed list of sequences: its documents in order, once.

    Args:
        dataset: The ``val`` split.
        sequence_length: T.
        append_eos: End each document with ``</s>``.
        sequences: At most that many; None takes all.

    Raises:
        UserError: The split is shorter than one sequence.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        sequence_length: int,
        append_eos: bool = False,
        sequences: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.sequence_length = sequence_length
        lengths = Subset(dataset.lengths, unique_tokens=None, append_eos=append_eos)
        self._ends = np.cumsum(lengths.packed_lengths())
        self._order = np.arange(dataset.documents)
        whole = (lengths.tokens - 1) // sequence_length
        if whole < 1:
            raise UserError(
                str(dataset.directory),
                f"the held-out split has {lengths.tokens:,} tokens",
                f"at least one sequence and a token, {sequence_length + 1:,}",
                "hold out more (data.build.val_fraction) or lower sequence_length",
            )
        self._count = whole if sequences is None else min(whole, sequences)
        self.bytes_per_token = dataset.facts.bytes / lengths.tokens

    bytes_per_token: float
    """UTF-8 bytes of text per target token of the packed split; loss in nats per token divided by
    (ln 2 × this) is bits per byte."""

    def __len__(self) -> int:
        return self._count

    def batch(self, first: int, count: int) -> Batch:
        """Sequences first, …, first + count - 1; fewer at the end of the list."""
        count = min(count, self._count - first)
        start = first * self.sequence_length
        stop = start + count * self.sequence_length + 1
        pieces = pieces_between(self._order, self._ends, start, stop)
        return _pack(self.dataset, pieces, "all", first, count, self.sequence_length)


def _plan_files(plan_dir: Path | None, documents: int, key: str) -> PlanFiles:
    if plan_dir is None or documents <= DOCUMENTS_IN_MEMORY:
        return PlanFiles(None)
    return PlanFiles.open(plan_dir, hashlib.blake2b(key.encode(), digest_size=8).hexdigest())


def _pack(
    dataset: TokenDataset,
    pieces: Sequence[Piece],
    stream: Stream,
    first: int,
    count: int,
    length: int,
) -> Batch:
    """Make a batch of `count` rows out of pieces that hold count·length + 1 tokens."""
    flat = np.empty(count * length + 1, dtype=np.int64)
    number = np.empty(len(flat), dtype=np.int32)
    position = 0
    dataset.prepare(piece.document for piece in pieces)
    for i, piece in enumerate(pieces):
        stop = position + piece.stop - piece.start
        _copy(dataset, piece, flat[position:stop])
        number[position:stop] = i
        position = stop
    rows = np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length]
    numbers = number[:-1].reshape(count, length)
    spans = zip(number[:-1:length].tolist(), number[length::length].tolist(), strict=True)
    return Batch(
        tokens=torch.from_numpy(rows.copy()),
        document_ids=torch.from_numpy(numbers - numbers[:, :1]),
        sequence_ids=torch.arange(first, first + count),
        stream=stream,
        documents=tuple(tuple(p.document for p in pieces[a : b + 1]) for a, b in spans),
    )


def _copy(dataset: TokenDataset, piece: Piece, into: np.ndarray) -> None:
    """Write the tokens of a piece: ``<s>`` at 0, then the document, then perhaps ``</s>``."""
    before = 1 if piece.start == 0 else 0
    tokens = dataset.read(piece.document, piece.start - 1 + before, piece.stop - 1)
    if before:
        into[0] = dataset.info.bos_id
    into[before : before + len(tokens)] = tokens
    into[before + len(tokens) :] = dataset.info.eos_id
    if len(tokens) and int(tokens.max()) >= dataset.info.vocab_size:
        dataset.check_document(piece.document)
