"""Tests of: dualtrain.progress.progress, .trackers.with_tensorboard.

The facade: one source for all, silence on other ranks, resume, lost terminals, TensorBoard.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from dualtrain.progress.live import LiveView
from dualtrain.progress.metrics import (
    EvalRecord,
    MetricsFile,
    Record,
    TaskScore,
    TasksRecord,
    read_metrics,
)
from dualtrain.progress.plain import PlainView
from dualtrain.progress.progress import Progress
from dualtrain.progress.report import RunFacts, RunView, Summary
from dualtrain.progress.trackers.writer import TrackerView


def facts(run_dir: Path, first_step: int = 0) -> RunFacts:
    return RunFacts("run", str(run_dir), "CPU", 1, 10, 100, 8, 80, 10.0, 5.0, first_step=first_step)


def evaluation(step: int, ar: float = 1.0) -> EvalRecord:
    return EvalRecord(
        kind="eval",
        step=step,
        ar_nll=ar,
        ar_bits_per_byte=1.5,
        diffusion_nll=2.0,
        diffusion_bits_per_byte=3.0,
        tokens=10,
        elapsed_s=1.0,
    )


def scores(step: int) -> TasksRecord:
    task = TaskScore(
        accuracy=0.6, accuracy_norm=0.5, score=12.5, score_low=1.0, score_high=2.0, items=9
    )
    return TasksRecord(
        kind="tasks",
        step=step,
        mode="pll",
        average=12.5,
        average_low=1.0,
        average_high=2.0,
        tasks={"blimp": task},
        elapsed_s=1.0,
    )


class Recorder(TrackerView):
    """Remember every call."""

    name = "recorder"

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def start(self, facts, history) -> None:
        self.calls.append(("start", list(history)))

    def record(self, record: Record) -> None:
        self.calls.append(("record", record))

    def status(self, text: str) -> None:
        self.calls.append(("status", text))

    def failure(self) -> None:
        return None

    def close(self) -> None:
        self.calls.append(("close",))


class Hangup(RunView):
    """A terminal that goes away at the first record."""

    def __init__(self) -> None:
        self.shown = 0
        self.closed = False

    def record(self, record: Record) -> None:
        self.shown += 1
        raise BrokenPipeError(32, "Broken pipe")

    def close(self) -> None:
        self.closed = True
        raise OSError(5, "Input/output error")


def test_file_screen_and_trackers_get_the_same_record(tmp_path: Path):
    screen, tracker = Recorder(), Recorder()
    path = tmp_path / "m"
    with Progress(MetricsFile(path), screen, [tracker]) as progress:
        progress.start(facts(tmp_path))
        progress.record(evaluation(1, ar=float("nan")))
        progress.event("checkpoint", "somewhere", step=1)
    expected = [
        {**evaluation(1), "ar_nll": None},
        {"kind": "event", "step": 1, "event": "checkpoint", "message": "somewhere"},
    ]
    assert read_metrics(path) == expected
    for view in (screen, tracker):
        assert [call[1] for call in view.calls if call[0] == "record"] == expected
        assert view.calls[-1] == ("close",)


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with Progress.open(tmp_path, rank=1, trackers=["tensorboard"]) as progress:
        progress.start(facts(tmp_path))
        progress.record(evaluation(1))
        progress.message("hello")
        progress.tick(1)
        with progress.busy("evaluating"):
            progress.finish(Summary(step=1, tokens=1, elapsed_s=1.0))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_resumed_run_has_no_duplicates_and_a_new_one_no_past(tmp_path: Path):
    with Progress.open(tmp_path, view="none") as progress:
        progress.start(facts(tmp_path))
        for step in (0, 10, 20, 30):
            progress.record(evaluation(step))
    screen = Recorder()
    path = tmp_path / "metrics.jsonl"
    with Progress(MetricsFile(path), screen) as progress:
        progress.start(facts(tmp_path, first_step=20))
        progress.record(evaluation(30))
    assert [r["step"] for r in read_metrics(path)] == [0, 10, 20, 30]
    assert screen.calls[0] == ("start", [evaluation(step) for step in (0, 10, 20)])
    with Progress(MetricsFile(path)) as progress:
        progress.start(facts(tmp_path))
        progress.record(evaluation(10))
    assert [r["step"] for r in read_metrics(path)] == [10]


def test_the_run_outlives_its_terminal(tmp_path: Path):
    screen = Hangup()
    path = tmp_path / "m"
    with Progress(MetricsFile(path), screen) as progress:
        progress.start(facts(tmp_path))
        progress.record(evaluation(1))
        progress.record(evaluation(2))
        progress.message("nobody reads this")
    records = read_metrics(path)
    assert [r["kind"] for r in records] == ["eval", "event", "eval"]
    assert records[1]["event"] == "terminal_lost" and "Broken pipe" in records[1]["message"]
    assert screen.shown == 1 and screen.closed


def test_what_the_run_is_busy_with_ends_with_its_block():
    screen = Recorder()
    progress = Progress(None, screen)
    with pytest.raises(ValueError, match="stop"), progress.busy("evaluating"):
        raise ValueError("stop")
    progress.status("waiting")
    with progress.busy("saving"):
        pass
    found = [call[1] for call in screen.calls]
    assert found == ["evaluating", "training", "waiting", "saving", "waiting"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class AsciiTerminal(Terminal):
    encoding = "ascii"


@pytest.mark.parametrize(
    ("stream", "term", "view", "kind"),
    [
        (Terminal(), "xterm", "auto", LiveView),
        (Terminal(), "dumb", "auto", PlainView),
        (AsciiTerminal(), "xterm", "auto", PlainView),
        (io.StringIO(), "xterm", "auto", PlainView),
        (Terminal(), "xterm", "plain", PlainView),
        (io.StringIO(), "xterm", "live", LiveView),
        (Terminal(), "xterm", "none", type(None)),
    ],
)
def test_the_view_follows_the_terminal(tmp_path, monkeypatch, stream, term, view, kind):
    monkeypatch.setenv("TERM", term)
    with Progress.open(tmp_path, view=view, stream=stream) as progress:
        assert type(progress._screen) is kind


def test_prints_of_libraries_do_not_stay_redirected(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with Progress.open(tmp_path) as progress:
        progress.start(facts(tmp_path))
        assert sys.stdout is not terminal
        print("from a library")
    assert sys.stdout is terminal
    assert "from a library" in terminal.getvalue()


def test_tensorboard_holds_the_same_numbers(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Progress.open(tmp_path, view="none", trackers=["tensorboard"]) as progress:
        progress.start(facts(tmp_path))
        for step in (10, 20, 30):
            progress.record(evaluation(step, ar=float(step)))
        progress.event("checkpoint", "x", step=30)
        progress.record(scores(20))
    with Progress.open(tmp_path, view="none", trackers=["tensorboard"]) as progress:
        progress.start(facts(tmp_path, first_step=20))
        progress.record(evaluation(30, ar=31.0))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "tasks/pll/blimp",
        "tasks/pll/average",
        "eval/ar_nll",
        "eval/ar_bits_per_byte",
        "eval/diffusion_nll",
        "eval/diffusion_bits_per_byte",
        "eval/tokens",
        "eval/elapsed_s",
    }
    found = [(e.step, e.value) for e in events.Scalars("eval/ar_nll")]
    assert found == [(10, 10.0), (20, 20.0), (30, 31.0)]
    found = [(e.step, e.value) for e in events.Scalars("tasks/pll/blimp")]
    assert found == [(20, 12.5)]
