"""TensorBoard events from the same records as everything else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from dualtrain.common.errors import UserError
from dualtrain.progress.metrics import Record, TasksRecord
from dualtrain.progress.report import RunFacts, RunView

# Where a record stands on the axis, or what it is, is no curve.
_NOT_CURVES = frozenset(("kind", "step", "steps", "logged"))


def check_tensorboard() -> None:
    """Refuse TensorBoard where it is not installed; imports nothing.

    Raises:
        UserError: It is not.
    """
    if find_spec("tensorboard") is None:
        raise _not_installed()


def _not_installed() -> UserError:
    return UserError(
        "progress.tensorboard",
        "the package `tensorboard` is not installed",
        hint="pip install tensorboard, or set progress.tensorboard=false",
    )


class TensorBoardView(RunView):
    """Write scalars to a directory that ``tensorboard --logdir`` reads.

    A failure to write is an error of the run: the user asked for it.

    Raises:
        UserError: The ``tensorboard`` package is not installed, or the directory not writable.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _not_installed() from None
        self._directory = directory
        self._writer_class = SummaryWriter
        self._writer: SummaryWriter | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                str(directory), f"cannot be made: {error.strerror}", "a writable directory"
            ) from None

    def start(self, facts: RunFacts, history: Sequence[Record]) -> None:
        # What a killed process wrote beyond the checkpoint is hidden, as metrics.jsonl drops it.
        self._writer = self._writer_class(str(self._directory), purge_step=facts.first_step + 1)

    def record(self, record: Record) -> None:
        if self._writer is None or record["kind"] == "event":
            return
        if record["kind"] == "tasks":
            self._add_scores(record)
            return
        values = {key: value for key, value in record.items() if key not in _NOT_CURVES}
        if record["kind"] == "train":
            values.update({f"logged/{name}": value for name, value in record["logged"].items()})
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        self._writer.flush()

    def _add_scores(self, record: TasksRecord) -> None:
        assert self._writer is not None
        scores = {name: task["score"] for name, task in record["tasks"].items()}
        for name, value in {**scores, "average": record["average"]}.items():
            self._writer.add_scalar(f"tasks/{record['mode']}/{name}", value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
