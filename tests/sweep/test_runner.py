"""Tests of: dualtrain.sweep.runner: claims, signals, exit codes, what is divided among points.

Points here are real processes, of a small program in place of `dualtrain run`: what matters is when
they end and how. `test_sweep_runs.py` has runs that train.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.sweeps import FILE

from dualtrain.common.errors import EXIT_DONE, EXIT_SAVED_AFTER_SIGNAL, UserError
from dualtrain.sweep.command import SweepOptions
from dualtrain.sweep.definition import load_sweep
from dualtrain.sweep.directory import (
    Outcome,
    claim,
    is_busy,
    prepare,
    read_listing,
    read_outcome,
    write_outcome,
)
from dualtrain.sweep.run import _summary, run_sweep
from dualtrain.sweep.runner import Runner

WAITS = "trap 'echo saved; exit 75' TERM\necho training\nwhile :; do sleep 0.05; done"


@pytest.fixture
def points(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(FILE.partition("sweep:")[0] + "sweep: {grid: {alpha: [0, 1/2, 1]}}")
    sweep = load_sweep(str(file), directory=tmp_path / "points")
    prepare(sweep)
    return sweep.points


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Have points run a shell script."""

    def use(script: str) -> None:
        file = tmp_path / "program"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(file))

    return use


def states(runner: Runner) -> list[str]:
    return [job.state for job in runner.jobs]


def test_a_point_that_is_claimed_is_left_to_who_has_it(points, program, capsys):
    program("exit 0")
    directory = points[0].directory
    assert not is_busy(directory) and not directory.exists()
    held = claim(directory)
    assert held is not None and claim(directory) is None and is_busy(directory)
    runner = Runner(points[:2])
    runner.run()
    assert states(runner) == ["elsewhere", "finished"]
    assert _summary(runner) == EXIT_DONE
    printed = capsys.readouterr().out
    assert printed == f"left to the processes that run them: {points[0].label}\n"
    held.close()
    assert not is_busy(directory)
    again = Runner(points[:2])
    again.run()
    assert states(again) == ["finished", "finished"] and not is_busy(directory)


def test_a_point_that_ended_before_it_could_be_claimed_is_not_run_again(points, program):
    program("exit 1")  # would fail
    runner = Runner(points[:2], on_change=lambda job: write_outcome(other, Outcome("finished", 0)))
    other = points[1].directory
    other.mkdir(parents=True)
    runner.run()
    assert states(runner) == ["failed", "finished"]


def test_forms_of_a_sweep_that_begin_at_once_are_all_listed(tmp_path):
    sweeps = []
    for number in range(6):
        file = tmp_path / f"{number}.yaml"
        text = FILE.partition("sweep:")[0] + f"sweep: {{grid: {{alpha: [0, 1/{number + 2}]}}}}"
        file.write_text(text)
        sweeps.append(load_sweep(str(file), directory=tmp_path / "points"))
    with ThreadPoolExecutor(len(sweeps)) as pool:
        for ended in [pool.submit(prepare, sweep) for sweep in sweeps * 3]:
            ended.result()
    listed = read_listing(tmp_path / "points").points
    assert sorted(listed) == sorted({point.label for sweep in sweeps for point in sweep.points})


def test_a_signal_while_a_run_is_being_started_reaches_it(points, program, monkeypatch):
    program(WAITS)
    log = points[0].directory / "logs" / "output.log"

    class Interrupted(subprocess.Popen):
        """A process during whose start this one is told to stop."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            while "training" not in log.read_text():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)  # the runner does not have the process yet

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    runner = Runner(points)
    runner.run()
    assert states(runner) == ["stopped", "waiting", "waiting"] and runner.is_stopping
    assert "saved" in log.read_text() and read_outcome(points[0].directory) is None


def test_a_retry_that_is_interrupted_is_no_longer_a_failure(points, program, capsys):
    program("exit 75")  # stopped by somebody else than the sweep
    write_outcome(make(points[0].directory), Outcome("failed", 1, "no memory"))
    kept = Runner(points[:1])
    kept.run()
    assert states(kept) == ["failed"] and kept.jobs[0].reason == "no memory"
    retried = Runner(points[:1], retry_failed=True)
    retried.run()
    assert states(retried) == ["stopped"] and read_outcome(points[0].directory) is None
    assert _summary(retried) == EXIT_SAVED_AFTER_SIGNAL
    printed = capsys.readouterr().out
    assert f"stopped by a signal: {points[0].label}; the same command goes on" in printed


def make(directory):
    directory.mkdir(parents=True)
    return directory


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'error: somewhere: what'\necho more\nexit 2", "error: somewhere: what"),
        ("kill -9 $$", "killed by signal 9"),
        ("echo the end\nexit 1", "the end"),
    ],
)
def test_what_a_failed_run_said_last_is_its_reason(points, program, script, reason):
    program(script)
    runner = Runner(points[:1])
    runner.run()
    outcome = read_outcome(points[0].directory)
    assert outcome is not None and (outcome.state, outcome.reason) == ("failed", reason)


def test_points_at_once_have_their_own_devices_and_cores(points, program, monkeypatch):
    program('echo "$CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS"')
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")

    def said(**options) -> set[str]:
        for point in points[:2]:
            (point.directory / "outcome.json").unlink(missing_ok=True)
            (point.directory / "logs" / "output.log").unlink(missing_ok=True)
        Runner(points[:2], **options).run()
        logs = [point.directory / "logs" / "output.log" for point in points[:2]]
        return {log.read_text().strip() for log in logs}

    assert said(parallel=2, devices=["4", "5", "6", "7"]) == {"4,5 2", "6,7 2"}
    assert said(parallel=2, devices=["4"]) == {"4 4"}
    assert said(parallel=2, ranks=2) == {"4,5,6,7 2"}
    assert said(parallel=1, devices=["4", "5"]) == {"4,5,6,7"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert said(parallel=2) == {"4,5,6,7 3"}


@pytest.mark.parametrize(
    "ranks",
    [
        {"WORLD_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_a_sweep_is_no_rank_of_a_launcher(tmp_path, monkeypatch, ranks):
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="was started by a launcher of ranks"):
        run_sweep(SweepOptions(file=str(tmp_path / "sweep.yaml")))
