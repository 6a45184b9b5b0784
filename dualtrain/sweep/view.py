"""What ``dualtrain sweep`` shows while its points run: a table on a terminal, else lines."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dualtrain.common import formatting
from dualtrain.progress.metrics import FILE_NAME
from dualtrain.sweep.runner import PointJob

REFRESH_S = 1.0
LINE_S = 60.0
TAIL_BYTES = 16_384
ROWS_ENDED = 8
"""Points that have ended of which the table shows the newest."""
MARKS = {"finished": "done", "failed": "FAILED"}


@dataclass(frozen=True)
class Latest:
    """The newest numbers of a run.

    Attributes:
        steps: Of the run; 0 where no record says so yet.
        ar: Held-out AR loss, nats per token.
        diffusion: Held-out diffusion bound, nats per token.
    """

    step: int = 0
    steps: int = 0
    tokens_per_second: float | None = None
    ar: float | None = None
    diffusion: float | None = None

    @classmethod
    def of(cls, directory: Path) -> Latest:
        """Read the end of a run's metrics."""
        train: dict[str, Any] = {}
        held_out: dict[str, Any] = {}
        for record in _tail(directory / FILE_NAME):
            if record.get("kind") == "train":
                train = record
            elif record.get("kind") == "eval":
                held_out = record
        return cls(
            step=train.get("step", 0),
            steps=train.get("steps", 0),
            tokens_per_second=train.get("tokens_per_second"),
            ar=held_out.get("ar_nll"),
            diffusion=held_out.get("diffusion_nll"),
        )


class SweepView:
    """Follows the jobs of a runner.

    Args:
        keys: The recipe keys that points set.
        console: Where it is shown; standard output by default.
    """

    def __init__(
        self, keys: Sequence[str], *, plain: bool = False, console: Console | None = None
    ) -> None:
        self._keys = keys
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._is_live = self._console.is_terminal and not plain
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._jobs: Sequence[PointJob] = ()
        self._ended: list[PointJob] = []
        self._shown = self._lined = self._began = time.monotonic()

    def start(self, jobs: Sequence[PointJob]) -> None:
        """Begin to follow jobs."""
        self._jobs = jobs
        self._began = time.monotonic()
        if self._is_live:
            self._live.start()

    def __enter__(self) -> SweepView:
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Show a line."""
        self._console.print(text, markup=False)

    def change(self, job: PointJob) -> None:
        """A job has another state."""
        label = job.point.label
        if job.state == "running":
            self._line(f"{self._count()} started  {label}")
            return
        if job.state == "elsewhere":
            self._line(f"{label} is left to the process that runs it")
            return
        if not job.began:
            if job.state == "failed":
                self._line(f"{label} failed before, and is not tried again: {job.reason}")
            return
        self._ended.append(job)
        took = formatting.duration(time.monotonic() - job.began)
        if job.state == "finished":
            self._line(f"{self._count()} finished {label} in {took}: {_losses(job)}")
        elif job.state == "failed":
            self.say(f"{self._count()} FAILED   {label} after {took}: {job.reason}")
        else:
            self._line(f"{self._count()} {job.state}  {label}")

    def poll(self) -> None:
        """Show what is new, not too often."""
        now = time.monotonic()
        if self._is_live and now - self._shown >= REFRESH_S:
            self._shown = now
            self._live.update(self._table(), refresh=True)
        elif not self._is_live and now - self._lined >= LINE_S:
            self._lined = now
            for job in self._running():
                latest = Latest.of(job.point.directory)
                self.say(f"{job.point.label}: step {latest.step}/{latest.steps or '?'}")
            if (left := self._left()) is not None:
                self.say(f"{self._count()} about {formatting.duration(left)} left")

    def _line(self, text: str) -> None:
        if not self._is_live:
            self._lined = time.monotonic()
            self.say(text)

    def _running(self) -> list[PointJob]:
        return [job for job in self._jobs if job.state == "running"]

    def _count(self) -> str:
        done = sum(job.state in ("finished", "failed", "elsewhere") for job in self._jobs)
        return f"[{done}/{len(self._jobs)}]"

    def _left(self) -> float | None:
        """Seconds to the end, by how long the points that ran here took; None without any."""
        ended = [job for job in self._ended if job.state == "finished"]
        if not ended:
            return None
        left = sum(job.state in ("waiting", "running") for job in self._jobs)
        return (time.monotonic() - self._began) * left / len(ended)

    def _table(self) -> Table:
        counts = Counter(job.state for job in self._jobs)
        facts = [f"{number} {state}" for state, number in counts.items()]
        if (left := self._left()) is not None:
            facts.append(f"about {formatting.duration(left)} left")
        table = Table(title=", ".join(facts), title_justify="left", box=None, pad_edge=False)
        for key in self._keys:
            table.add_column(key.rpartition(".")[2], justify="right")
        for name in ("state", "step", "tokens/s", "held-out AR", "diffusion"):
            table.add_column(name, justify="right")
        for job in [*self._ended[-ROWS_ENDED:], *self._running()]:
            latest = Latest.of(job.point.directory)
            table.add_row(
                *job.point.cells(self._keys),
                MARKS.get(job.state, job.state),
                f"{latest.step}/{latest.steps or '?'}",
                formatting.count(latest.tokens_per_second),
                _nats(latest.ar),
                _nats(latest.diffusion),
            )
        return table


def _losses(job: PointJob) -> str:
    latest = Latest.of(job.point.directory)
    return f"held-out ar {_nats(latest.ar)}, diffusion {_nats(latest.diffusion)} nats/token"


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _tail(path: Path) -> list[dict[str, Any]]:
    """The records at the end of a metrics file that may be in the middle of a write."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
