"""Processes that tests start: they hear signals, fail the test when they hang, and end with it.

``conftest`` sees to all three for every test, and to the environment that they inherit, so that a
test needs no limits of its own. What a test has started is known by a mark in its environment,
which is inherited by whatever it starts in turn, whoever its parent is by then.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

MARK = "DUALTRAIN_TEST_SUITE"
IDLE_S = 120.0
"""Processes hang that together do next to nothing for so long: longer than any test has them wait.

A slow machine is not idle, so that this is no limit for it.
"""
kept: set[int] = set()
"""Processes that serve this one to its end."""
LEAST_WORK = 0.01
"""Share of a core below which is next to nothing: what a launcher takes to look after its ranks."""


def mark_children() -> None:
    """Let what this process starts be recognised."""
    os.environ[MARK] = str(os.getpid())


def hear_signals() -> None:
    """Let what this process starts hear signals that this process is to ignore.

    A suite that a script starts in the background ignores Ctrl-C, and one under ``nohup`` the end
    of its terminal. Programs inherit that, but no handler, even if all it does is ignore.
    """
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def started() -> set[int]:
    """The numbers of what this process has started, and that in turn, as far as it is alive."""
    mine = os.getpid()
    mark = f"{MARK}={mine}".encode()
    found = set()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # has ended, or belongs to somebody else
            state, parent = _read(name, "stat").rpartition(b")")[2].split(None, 2)[:2]
            # A fork has no environment of its own, and is found as a child.
            is_ours = int(parent) == mine or mark in _read(name, "environ").split(b"\0")
            # The tracker serves this process to its end, too.
            if is_ours and state != b"Z" and b"resource_tracker" not in _read(name, "cmdline"):
                found.add(int(name))
    return found - kept


_noted = 0


def note_start() -> None:
    """Remember that a process was started that is no child of this one."""
    global _noted
    _noted += 1


@contextmanager
def ending_processes(watcher: HangWatcher) -> Iterator[None]:
    """End what is started in this context, at its end at the latest; fail if it has hung."""
    has_children, waited_for = _has_children(), _waited_for()
    before = started() if has_children else set()
    watcher.hung = ""
    try:
        yield
    finally:
        # To look at all processes takes a while, and most tests start none.
        if _has_children() or _waited_for() != waited_for:
            while left := started() - before:
                _kill(left)
    if watcher.hung:
        pytest.fail(watcher.hung)


@contextmanager
def restoring_environment() -> Iterator[None]:
    """Undo what is done to the environment: a command in this process sets ``RANK``, for one."""
    before = dict(os.environ)
    try:
        yield
    finally:
        # pytest itself sets its own anew before each part of a test.
        changed = (os.environ.keys() | before.keys()) - {"PYTEST_CURRENT_TEST"}
        for name in changed:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


class HangWatcher(threading.Thread):
    """Ends processes that do nothing any more, which fails whatever waits for them.

    Args:
        idle_s: See :data:`IDLE_S`.

    Attributes:
        hung: What was ended and why; empty as long as nothing was.
    """

    def __init__(self, idle_s: float = IDLE_S) -> None:
        super().__init__(name="hang-watcher", daemon=True)
        self.idle_s = idle_s
        self.hung = ""

    def run(self) -> None:
        last: dict[int, float] = {}
        work_s, since = 0.0, time.monotonic()
        while True:
            time.sleep(self.idle_s / 20)
            numbers = started()
            now = {number: _cpu_s(number) for number in numbers}
            work_s += sum(max(0.0, used - last.get(number, 0.0)) for number, used in now.items())
            last = now
            if not numbers or work_s > LEAST_WORK * self.idle_s:
                work_s, since = 0.0, time.monotonic()
            elif time.monotonic() - since > self.idle_s:
                commands = "\n".join(f"{number}: {_command(number)}" for number in numbers)
                self.hung = f"for {self.idle_s:.0f} s nothing was done by\n{commands}"
                _kill(numbers)
                # What starts next has its own time.
                work_s, since = 0.0, time.monotonic()


def _kill(numbers: set[int]) -> None:
    for number in numbers:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    time.sleep(0.05)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _waited_for() -> tuple[float, int, int]:
    """What changes with every child that is waited for, and with what is no child."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime, used.ru_minflt, _noted


def _cpu_s(number: int) -> float:
    with suppress(OSError):
        fields = _read(str(number), "stat").rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _command(number: int) -> str:
    with suppress(OSError):
        return _read(str(number), "cmdline").replace(b"\0", b" ").decode(errors="replace")
    return "has ended"


def _read(process: str, name: str) -> bytes:
    return Path("/proc", process, name).read_bytes()
