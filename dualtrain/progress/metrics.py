"""``metrics.jsonl``: one JSON object a line, the only source of every number shown about a run.

The live view, the plain lines, TensorBoard, sweeps and figures all take the records defined here;
:class:`~dualtrain.progress.progress.Progress` hands each one to the file and to them unchanged. The
file is append-only and written line by line, so a killed run loses at most the line it was writing,
and a resumed run first drops what it is about to repeat. While the disk is full, lines wait for
room, and none is written in part.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from dualtrain.common.errors import UserError
from dualtrain.common.files import DISK_FULL, replacing

FILE_NAME = "metrics.jsonl"


class TrainRecord(TypedDict):
    """Means over the slots of all ranks since the previous train record, and where the run stands.

    A loss is null when the interval had no slot of its objective, or when it was not finite (then
    an event record says so: JSON has no NaN). Losses are nats per token, unscaled by ``ar_weight``.
    """

    kind: Literal["train"]
    step: int  # optimizer updates done
    steps: int  # optimizer updates planned
    tokens: int  # input tokens since the start of the run, all ranks, both objectives
    epoch: float  # passes over the unique subset so far
    lr: float
    alpha: float
    ar_loss: float | None
    diffusion_loss: float | None
    loss: float | None  # what was minimised: weights, scales and z-loss included
    z_loss: float | None  # already multiplied by its factor
    grad_norm: float | None  # global L2 norm of the raw gradient before clipping, mean over updates
    ar_slots: int  # since the start of the run
    diffusion_slots: int
    ar_passes: float  # times a token of the unique subset has been an AR target, on average
    tokens_per_second: float | None  # all ranks, evaluation and checkpoints excluded
    mfu: float | None  # share of the devices' dense bf16 peak; null where that is unknown
    data_wait_s: float  # longest wait of a rank for data in the interval
    elapsed_s: float  # wall time of the run
    memory_bytes: int  # peak of the worst rank
    logged: dict[str, float | None]  # what algorithms logged


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands; :class:`TrainRecord` says what the numbers are."""

    step: int
    steps: int
    tokens: int
    epoch: float
    lr: float
    alpha: float
    ar_slots: int
    diffusion_slots: int
    ar_passes: float
    elapsed_s: float


class _EvalRecord(TypedDict):
    kind: Literal["eval"]
    step: int
    ar_nll: float  # nats per token
    ar_bits_per_byte: float
    diffusion_nll: float  # an upper bound in expectation
    diffusion_bits_per_byte: float
    tokens: int
    elapsed_s: float


class EvalRecord(_EvalRecord, total=False):
    """Held-out losses: the same text and masks at every evaluation.

    The keys below are missing in files of older versions. Errors are standard errors over
    documents, null where there is only one.
    """

    ar_error: float | None
    diffusion_error: float | None
    prefix_nll: float  # of documents' second halves, after first halves read both ways
    prefix_bits_per_byte: float
    prefix_error: float | None
    ar_nll_same_tokens: float  # AR loss of just these tokens, to compare with
    prefix_minus_ar_error: float | None  # of the paired difference
    prefix_tokens: int
    documents: int  # that the scored tokens are of


class EventRecord(TypedDict):
    """Something that happened: checkpoint, early_stop, non_finite_loss, step_left_out, …"""

    kind: Literal["event"]
    step: int
    event: str
    message: str


class SampleRecord(TypedDict):
    """A text that the model has written at an evaluation."""

    kind: Literal["sample"]
    step: int
    title: str  # what made it: AR sample, infilled
    text: str  # what the model wrote is in brackets


class TaskScore(TypedDict):
    """How well the model does on a task."""

    accuracy: float  # a tie counts its share
    accuracy_norm: float  # by log-likelihood per character of the answer
    score: float  # normalised, of the task's own metric: 0 is chance, 100 perfect
    score_low: float  # 95 % interval over items
    score_high: float
    items: int


class TasksRecord(TypedDict):
    """Scores on all tasks in one mode, from the same items at every evaluation."""

    kind: Literal["tasks"]
    step: int
    mode: str  # ar, prefix, pll, chain or elbo
    average: float  # mean of the tasks' scores
    average_low: float
    average_high: float
    tasks: dict[str, TaskScore]
    elapsed_s: float


def losses_of(record: EvalRecord, objective: str) -> tuple[float | None, float | None]:
    """An objective's nats per token and bits per byte; null where they were not finite."""
    values: Any = record
    return values[f"{objective}_nll"], values[f"{objective}_bits_per_byte"]


def prefix_difference(record: EvalRecord) -> float | None:
    """Return prefix loss minus AR loss of the same tokens, if the record has them."""
    prefix, same = record.get("prefix_nll"), record.get("ar_nll_same_tokens")
    return None if prefix is None or same is None else prefix - same


Record = TrainRecord | EvalRecord | TasksRecord | SampleRecord | EventRecord
KINDS = ("train", "eval", "tasks", "sample", "event")


def finite(record: Record) -> Record:
    """Return the record with every non-finite number replaced by ``None``."""

    def clean(value: object) -> object:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        return value

    return cast(Record, clean(record))


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """Read all records of a metrics file, which a run may still be writing.

    A torn last line (a run killed or caught in the middle of a write) is left out.

    Raises:
        UserError: The file is missing, unreadable, or a line other than the last is not a record.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}", "a metrics file") from None
    return list(_parse(path, content))


def _parse(path: Path, content: bytes) -> Iterator[Record]:
    *lines, last = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        record = _parse_line(line)
        if record is None:
            raise UserError(
                f"{path}:{number}",
                f"not a metrics record: {line[:60]!r}",
                f"one JSON object with a `kind` of {', '.join(KINDS)}",
                "the file was changed by something else; move it away or remove the line",
            )
        yield record
    record = _parse_line(last)
    if record is not None:
        yield record


def _parse_line(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or value.get("kind") not in KINDS:
        return None
    return cast(Record, value)


class MetricsFile(AbstractContextManager["MetricsFile"]):
    """The metrics file of a run, open for appending.

    A torn last line left by a killed run is repaired on opening: completed if only its newline is
    missing, removed otherwise.

    Args:
        path: The file; made, with its directory, when missing.

    Raises:
        UserError: The file cannot be made or written, or holds a line that is not a record.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self._repair()
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None
        self._waiting = b""

    @property
    def waits(self) -> bool:
        """Whether something is not written yet, because the disk is full."""
        return bool(self._waiting)

    def append(self, record: Record) -> None:
        """Write one record, after those that still wait for room on the disk.

        Raises:
            UserError: The record cannot be written, for another reason than a full disk.
        """
        self._waiting += json.dumps(finite(record), allow_nan=False).encode() + b"\n"
        self.write()

    def write(self) -> None:
        """Write what waits, as far as there is room for whole lines."""
        written = 0
        try:
            while written < len(self._waiting):
                written += self._file.write(self._waiting[written:])
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise self._unwritable(error) from None
        whole = self._waiting.rfind(b"\n", 0, written) + 1
        if whole < written:
            os.truncate(self.path, self.path.stat().st_size - (written - whole))
        self._waiting = self._waiting[whole:]

    def finish(self) -> None:
        """Write what waits, at the end of a run.

        Raises:
            UserError: There is still no room for it.
        """
        self.write()
        if self._waiting:
            what = "lacks the last records of the run, as the disk is full"
            raise UserError(str(self.path), what, "room for them")

    def truncate_after(self, step: int) -> int:
        """Drop the records of steps after ``step``; events stay, as history.

        The new file is complete on disk before it takes the old one's name, so a crash leaves one
        or the other whole.

        Returns:
            The number of records dropped.
        """
        records = read_metrics(self.path)
        kept = [r for r in records if r["kind"] == "event" or r["step"] <= step]
        if len(kept) == len(records):
            return 0
        try:
            with replacing(self.path) as file:
                file.write_text("".join(json.dumps(record) + "\n" for record in kept))
            self._file.close()
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None
        return len(records) - len(kept)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _repair(self) -> None:
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        torn = content[end:]
        if not torn:
            return
        with self.path.open("r+b") as file:
            if _parse_line(torn) is None:
                file.truncate(end)
            else:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(str(self.path), f"cannot be written: {error.strerror}", "a writable file")
