"""Running a sweep's points, one after another or several at once.

Each point is a process of its own: the same ``dualtrain run`` that a user would type, so a point
that fails, runs out of memory or is killed takes nothing else along, and one that was stopped goes
on from its newest checkpoint. The kernel ends the points when this process is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from dualtrain.common.errors import EXIT_DONE, EXIT_NON_FINITE_LOSS, EXIT_SAVED_AFTER_SIGNAL
from dualtrain.launch.ranks import die_with_parent, own_command
from dualtrain.launch.stop import StopSignals
from dualtrain.sweep.definition import Point
from dualtrain.sweep.directory import (
    LOG,
    OUTCOME,
    Outcome,
    claim,
    read_outcome,
    write_outcome,
    write_recipe,
)

POLL_S = 0.1
REASON_LINES = 12


@dataclass
class PointJob:
    """A point as the runner sees it.

    Attributes:
        state: waiting, running, finished, failed, stopped (saved after a signal) or elsewhere
            (another process is running it).
        began: When it was started here, ``time.monotonic()``.
        claim: What keeps other sweeps from the point, while that lasts.
        signals: How many of this process's signals its run has been sent.
    """

    point: Point
    state: str = "waiting"
    reason: str = ""
    began: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    claim: IO[bytes] | None = field(default=None, repr=False)
    signals: int = 0


class Runner:
    """Goes through the points that have no outcome yet.

    Args:
        ranks: Processes of a point; None leaves it to ``dualtrain run``.
        devices: CUDA devices to divide among the points that run at once; none on a CPU.
        retry_failed: Whether points that failed before are tried again.
        on_change: Told whenever a job's state has changed.
    """

    def __init__(
        self,
        points: Sequence[Point],
        *,
        parallel: int = 1,
        ranks: int | None = None,
        devices: Sequence[str] = (),
        retry_failed: bool = False,
        on_change: Callable[[PointJob], None] = lambda job: None,
        on_poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.jobs = [PointJob(point) for point in points]
        self._parallel, self._ranks = parallel, ranks
        self._devices = devices
        self._retry_failed = retry_failed
        self._on_change, self._on_poll = on_change, on_poll
        self._signals = StopSignals(lambda number: self._pass_on())
        self._places: list[PointJob | None] = [None] * parallel

    @property
    def is_stopping(self) -> bool:
        """Whether a signal has asked for the end."""
        return self._signals.count > 0

    def run(self) -> None:
        """Run the points; returns when all have ended, or have been stopped by a signal."""
        with self._signals:
            try:
                self._run()
            finally:
                for job in self._running():
                    assert job.process is not None
                    _send(job.process, signal.SIGKILL)
                    job.process.wait()
                    _release(job)

    def _run(self) -> None:
        waiting = [job for job in self.jobs if self._is_to_run(job)][::-1]
        while True:
            for place, job in enumerate(self._places):
                if job is not None and job.process is not None and job.process.poll() is not None:
                    self._ended(job, job.process.returncode)
                    self._places[place] = None
                while self._places[place] is None and waiting and not self.is_stopping:
                    self._places[place] = self._start(waiting.pop(), place)
            self._pass_on()  # a signal may have come while a run was being started
            self._on_poll()
            if not any(self._places):
                return
            time.sleep(POLL_S)

    def _is_to_run(self, job: PointJob) -> bool:
        outcome = read_outcome(job.point.directory)
        if outcome is None or (outcome.state == "failed" and self._retry_failed):
            return True
        self._change(job, outcome.state, outcome.reason)
        return False

    def _start(self, job: PointJob, place: int) -> PointJob | None:
        """Start a point; None where another process has it, or has ended it meanwhile."""
        directory = job.point.directory
        job.claim = claim(directory)
        if job.claim is None:
            self._change(job, "elsewhere")
            return None
        if not self._is_to_run(job):
            _release(job)
            return None
        # A retry that is interrupted is a point to be continued, no longer one that has failed.
        (directory / OUTCOME).unlink(missing_ok=True)
        recipe = write_recipe(job.point)
        command = own_command(["run", str(recipe), "--plain"])
        if self._ranks is not None:
            command += ["--ranks", str(self._ranks)]
        with (directory / LOG).open("ab") as log:
            job.process = subprocess.Popen(
                command,
                env=self._environment(place),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own: a terminal's Ctrl-C comes by way of this process, once.
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        job.began = time.monotonic()
        self._change(job, "running")
        return job

    def _environment(self, place: int) -> dict[str, str]:
        env = dict(os.environ)
        if self._parallel == 1:
            return env  # all is its own, as for any run
        devices = share_devices(self._devices, place, self._parallel) if self._devices else []
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        processes = self._parallel * (self._ranks or len(devices) or 1)
        cores = len(os.sched_getaffinity(0))
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
        return env

    def _ended(self, job: PointJob, code: int) -> None:
        job.process = None
        code = code if code >= 0 else 128 - code
        # A signal may have come before the run could answer to it; then it died of it.
        if code == EXIT_SAVED_AFTER_SIGNAL or (self.is_stopping and code > 128):
            state, reason = "stopped", ""
        else:
            state, reason = (
                ("finished", "") if code == EXIT_DONE else ("failed", _reason(job, code))
            )
            write_outcome(job.point.directory, Outcome(state, code, reason))
        _release(job)  # not before it can be seen that the point has ended
        self._change(job, state, reason)

    def _change(self, job: PointJob, state: str, reason: str = "") -> None:
        job.state, job.reason = state, reason
        self._on_change(job)

    def _pass_on(self) -> None:
        """Send the runs the signals that they have not been sent."""
        for job in self._running():
            if job.signals < self._signals.count and job.process is not None:
                _send(job.process, signal.SIGTERM if self._signals.count == 1 else signal.SIGKILL)
                job.signals = self._signals.count

    def _running(self) -> list[PointJob]:
        return [job for job in self._places if job is not None and job.process is not None]


def share_devices(devices: Sequence[str], place: int, places: int) -> Sequence[str]:
    """The devices of one of several points that run at once: a block, or one that is shared."""
    if len(devices) < places:
        return [devices[place % len(devices)]]
    size = len(devices) // places
    return devices[place * size : (place + 1) * size]


def _release(job: PointJob) -> None:
    if job.claim is not None:
        job.claim.close()
        job.claim = None


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _reason(job: PointJob, code: int) -> str:
    """What a failed run said last."""
    text = (job.point.directory / LOG).read_text(errors="replace").rstrip()
    lines = text.splitlines()[-REASON_LINES:]
    # The message of dualtrain itself, if there is one, says it in a line.
    said = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    if said is not None:
        return said
    if code > 128:
        return f"killed by signal {code - 128}"
    if code == EXIT_NON_FINITE_LOSS:
        return next((line for line in reversed(lines) if "not finite" in line), "not finite")
    return "\n".join(lines)
