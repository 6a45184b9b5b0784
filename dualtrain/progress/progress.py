"""What the user sees of a run, and the record of it.

:class:`Progress` is all that ``train`` talks to. It hands each record, unchanged, first to
``metrics.jsonl``, then to the trackers and the view of the terminal. Rank 0 has one
that works; every other rank has a silent one with the same methods::

    progress = Progress.open(run_dir, rank=rank, trackers=recipe.progress.trackers)
    progress.start(facts)                        # after a resume has chosen the first step
    meter.start()
    for step in ...:
        progress.tick(step)                      # costs nothing
        progress.record(train_record(meter.interval(), position))   # every interval
        with progress.busy("evaluating"), meter.paused():
            progress.record(held_out_losses(...).record(step, elapsed_s))
    progress.finish(summary)
    progress.close()                             # in a `finally`: gives back the terminal
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Literal, TextIO

from dualtrain.progress.frame import TRAINING
from dualtrain.progress.live import LiveView
from dualtrain.progress.metrics import (
    FILE_NAME,
    EventRecord,
    MetricsFile,
    Record,
    finite,
    read_metrics,
)
from dualtrain.progress.plain import PlainView
from dualtrain.progress.report import RunFacts, RunView, Summary
from dualtrain.progress.trackers.registry import check_trackers, make_tracker
from dualtrain.progress.trackers.writer import RUN_ID, TrackerView

ViewChoice = Literal["auto", "live", "plain", "none"]


class Progress(AbstractContextManager["Progress"]):
    """Records and messages of one run, for file, terminal and trackers.

    Args:
        metrics: The metrics file; ``None`` keeps no record.
        screen: The view of the terminal. If the terminal goes away (a closed connection, a pipe
            whose reader ended) the run goes on without it, and an event record says so.
        trackers: Further views; one that fails is said once, and left out from then on.
    """

    def __init__(
        self,
        metrics: MetricsFile | None = None,
        screen: RunView | None = None,
        trackers: Sequence[TrackerView] = (),
    ) -> None:
        self._metrics = metrics
        self._screen = screen
        self._trackers = tuple(trackers)
        self._status = TRAINING
        self._step = 0

    @classmethod
    def open(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        rank: int = 0,
        view: ViewChoice = "auto",
        trackers: Sequence[str] = (),
        config: Mapping[str, object] | None = None,
        stream: TextIO | None = None,
    ) -> Progress:
        """Open what the run's progress goes to; on ranks other than 0 nothing.

        Args:
            view: ``auto`` is live on a terminal that can redraw, else plain lines.
            trackers: Names of what also gets the records.
            config: The resolved recipe, for the trackers.
            stream: Where the view goes; standard output when not given.

        Raises:
            UserError: The metrics file is not writable, or a tracker is not installed.
        """
        if rank != 0:
            return cls()
        check_trackers(trackers)
        views = [TrackerView(name, make_tracker(name), config or {}) for name in trackers]
        metrics = MetricsFile(Path(run_dir) / FILE_NAME)
        return cls(metrics, _screen(view, stream), views)

    def start(self, facts: RunFacts) -> None:
        """Begin at ``facts.first_step``: drop the records after it, show the ones before."""
        self._step = facts.first_step
        history: list[Record] = []
        if self._metrics is not None:
            # From the beginning, even what stands at step 0 is from a run that is no more.
            self._metrics.truncate_after(facts.first_step or -1)
            if facts.first_step:
                history = read_metrics(self._metrics.path)
        if self._trackers and not facts.first_step:
            (Path(facts.run_dir) / RUN_ID).unlink(missing_ok=True)
        for view in self._trackers:
            view.start(facts, history)
        with self._terminal() as screen:
            screen.start(facts, history)

    def record(self, record: Record) -> None:
        """Keep and show a record. Non-finite numbers become null first, everywhere."""
        record = finite(record)
        self._step = max(self._step, record["step"])
        if self._metrics is not None:
            waited = self._metrics.waits
            self._metrics.append(record)
            if self._metrics.waits and not waited:
                self.message(f"warning: the disk is full: {self._metrics.path} waits for room")
            elif waited and not self._metrics.waits:
                self.message(f"{self._metrics.path} has all records again")
        self._track(record)
        with self._terminal() as screen:
            screen.record(record)

    def _track(self, record: Record) -> None:
        for view in self._trackers:
            view.record(record)
        self._report_failures()

    def _report_failures(self) -> None:
        for view in self._trackers:
            if failure := view.failure():
                self.message(f"warning: {view.name} gets no more records: {failure}")

    def event(self, event: str, message: str, *, step: int) -> None:
        """Keep and show an event: ``checkpoint`` (the message is its path), …."""
        self.record(_event(event, message, step))

    def tick(self, step: int) -> None:
        """Note that ``step`` updates are done, so that the bar moves between records."""
        with self._terminal() as screen:
            screen.tick(step)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Show what the run is busy with, for the time of the block."""
        before = self._status
        self.status(text)
        try:
            yield
        finally:
            self.status(before)

    def status(self, text: str) -> None:
        """Show what the run is busy with from now on."""
        self._status = text
        with self._terminal() as screen:
            screen.status(text)

    def message(self, text: str) -> None:
        """Show a line to the user; it is not recorded."""
        with self._terminal() as screen:
            screen.message(text)

    def finish(self, summary: Summary) -> None:
        """Show the end of the run.

        Raises:
            UserError: The disk is full, so that metrics.jsonl lacks the last records.
        """
        for view in self._trackers:
            view.finish(summary)
        self._report_failures()
        with self._terminal() as screen:
            screen.finish(summary)
        if self._metrics is not None:
            self._metrics.finish()

    def close(self) -> None:
        """Give back the terminal and close the files. May be called twice."""
        with self._terminal() as screen:
            screen.close()
        self._screen = None
        for view in self._trackers:
            view.close()
            if failure := view.failure():
                print(f"warning: {view.name} lacks the last records: {failure}", file=sys.stderr)
        self._trackers = ()
        if self._metrics is not None:
            self._metrics.write()
            self._metrics.close()
            self._metrics = None

    def __exit__(self, *failure: object) -> None:
        self.close()

    @contextmanager
    def _terminal(self) -> Iterator[RunView]:
        """The screen, given up for good when its terminal is gone."""
        try:
            yield self._screen or RunView()
        except OSError as error:
            lost, self._screen = self._screen, None
            if lost is not None:
                with suppress(OSError):
                    lost.close()
            if self._metrics is not None:
                what = f"the view stopped, the run did not: {error.strerror}"
                self._metrics.append(_event("terminal_lost", what, self._step))


def _event(event: str, message: str, step: int) -> EventRecord:
    return EventRecord(kind="event", step=step, event=event, message=message)


def _screen(view: ViewChoice, stream: TextIO | None) -> RunView | None:
    output = stream or sys.stdout
    if view == "auto":
        view = "live" if _can_redraw(output) else "plain"
    if view == "none":
        return None
    if view == "plain":
        return PlainView(output)
    from rich.console import Console

    # Without a file of its own the console follows sys.stdout, which the live view redirects so
    # that prints scroll by above it.
    return LiveView(Console(file=stream))


def _can_redraw(stream: TextIO) -> bool:
    if not stream.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return False
    # The curves and the bar are not ASCII; a terminal that cannot show them gets lines.
    return (stream.encoding or "").lower().replace("-", "") == "utf8"
