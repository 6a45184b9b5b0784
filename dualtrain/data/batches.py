"""Micro-batches of clean sequences, for training and for the held-out split.

``train`` and ``prefetch`` ask :class:`TrainingData` for a slot's sequences by stream and absolute
index; nothing here remembers what was asked before, so any process gives the same answer.

Shapes: B sequences of T positions. The target of a position is the next token of the same document:
so ``<s>`` is never a target, and a document's last token never an input, as in the released code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dualtrain.data.dataset import TokenDataset, check_held_out
from dualtrain.data.part_order import ORDER_FORMAT, pieces_between
from dualtrain.data.plan import DATA_ORDER, Rotation, StreamPlan
from dualtrain.data.plan_files import PlanFiles
from dualtrain.data.units import Span, Subset, Units
from dualtrain.method.mixing import Mixture, Stream

# Below this many documents an epoch's plan is built faster than a file is opened.
DOCUMENTS_IN_MEMORY = 1 << 18


@dataclass
class Batch:
    """Sequences of one stream."""

    inputs: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64: of each position the next token of its document."""
    document_ids: Tensor
    """(B, T) int32: 0 for the row's first document, one more for each that follows."""
    sequence_ids: Tensor
    """(B,) int64: absolute index of each sequence in its stream."""
    stream: Stream
    documents: tuple[tuple[int, ...], ...]
    """Per row, the numbers in the dataset of its documents, in order."""
    document_mask: bool = True
    """Whether attention ends at the borders of documents."""

    @property
    def context_ids(self) -> Tensor:
        """(B, T) int32: positions of a row with the same number may see each other."""
        return self.document_ids if self.document_mask else torch.zeros_like(self.document_ids)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for copies to a GPU that do not wait."""
        return Batch(
            self.inputs.pin_memory(),
            self.targets.pin_memory(),
            self.document_ids.pin_memory(),
            self.sequence_ids.pin_memory(),
            self.stream,
            self.documents,
            self.document_mask,
        )


class TrainingData:
    """The training split as streams of packed sequences; for one thread at a time.

    Args:
        dataset: The ``train`` split.
        mixture: Decides what the streams ``ar`` and ``diffusion`` have of each epoch, and how many
            sequences a batch has.
        sequence_length: T.
        seed: Of the run: decides all orders.
        unique_tokens: Size of the unique subset in positions; None takes everything.
        append_eos: End each document with ``</s>``.
        document_mask: Whether attention ends at the borders of documents.
        plan_dir: Local directory for plan files, shared by the ranks of a node and by any runs;
            used only for large corpora. None keeps plans in memory.

    Raises:
        UserError: `unique_tokens` exceeds the dataset; `plan_dir` cannot be written.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        mixture: Mixture,
        sequence_length: int,
        seed: int,
        unique_tokens: int | None,
        append_eos: bool,
        document_mask: bool = True,
        plan_dir: Path | None = None,
    ) -> None:
        self.dataset = dataset
        self.document_mask = document_mask
        self.sequence_length = sequence_length
        self.micro_batch = mixture.micro_batch
        subset = Subset(dataset.lengths, unique_tokens=unique_tokens, append_eos=append_eos)
        self.unique_tokens = subset.tokens
        self.documents = subset.documents
        units = Units(subset, sequence_length=sequence_length)
        files = PlanFiles(None)
        if plan_dir is not None and subset.documents > DOCUMENTS_IN_MEMORY:
            facts = DATA_ORDER, dataset.info, seed, subset.tokens, sequence_length, append_eos
            key = repr((ORDER_FORMAT, *facts, mixture.rotates, mixture.key))
            name = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
            files = PlanFiles.open(plan_dir, name)
        rotation = None
        if mixture.rotates:
            rotation = Rotation(units, mixture=mixture, sequence_length=sequence_length, seed=seed)
        names: tuple[Stream, ...] = ("ar", "diffusion", "all")
        self._plans: dict[Stream, StreamPlan] = {
            name: StreamPlan(
                units,
                stream=name,
                rotation=None if name == "all" else rotation,
                sequence_length=sequence_length,
                seed=seed,
                files=files,
            )
            for name in names
        }

    def batch(self, stream: Stream, first_sequence: int) -> Batch:
        """Sequences first_sequence, …, first_sequence + micro_batch - 1 of a stream."""
        plan = self._plans[stream]
        numbers = range(first_sequence, first_sequence + self.micro_batch)
        rows = [plan.sequence(number) for number in numbers]
        batch = _pack(self.dataset, rows, stream, numbers, self.sequence_length)
        return replace(batch, document_mask=self.document_mask)


class ValidationData:
    """The held-out split as a fixed list of sequences, spread over all of it.

    Args:
        dataset: The ``val`` split.
        sequence_length: T.
        append_eos: End each document with ``</s>``.
        document_mask: Whether attention ends at the borders of documents.
        sequences: At most that many; None takes all.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        sequence_length: int,
        append_eos: bool,
        document_mask: bool = True,
        sequences: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.document_mask = document_mask
        self.sequence_length = sequence_length
        lengths = Subset(dataset.lengths, unique_tokens=None, append_eos=append_eos)
        self._ends = np.cumsum(lengths.packed_lengths())
        self._order = np.arange(dataset.documents)
        whole = check_held_out(dataset, sequence_length, append_eos=append_eos)
        count = whole if sequences is None else min(whole, sequences)
        self._windows = [n * whole // count for n in range(count)]
        self.token_bytes = torch.from_numpy(dataset.token_bytes)

    token_bytes: Tensor
    """(vocabulary,) int64: bytes of text that each token stands for."""

    def __len__(self) -> int:
        return len(self._windows)

    def batch(self, first: int, count: int) -> Batch:
        """Sequences first, …, first + count - 1; fewer at the end of the list."""
        numbers = range(first, min(first + count, len(self)))
        length = self.sequence_length
        rows = [
            pieces_between(self._order, self._ends, n * length, (n + 1) * length)
            for n in self._windows[numbers.start : numbers.stop]
        ]
        batch = _pack(self.dataset, rows, "all", numbers, length)
        return replace(batch, document_mask=self.document_mask)


def _pack(
    dataset: TokenDataset,
    rows: Sequence[Sequence[Span]],
    stream: Stream,
    numbers: range,
    length: int,
) -> Batch:
    """Make a batch out of the pieces of each row, which have `length` positions together.

    A packed document is ``<s>``, its tokens, then ``</s>`` where there is one.
    """
    targets = np.full((len(rows), length), dataset.info.eos_id, dtype=np.int64)
    inputs = np.empty_like(targets)
    document_ids = np.empty((len(rows), length), dtype=np.int32)
    dataset.prepare(piece.document for row in rows for piece in row)
    for row, pieces in enumerate(rows):
        begins, firsts = [], []
        begin = 0
        for number, piece in enumerate(pieces):
            end = begin + piece.stop - piece.start
            before = min(piece.start, 1)  # the first input is the token before the first target
            tokens = dataset.read(piece.document, piece.start - before, piece.stop)
            targets[row, begin : begin + len(tokens) - before] = tokens[before:]
            document_ids[row, begin:end] = number
            begins.append(begin)
            firsts.append(tokens[0] if before else dataset.info.bos_id)
            begin = end
        inputs[row, 1:] = targets[row, :-1]
        inputs[row, begins] = firsts
    if max(inputs.max(), targets.max()) >= dataset.info.vocab_size:
        for document in {piece.document for row in rows for piece in row}:
            dataset.check_document(document)
    return Batch(
        inputs=torch.from_numpy(inputs),
        targets=torch.from_numpy(targets),
        document_ids=torch.from_numpy(document_ids),
        sequence_ids=torch.arange(numbers.start, numbers.stop),
        stream=stream,
        documents=tuple(tuple(piece.document for piece in pieces) for pieces in rows),
    )
