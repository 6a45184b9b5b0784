"""Tests of: dualtrain.sweep.view: what a sweep shows while it runs."""

from __future__ import annotations

import io

import pytest
from helpers.sweeps import FILE, make_sweep
from rich.console import Console

from dualtrain.sweep import view as view_module
from dualtrain.sweep.definition import load_sweep
from dualtrain.sweep.runner import PointJob
from dualtrain.sweep.view import Latest, SweepView


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("view")
    text = FILE.replace("seed: [0, 1, 2]", "seed: 0").replace("[4, 16, 64]", "[4, 16]")
    directory = make_sweep(folder, text=text, leave_out=lambda p: p.number > 2)
    points = load_sweep(str(folder / "sweep.yaml"), directory=directory).points
    # One ended here, one before, one has failed, one is running and has just begun.
    found = [PointJob(point) for point in points]
    for job in (found[0], found[2], found[3]):
        job.began = 1.0
    return found


def show(jobs, *, is_terminal: bool, monkeypatch) -> str:
    monkeypatch.setattr(view_module, "REFRESH_S", 0.0)
    monkeypatch.setattr(view_module, "LINE_S", 0.0)
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=120, highlight=False)
    with SweepView(["repetitions", "alpha", "seed"], console=console) as view:
        view.start(jobs)
        for job, state, reason in (
            (jobs[1], "finished", ""),
            (jobs[0], "running", ""),
            (jobs[0], "finished", ""),
            (jobs[2], "running", ""),
            (jobs[2], "failed", "no memory"),
            (jobs[3], "running", ""),
        ):
            job.state, job.reason = state, reason
            view.change(job)
        view.poll()
    return out.getvalue()


def test_lines_say_what_became_of_points_and_how_long_it_takes(jobs, monkeypatch):
    lines = show(jobs, is_terminal=False, monkeypatch=monkeypatch).splitlines()
    # What had ended before is not told again, but counts.
    assert lines[0] == "[1/12] started  repetitions=4,alpha=0,seed=0"
    assert lines[1].startswith("[2/12] finished repetitions=4,alpha=0,seed=0 in ")
    assert lines[1].endswith(": held-out ar 7.4328, diffusion 5.0000 nats/token")
    assert any("[3/12] FAILED   repetitions=4,alpha=1_4,seed=0" in line for line in lines)
    assert any(line.endswith(": no memory") for line in lines)
    assert lines[-2] == "repetitions=4,alpha=1_2,seed=0: step 0/?"
    assert lines[-1].startswith("[3/12] about ") and lines[-1].endswith(" left")


def test_on_a_terminal_a_table_has_the_newest_numbers(jobs, monkeypatch):
    shown = show(jobs, is_terminal=True, monkeypatch=monkeypatch)
    assert "2 finished, 1 failed, 1 running, 8 waiting, about" in shown
    assert "held-out AR" in shown and "tokens/s" in shown
    row = next(line for line in shown.splitlines() if " done" in line)
    assert row.split()[:6] == ["4", "0", "0", "done", "40/40", "100"]


def test_a_file_in_the_middle_of_a_write_is_no_harm(jobs):
    path = jobs[0].point.directory / "metrics.jsonl"
    whole = Latest.of(path.parent)
    assert (whole.step, whole.steps, whole.diffusion) == (40, 40, 5.0)
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert Latest.of(path.parent) == whole
    assert Latest.of(path.parent / "nothing") == Latest()


def test_points_that_another_process_runs_are_said_and_count_as_done(jobs, monkeypatch):
    out = io.StringIO()
    with SweepView(["alpha"], console=Console(file=out, width=120)) as view:
        view.start(jobs)
        monkeypatch.setattr(jobs[5], "state", "elsewhere")
        view.change(jobs[5])
        monkeypatch.setattr(jobs[6], "state", "running")
        view.change(jobs[6])
    lines = out.getvalue().splitlines()
    assert lines[0] == f"{jobs[5].point.label} is left to the process that runs it"
    done = sum(job.state in ("finished", "failed", "elsewhere") for job in jobs)
    assert lines[1] == f"[{done}/12] started  {jobs[6].point.label}" and done >= 1
