"""Tests of: tests/helpers/processes.py: signals, hangs, and what a test leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

TESTS = Path(__file__).parents[1]
CONFTEST = """
import pytest
from helpers.processes import HangWatcher, ending_processes, hear_signals, mark_children
hear_signals()
mark_children()
@pytest.fixture(autouse=True)
def processes():
    watcher = HangWatcher(idle_s={idle_s})
    watcher.start()
    with ending_processes(watcher):
        yield
"""


def run_tests(folder: Path, text: str, *, idle_s: float = 60, ignore: tuple[int, ...] = ()) -> str:
    """Run a file of failing tests; what pytest says of it."""
    (folder / "conftest.py").write_text(CONFTEST.format(idle_s=idle_s))
    (folder / "test_it.py").write_text(text)

    def ignore_signals() -> None:
        for number in ignore:
            signal.signal(number, signal.SIG_IGN)

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        preexec_fn=ignore_signals,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_failed_test_leaves_no_process(tmp_path: Path) -> None:
    """Neither its child nor an orphan in a session of its own."""
    text = """
import subprocess, time
def test_fails():
    shell = "setsid sh -c 'echo $$ >> numbers; exec sleep 1000' & echo $$ >> numbers; "
    subprocess.Popen(["bash", "-c", shell + "exec sleep 1000"])
    subprocess.run(["bash", "-c", shell])
    while open("numbers").read().count("\\n") < 4:
        time.sleep(0.01)
    assert False, "as it should"
"""
    (tmp_path / "numbers").touch()
    assert "as it should" in run_tests(tmp_path, text)
    numbers = [int(line) for line in (tmp_path / "numbers").read_text().split()]
    assert len(numbers) == 4
    assert not any(is_running(number) for number in numbers)


def is_running(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_hang_fails_and_slow_work_does_not(tmp_path: Path) -> None:
    text = """
import subprocess, sys
def test_hangs():
    subprocess.run(["sleep", "1000"])
def test_works():
    code = "import time; end = time.monotonic() + 4\\nwhile time.monotonic() < end: pass"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
"""
    said = run_tests(tmp_path, text, idle_s=2)
    assert "2 passed, 1 error" in said
    assert "for 2 s nothing was done by" in said and "sleep 1000" in said


def test_children_hear_signals_that_the_suite_ignores(tmp_path: Path) -> None:
    text = """
import signal, subprocess
def test_children_hear():
    for name in ("INT", "TERM", "HUP", "USR1"):
        child = subprocess.Popen(["sleep", "1000"])
        child.send_signal(getattr(signal, f"SIG{name}"))
        assert child.wait() == -getattr(signal, f"SIG{name}")
    signal.raise_signal(signal.SIGHUP)
    assert False, "all heard"
"""
    ignored = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    assert "all heard" in run_tests(tmp_path, text, ignore=ignored)
