"""Tests of: dualtrain.progress.frame, .live, .plain, .report, .curves, .remaining, and formatting.

The live view at every size, the plain lines, the summary and the curves.
"""

from __future__ import annotations

import io
import math
import re
from typing import cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from dualtrain.common import formatting
from dualtrain.progress import curves
from dualtrain.progress.frame import RunState, frame
from dualtrain.progress.live import LiveView
from dualtrain.progress.metrics import (
    EvalRecord,
    EventRecord,
    TaskScore,
    TasksRecord,
    TrainRecord,
)
from dualtrain.progress.plain import PlainView
from dualtrain.progress.remaining import RemainingTime
from dualtrain.progress.report import RunFacts, Sample, Summary, summary_lines

FACTS = RunFacts("quickstart", "runs/quickstart", "CPU", 2, 1_234_567, 300, 8192, 76_800, 32.0, 8.0)


def train(step: int, **changes: object) -> TrainRecord:
    record = {
        "kind": "train",
        "step": step,
        "steps": 300,
        "tokens": step * 8192,
        "epoch": step / 300 * 32,
        "lr": 7e-3,
        "alpha": 0.25,
        "ar_loss": 8.0 * math.exp(-step / 60),
        "diffusion_loss": 8.0 * math.exp(-step / 150) + 1,
        "loss": 5.0,
        "z_loss": 0.001,
        "grad_norm": 0.75,
        "ar_slots": step,
        "diffusion_slots": 3 * step,
        "ar_passes": step / 300 * 8,
        "tokens_per_second": 12345.0,
        "mfu": None,
        "data_wait_s": 0.0,
        "elapsed_s": step * 8192 / 12345.0,
        "memory_bytes": 812 * 2**20,
        "logged": {},
        **changes,
    }
    return cast(TrainRecord, record)


def held_out(step: int, ar: float = 5.0, diffusion: float = 6.0) -> EvalRecord:
    return EvalRecord(
        kind="eval",
        step=step,
        ar_nll=ar,
        ar_bits_per_byte=ar / 2,
        diffusion_nll=diffusion,
        diffusion_bits_per_byte=diffusion / 2,
        tokens=65_536,
        elapsed_s=1.0,
    )


def three_modes(step: int) -> EvalRecord:
    """As held_out, which is a record of an older version, with what has been added since."""
    return EvalRecord(
        **held_out(step),
        ar_error=0.02,
        diffusion_error=0.03,
        prefix_nll=4.5,
        prefix_bits_per_byte=2.25,
        prefix_error=0.025,
        ar_nll_same_tokens=4.625,
        prefix_minus_ar_error=0.0042,
        prefix_tokens=32_000,
        documents=61,
    )


def scores(step: int, mode: str = "ar", tasks: int = 2) -> TasksRecord:
    names = ("blimp", "arc_easy", *(f"task_number_{n}" for n in range(2, tasks)))[:tasks]
    task = TaskScore(
        accuracy=0.6, accuracy_norm=0.5, score=20.0, score_low=10.0, score_high=30.0, items=200
    )
    return TasksRecord(
        kind="tasks",
        step=step,
        mode=mode,
        average=16.25,
        average_low=9.0,
        average_high=23.5,
        tasks={name: {**task, "score": 20.0 - number} for number, name in enumerate(names)},
        elapsed_s=1.0,
    )


def checkpoint(step: int) -> EventRecord:
    return EventRecord(
        kind="event", step=step, event="checkpoint", message=f"runs/q/checkpoints/step-{step:08}"
    )


def busy_state() -> RunState:
    state = RunState(FACTS, status="training")
    for step in range(5, 181, 5):
        state.add(train(step))
        if step % 60 == 0:
            state.add(held_out(step, ar=5 + (step - 60) / 100))
            state.add(checkpoint(step))
    return state


def text(state: RunState, width: int, height: int) -> str:
    return "\n".join(line.plain for line in frame(state, width, height))


def test_everything_fits_the_common_terminal():
    shown = text(busy_state(), 80, 24)
    for expected in (
        "quickstart",
        "180/300 steps  60%",
        "tokens/s 12.3k",
        "left 1:19",
        "elapsed 1:59",
        "lr 7.00e-03",
        "alpha 0.25",
        "epoch 19.20 of 32",
        "AR passes 4.80 of 8.00",
        "memory 812 MiB",
        "6.2000",  # held-out AR
        "5.0000 at step 60",  # the best, long past
        "last checkpoint step-00000180",
        "•",
    ):
        assert expected in shown, expected
    assert re.search(r"AR loss +0\.3983 +6\.2000 +3\.1000", shown)
    assert re.search(r"diffusion +3\.4096 +6\.0000 +3\.0000", shown)
    assert "MFU" not in shown
    assert any(0x2801 <= ord(char) <= 0x28FF for char in shown)


def test_a_known_peak_and_a_waiting_loop_are_shown():
    state = RunState(FACTS)
    state.add(train(5, mfu=0.412, data_wait_s=3.0, logged={"ratio": 0.25}))
    shown = text(state, 100, 24)
    for expected in ("MFU 41.2%", "waited for data 3.0 s", "ratio 0.25"):
        assert expected in shown


def test_prefix_is_shown_beside_ar_on_the_same_tokens():
    state = busy_state()
    assert "second halves" not in text(state, 80, 24)
    state.add(three_modes(180))
    shown = text(state, 80, 24)
    assert "second halves of documents: AR 4.6250   prefix 4.5000    -0.1250 ± 0.0042" in shown
    assert "•" in shown and "last checkpoint" in shown
    output = io.StringIO()
    PlainView(output).record(three_modes(180))
    assert output.getvalue() == (
        "held-out at step 180 | ar 5.0000 nats/token, 2.5000 bits/byte | "
        "diffusion 6.0000 nats/token, 3.0000 bits/byte | "
        "prefix 4.5000 nats/token, -0.1250 ± 0.0042 to ar on the same tokens | 65,536 tokens\n"
    )
    none: EvalRecord = {**three_modes(180), "prefix_nll": None, "ar_nll_same_tokens": None}
    state.add(none)
    assert "second halves" not in text(state, 80, 24)


def test_scores_on_tasks_are_shown_where_there_is_room():
    state = busy_state()
    for mode in ("ar", "prefix"):
        state.add(scores(120, mode))
    state.add(scores(180))
    shown = text(state, 80, 24)
    assert "ar scores at step 180   blimp 20.0   arc_easy 19.0   average 16.2" in shown
    assert "prefix scores at step 120   blimp 20.0" in shown
    assert "•" in shown
    for mode in ("ar", "prefix", "pll"):
        state.add(scores(180, mode, tasks=9))
    shown = text(state, 80, 24)
    assert "ar score 16.2   prefix score 16.2   pll score 16.2" in shown
    assert "blimp" not in shown and "•" in shown
    assert text(state, 80, 50).count("task_number_8 12.0") == 3


def test_the_plain_line_of_scores():
    output = io.StringIO()
    PlainView(output).record(scores(180, "pll"))
    assert output.getvalue() == (
        "tasks at step 180, pll scores | blimp 20.0 | arc_easy 19.0 | average 16.2 (9.0, 23.5) | "
        "400 items\n"
    )


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 200), height=st.integers(1, 60), stage=st.integers(0, 5))
def test_every_size_fits(width: int, height: int, stage: int):
    state = RunState(FACTS)
    if stage == 1:
        state.add(train(5, ar_loss=None, diffusion_loss=None, tokens_per_second=None))
    if stage == 2:
        state.add(held_out(0))
    if stage >= 3:
        state = busy_state()
    if stage >= 4:
        state.add(three_modes(180))
    if stage == 5:
        state.add(scores(180, "pll", tasks=9))
    lines = frame(state, width, height)
    assert 1 <= len(lines) <= max(1, height - 1)
    assert all(line.cell_len <= width and "\n" not in line.plain for line in lines)


def test_losses_are_the_last_to_go():
    shown = text(busy_state(), 40, 6)
    assert "AR loss" in shown and "diffusion" in shown


def terminal(width: int = 80, height: int = 24) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=True, width=width, height=height), output


@pytest.mark.parametrize("size", [(80, 24), (20, 5), (1, 1)])
def test_the_live_view_runs_and_gives_the_terminal_back(size: tuple[int, int]):
    console, output = terminal(*size)
    view = LiveView(console)
    view.start(FACTS, [train(5), held_out(5)])
    assert view._state.status == "starting"
    view.tick(7)
    assert (view._state.step, view._state.status) == (7, "training")
    view.status("evaluating")
    view.record(train(10))
    view.message("hello [bold]\x1b[2J")
    view.finish(Summary(step=10, tokens=100, elapsed_s=3.0))
    view.close()
    written = output.getvalue()
    assert "\x1b[2J" not in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # the cursor is back


def test_a_redraw_covers_the_last_one():
    console, output = terminal()
    view = LiveView(console)
    view.start(FACTS, [])
    written = output.getvalue()
    first = written.count("\n")
    view.record(train(5))
    view.close()
    # Back up over every line but the last, which has no newline, erasing each.
    assert first > 5
    assert f"{chr(27)}[1A{chr(27)}[2K" * first in output.getvalue()[len(written) :]


def test_a_smaller_terminal_is_cleared_first():
    console, output = terminal(100, 40)
    view = LiveView(console)
    view.start(FACTS, [])
    assert "\x1b[2J" not in output.getvalue()
    console.size = (60, 20)  # type: ignore[assignment]
    view._live.refresh()  # type: ignore[union-attr]
    assert output.getvalue().count("\x1b[2J") == 1
    console.size = (90, 20)  # type: ignore[assignment]
    view._live.refresh()  # type: ignore[union-attr]
    assert output.getvalue().count("\x1b[2J") == 1
    view.close()


def test_a_resumed_run_shows_its_past():
    state = RunState(
        RunFacts("q", "d", "CPU", 1, 1, 300, 8192, 1, 1.0, 1.0, first_step=20, elapsed_s=50.0),
        step=20,
    )
    for step in (10, 20):
        state.add(train(step), now=False)
    assert [x for x, _ in state.points("ar")] == [10, 20]
    assert state.remaining_s() is None  # the speed of another process tells nothing
    assert 50 <= state.elapsed_s() < 51
    assert "20/300" in text(state, 80, 24)


def test_plain_lines_are_aligned_and_complete():
    output = io.StringIO()
    view = PlainView(output)
    view.start(FACTS, [])
    for step in (5, 50, 295):
        view.record(train(step))
    view.record(held_out(295))
    view.record(checkpoint(295))
    view.message("the end")
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("quickstart: 1.23M parameters on CPU, 2 ranks; 300 steps")
    steps = lines[1:4]
    columns = {tuple(m.start() for m in re.finditer(r"\|", line))[:8] for line in steps}
    assert len(columns) == 1 and len(columns.pop()) == 8
    assert steps[2].startswith("step 295/300 | ar  0.0586 | diffusion  2.1194 | lr 7.00e-03 ")
    for part in ("12.3k tokens/s", "ar passes   7.87", "epoch  31.47", "812 MiB", "0:03 left"):
        assert part in steps[2]
    assert lines[4].startswith("held-out at step 295 | ar 5.0000 nats/token, 2.5000 bits/byte")
    assert lines[5:] == ["checkpoint at step 295: runs/q/checkpoints/step-00000295", "the end"]


def test_plain_output_survives_an_ascii_stream():
    raw = io.BytesIO()
    view = PlainView(io.TextIOWrapper(raw, encoding="ascii"))
    view.message("café → é")
    assert raw.getvalue() == b"caf? ? ?\n"


def test_summary_names_everything():
    summary = Summary(
        step=300,
        tokens=2_457_600,
        elapsed_s=199.0,
        held_out={**three_modes(300), **held_out(300, ar=4.0, diffusion=5.5)},
        scores=[scores(200, "prefix"), scores(300, "ar"), scores(300, "pll")],
        samples=[
            Sample("AR sample", (("Once ", False), ("upon\x1b[2J a time " * 12, True))),
            Sample("infilled", (("The ", False), ("cat", True), (" sat", False))),
        ],
        written={"run": "runs/quickstart", "checkpoint": "a/very/long/path/" + "x" * 200},
        next_commands=[("dualtrain run quickstart alpha=1", "the baseline")],
    )
    lines = [line.plain for line in summary_lines(summary, 60)]
    shown = "\n".join(lines)
    for expected in (
        "done: 300 steps, 2.46M tokens, 3:19",
        "held-out loss, 65,536 tokens",
        "4.0000 nats/token   2.0000 bits/byte",
        "5.5000 nats/token   2.7500 bits/byte",
        "4.5000 nats/token   2.2500 bits/byte",
        "second halves of documents: -0.1250 ± 0.0042 to AR there",
        "scores on tasks at step 300",
        "                              ar                   pll\n",
        "  arc_easy     19.0 (10.0, 30.0)     19.0 (10.0, 30.0)\n",
        "  average       16.2 (9.0, 23.5)      16.2 (9.0, 23.5)\n",
        "The [cat] sat",
        "x" * 200,
        "dualtrain run quickstart alpha=1",
        "the baseline",
    ):
        assert expected in shown
    assert "\x1b" not in shown
    assert "prefix  " not in shown.partition("scores on tasks")[2]  # of an earlier step
    longest = [line for line in lines if "x" * 200 not in line and "scores on tasks" not in line]
    assert all(len(line) <= 60 for line in longest)


def test_a_summary_of_an_older_version_has_two_losses():
    summary = Summary(step=300, tokens=1, elapsed_s=1.0, held_out=held_out(300))
    shown = "\n".join(line.plain for line in summary_lines(summary, 80))
    assert "6.0000 nats/token" in shown
    assert "prefix" not in shown and "tasks" not in shown


def test_remaining_time_is_the_median_rate_and_pauses_on_top():
    remaining = RemainingTime()
    elapsed, seconds = 30.0, 1.0  # the first interval compiles
    assert remaining.seconds() is None
    remaining.add(train(10, elapsed_s=elapsed, tokens_per_second=10 * 8192 / 30))
    assert remaining.seconds() == pytest.approx(290 * 3.0)
    for step in range(20, 201, 10):
        slow = 5 if step == 100 else 1
        elapsed += 10 * seconds * slow
        remaining.add(
            train(step, elapsed_s=elapsed, tokens_per_second=8192 / seconds / slow),
        )
    assert remaining.seconds() == pytest.approx(100 * seconds)
    elapsed += 10 * seconds + 40  # an evaluation of 40 s in 200 steps: 0.2 s a step
    remaining.add(train(210, elapsed_s=elapsed, tokens_per_second=8192 / seconds))
    assert remaining.seconds() == pytest.approx(90 * (seconds + 0.2))


def dots(lines: list) -> list[tuple[int, int]]:
    """Read the set dots of a plot back as (column, row) in dots."""
    found = []
    for row, line in enumerate(lines):
        for column, char in enumerate(line.plain[curves.LABEL_WIDTH + 1 :]):
            bits = ord(char) - 0x2800 if char != " " else 0
            for dot, (dx, dy) in enumerate(
                [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
            ):
                if bits >> dot & 1:
                    found.append((2 * column + dx, 4 * row + dy))
    return found


def test_a_straight_line_is_drawn_straight():
    lines = curves.plot([(x, x) for x in range(8)], [], width=11, height=2)
    assert [line.cell_len for line in lines] == [11, 11]
    assert sorted(dots(lines)) == [(x, 7 - x) for x in range(8)]
    assert lines[0].plain.startswith("  7.00 ") and lines[1].plain.startswith("  0.00 ")


def test_a_jump_is_joined():
    lines = curves.plot([(0, 0), (1, 7)], [], width=curves.LABEL_WIDTH + 2, height=2)
    assert {row for _, row in dots(lines)} == set(range(8))


def test_marks_lie_over_the_line_and_alone():
    lines = curves.plot([], [(0, 1.0), (10, 2.0)], width=12, height=3)
    assert lines[2].plain[7] == "•" and lines[0].plain[11] == "•"


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6), max_size=50),
    marks=st.lists(st.floats(-1e6, 1e6), max_size=5),
    width=st.integers(curves.LABEL_WIDTH + 2, 40),
    height=st.integers(1, 6),
)
@example(values=[-100.0], marks=[], width=9, height=1)
def test_plots_have_their_size(values: list[float], marks: list[float], width: int, height: int):
    lines = curves.plot(list(enumerate(values)), list(enumerate(marks)), width=width, height=height)
    assert [line.cell_len for line in lines] == [width] * height


def test_a_long_history_stays_small_and_keeps_its_shape():
    series = curves.Series()
    for step in range(100_000):
        series.add(step, float(step))
        series.add(step, None)
    assert 1000 < len(series.points) <= 4096
    assert all(x == y for x, y in series.points)
    assert series.points == sorted(series.points)
    assert series.points[-1][0] > 99_900


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1.00k"),
        (12_345, "12.3k"),
        (123_456, "123k"),
        (999_999, "1.00M"),
        (4_194_304, "4.19M"),
        (34_359_738_368, "34.4G"),
        (5e15, "5.00e+03T"),
        (None, "-"),
    ],
)
def test_counts(value: float | None, shown: str):
    assert formatting.count(value) == shown


def test_durations_and_sizes():
    assert [formatting.duration(s) for s in (0, 61, 3661, 90_061, -5, None)] == [
        "0:00",
        "1:01",
        "1:01:01",
        "1d 1:01:01",
        "0:00",
        "-",
    ]
    assert [formatting.size(b) for b in (2**20, 812 * 2**20, 5 * 2**30)] == [
        "1 MiB",
        "812 MiB",
        "5.0 GiB",
    ]
