"""From the records of metrics.jsonl to a tracker, on a thread of its own.

The run only puts records into a queue. A tracker that fails is given up, and the failure is kept
for :class:`~dualtrain.progress.progress.Progress` to say once.
"""

from __future__ import annotations

import json
import queue
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from dualtrain.common.errors import UserError
from dualtrain.common.files import write_text
from dualtrain.progress.metrics import Record
from dualtrain.progress.report import RunFacts, RunView, Summary
from dualtrain.progress.trackers.registry import check_trackers, make_tracker
from dualtrain.progress.trackers.tracker import TrackedRun, Tracker

RUN_ID = "tracker-id.json"
"""Keeps a run's id, in its directory."""

LONGEST_END_S = 60.0
"""How long a run that is done waits for a tracker."""

_LONGEST_QUEUE = 10_000

# Where a record stands on the axis, or what it is, is no curve.
_NOT_CURVES = frozenset(("kind", "step", "steps", "logged"))


class TrackerView(RunView):
    """Hands a tracker what the run records."""

    def __init__(self, name: str, tracker: Tracker, config: Mapping[str, object]) -> None:
        self.name = name
        self._tracker = tracker
        self._config = config
        self._sampled: int | None = None
        self._failure: str | None = None
        self._is_told = self._is_over = False
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_LONGEST_QUEUE)
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)

    def failure(self) -> str | None:
        """What ended the tracker, the first time that this is asked; else None."""
        if self._failure is None or self._is_told:
            return None
        self._is_told = True
        return self._failure

    def start(self, facts: RunFacts, history: Sequence[Record]) -> None:
        self.begin(facts.name, Path(facts.run_dir), first_step=facts.first_step)

    def begin(self, name: str, directory: Path, *, first_step: int = 0) -> None:
        """Begin a run, or go on with the one whose id is in the directory."""
        run = TrackedRun(
            id=run_id(directory),
            name=name,
            directory=directory,
            first_step=first_step,
            config=self._config,
        )
        self._thread.start()
        self._put(partial(self._tracker.start, run))

    def record(self, record: Record) -> None:
        if record["kind"] == "sample":
            self._sampled = record["step"]
            self._text(record["title"], record["text"], record["step"])
        elif values := curves_of(record):
            self._put(partial(self._tracker.log, values, record["step"]))

    def finish(self, summary: Summary) -> None:
        if self._sampled != summary.step:
            for sample in summary.samples:
                self._text(sample.title, sample.marked, summary.step)

    def _text(self, title: str, text: str, step: int) -> None:
        name = f"samples/{title.replace(' ', '_')}"
        self._put(partial(self._tracker.log_text, name, text, step))

    def figure(self, name: str, file: Path) -> None:
        """Keep a figure, a PNG file."""
        self._put(partial(self._tracker.log_figure, name, file))

    def close(self) -> None:
        if not self._thread.ident or self._is_over:
            return
        self._put(self._tracker.finish)
        self._put(None)
        self._thread.join(LONGEST_END_S)
        if self._thread.is_alive():
            self._fail(f"did not end within {LONGEST_END_S:g} s")

    def _put(self, call: Callable[[], None] | None) -> None:
        if self._is_over:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._fail(f"it is {_LONGEST_QUEUE:,} records behind")

    def _work(self) -> None:
        try:
            while (call := self._calls.get()) is not None and not self._is_over:
                call()
        except BaseException as error:  # whatever a tracker does, the run goes on
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._fail(first)

    def _fail(self, why: str) -> None:
        self._failure, self._is_over = self._failure or why, True


def send_figures(
    trackers: Sequence[str],
    name: str,
    directory: Path,
    files: Iterable[Path],
    config: Mapping[str, object],
) -> list[str]:
    """Give trackers the figures of a directory, as a run of their own.

    Returns:
        What went wrong, a sentence for each tracker that has not got them.
    """
    figures = {file.stem: file for file in files if file.suffix == ".png"}
    problems = []
    for tracker in trackers:
        try:
            check_trackers([tracker])
        except UserError as error:
            problems.append(f"{tracker} gets no figures: {error.what}")
            continue
        view = TrackerView(tracker, make_tracker(tracker), config)
        view.begin(name, directory)
        for title, file in figures.items():
            view.figure(f"figures/{title}", file)
        view.close()
        if why := view.failure():
            problems.append(f"{tracker} gets no figures: {why}")
    return problems


def run_id(directory: Path) -> str:
    """The id of the run in a directory, which all of its trackers know it by."""
    file = directory / RUN_ID
    if file.exists():
        with suppress(ValueError, KeyError, TypeError):  # a file that somebody has changed
            return str(json.loads(file.read_text())["id"])
    made = uuid.uuid4().hex[:12]
    write_text(file, json.dumps({"id": made}) + "\n")
    return made


def curves_of(record: Record) -> dict[str, float]:
    """The numbers of a record, by the names of their curves."""
    if record["kind"] == "event" or record["kind"] == "sample":
        return {}
    if record["kind"] == "tasks":
        scores = {name: task["score"] for name, task in record["tasks"].items()}
        scores["average"] = record["average"]
        return {f"tasks/{record['mode']}/{name}": value for name, value in scores.items()}
    values = {key: value for key, value in record.items() if key not in _NOT_CURVES}
    if record["kind"] == "train":
        values.update({f"logged/{name}": value for name, value in record["logged"].items()})
    return {
        f"{record['kind']}/{name}": value
        for name, value in values.items()
        if isinstance(value, (int, float))
    }
