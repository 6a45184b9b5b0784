"""Starting the ranks on this machine, watching them, and ending them together.

Our own parent exists because the exit code of a rank matters to the caller (2, 3 and 75 mean
different things) and the stock launchers turn all of them into 1. On many machines
``hostfile`` has DeepSpeed's runner start the ranks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dualtrain.launch.stop import StopSignals, show_cursor
from dualtrain.launch.world import free_port, rank_environment

GRACE_AFTER_FAILURE_S = 2.0
"""How long the other ranks may take to leave by themselves once one has failed.

Short, because a rank whose peer is gone can save nothing: it waits in a collective. Long enough for
ranks that failed for the same reason to say so.
"""

LOG_TAIL_LINES = 40
POLL_S = 0.05

_MAIN = """
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
sys.path.append({packages!r})
from dualtrain.cli import main
main()
"""
"""Leaves the current directory out, where a random.py is not what libraries mean: Python puts it in
front, and can be told not to only since 3.11."""


def own_command(arguments: Sequence[str]) -> list[str]:
    """The command of another process of dualtrain, which runs in the same directory."""
    packages = Path(__file__).resolve().parents[2]  # where this one is found without installation
    return [sys.executable, "-c", _MAIN.format(packages=str(packages)), *arguments]


def run_ranks(command: Sequence[str], *, ranks: int, log_dir: Path) -> int:
    """Run a command as ``ranks`` processes on this machine and wait for all of them.

    Rank 0 keeps this terminal; the others write to ``log_dir/rank-00001.log`` and so on. A signal
    to this process goes to every rank once; a second one kills them. When a rank fails, the others
    are ended and, unless rank 0 has shown an error itself, the end of the failing rank's log is.

    Returns:
        The exit code of the rank that failed first; 0 when none did. A rank that died by signal n
        counts as 128 + n.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        _start_rank(command, rank_environment(rank, ranks=ranks, port=port), log_dir)
        for rank in range(ranks)
    ]
    return RankWatch(processes, log_dir).wait()


def _start_rank(command: Sequence[str], place: dict[str, str], log_dir: Path) -> subprocess.Popen:
    rank, ranks = int(place["RANK"]), int(place["WORLD_SIZE"])
    env = os.environ | place
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    output = None if rank == 0 else log_path(log_dir, rank).open("wb")
    try:
        # A session of its own: the terminal's Ctrl-C reaches only the parent, which passes it on
        # exactly once.
        return subprocess.Popen(
            command,
            env=env,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    finally:
        if output is not None:
            output.close()


def log_path(log_dir: Path, rank: int) -> Path:
    """Where a rank other than 0 writes what it prints."""
    return log_dir / f"rank-{rank:05d}.log"


def die_with_parent() -> None:
    """Ask Linux to kill this rank when the parent is killed, so that no process stays behind."""
    pr_set_pdeathsig = 1
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class RankWatch:
    """Waits for the ranks, passes signals on, and cleans up after a failure.

    Args:
        processes: Each the leader of a process group of its own.
        log_dir: Where ranks other than 0 write; None when they write elsewhere.
        relayed_as: For a launcher in place of the ranks: the signal it is sent, whichever came.
    """

    def __init__(
        self,
        processes: list[subprocess.Popen],
        log_dir: Path | None,
        *,
        relayed_as: signal.Signals | None = None,
    ) -> None:
        self.signals = StopSignals(self._pass_on)
        self._processes, self._log_dir, self._relayed_as = processes, log_dir, relayed_as
        self._failure: tuple[int, int] | None = None

    def wait(self) -> int:
        """Wait for the end of all, or for a failure; returns what :func:`run_ranks` does."""
        with self.signals:
            try:
                self._wait()
            finally:
                self._send(signal.SIGKILL)
                for process in self._processes:
                    process.wait()
        if self._failure is None:
            return 0
        if self.signals.count == 0 and self._processes[0].returncode <= 0:  # else it has said why
            with suppress(OSError):  # nobody may be there to read it any more
                self._explain(*self._failure)
        # After a second signal the ranks were killed; it is the signal that ended the run.
        return 128 + self.signals.last if self.signals.count > 1 else self._failure[1]

    def _wait(self) -> None:
        while self._are_running():
            self._note_failure()
            if self._failure is not None and self.signals.count == 0:
                break
            time.sleep(POLL_S)
        self._note_failure()
        if self._failure is not None and self.signals.count == 0:
            deadline = time.monotonic() + GRACE_AFTER_FAILURE_S
            while time.monotonic() < deadline and self._are_running():
                time.sleep(POLL_S)

    def _are_running(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def _note_failure(self) -> None:
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if code and self._failure is None:
                self._failure = (rank, code if code > 0 else 128 - code)

    def _pass_on(self, number: int) -> None:
        count = self.signals.count
        if self._relayed_as is not None and count <= 2:
            # To the launcher alone: it has its own way to reach the ranks on other machines, which
            # needs its helpers alive, and would die of SIGUSR1 and leave the ranks behind.
            for process in self._processes:
                process.send_signal(self._relayed_as)
            return
        self._send(number if count == 1 else signal.SIGKILL)
        if count > 1:
            show_cursor()

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def _explain(self, rank: int, code: int) -> None:
        if code > 128:
            who = f"rank {rank}" if self._relayed_as is None else "the launcher"
            sys.stderr.write(f"{who} was killed by signal {code - 128}\n")
        if rank > 0 and self._log_dir is not None:
            path = log_path(self._log_dir, rank)
            lines = path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            sys.stderr.write(f"rank {rank} failed (exit {code}); the end of {path}:\n")
            sys.stderr.writelines(f"  {line}\n" for line in lines)
