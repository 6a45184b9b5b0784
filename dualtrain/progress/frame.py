"""The layout of the live view: what a run has come to, on a terminal of any size.

:func:`frame` lays out everything at a given size and is a pure function of :class:`RunState`, so
that it can be looked at, and tested at every size, without a terminal. What does not fit is left
out by importance: first the curves, then the blank lines and the footer, then all but the losses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from rich.text import Text

from dualtrain.common import formatting
from dualtrain.progress import curves
from dualtrain.progress.metrics import (
    EvalRecord,
    EventRecord,
    Record,
    TasksRecord,
    TrainRecord,
    losses_of,
    prefix_difference,
)
from dualtrain.progress.remaining import RemainingTime
from dualtrain.progress.report import AR_STYLE, DIFFUSION_STYLE, HELD_OUT_STYLE, RunFacts

STARTING, TRAINING = "starting", "training"
# Rows left free under the frame at the common 24, so that messages above it stay in sight.
_SPARE_ROWS = 4
_MIN_CURVE_ROWS, _MAX_CURVE_ROWS = 3, 8
_MIN_CURVE_WIDTH = 30
_GAP = "   "


@dataclass
class RunState:
    """What the live view shows, gathered from the records."""

    facts: RunFacts
    train: TrainRecord | None = None
    held_out: EvalRecord | None = None
    best: dict[str, EvalRecord] = field(default_factory=dict)
    scores: dict[str, TasksRecord] = field(default_factory=dict)
    checkpoint: EventRecord | None = None
    curves: dict[str, curves.Series] = field(default_factory=dict)
    remaining: RemainingTime = field(default_factory=RemainingTime)
    step: int = 0
    status: str = STARTING
    updated: float = field(default_factory=time.monotonic)
    stopped: float | None = None

    def add(self, record: Record, *, now: bool = True) -> None:
        """Take a record; with ``now=False`` one of an earlier process, which tells no speed."""
        if record["kind"] == "event":
            if record["event"] == "checkpoint":
                self.checkpoint = record
            return
        if record["kind"] == "sample":
            return
        if record["kind"] == "eval":
            self._add_eval(record)
            return
        if record["kind"] == "tasks":
            self.scores = {**self.scores, record["mode"]: record}
            return
        self.train = record
        self.step = max(self.step, record["step"])
        self._curve("ar").add(record["step"], record["ar_loss"])
        self._curve("diffusion").add(record["step"], record["diffusion_loss"])
        if now:
            self.remaining.add(record)
            self.updated = time.monotonic()

    def _add_eval(self, record: EvalRecord) -> None:
        self.held_out = record
        for objective in ("ar", "diffusion"):
            value, best = losses_of(record, objective)[0], self.best.get(objective)
            lowest = None if best is None else losses_of(best, objective)[0]
            if value is not None and (lowest is None or value < lowest):
                self.best = {**self.best, objective: record}
            self._curve(f"{objective} held-out").add(record["step"], value)

    def _curve(self, name: str) -> curves.Series:
        if name not in self.curves:
            self.curves = {**self.curves, name: curves.Series()}
        return self.curves[name]

    def points(self, name: str) -> list[curves.Point]:
        """Return the history of a loss: ``ar``, ``diffusion``, or either with `` held-out``."""
        return self.curves[name].points if name in self.curves else []

    def elapsed_s(self) -> float:
        """Return the wall time of the run up to now."""
        since = (self.stopped or time.monotonic()) - self.updated
        fresh = self.train is not None and self.train["step"] > self.facts.first_step
        return since + (self.train["elapsed_s"] if fresh and self.train else self.facts.elapsed_s)

    def remaining_s(self) -> float | None:
        """Return the estimated time left from now on."""
        seconds = self.remaining.seconds()
        if seconds is None:
            return None
        return max(0.0, seconds - ((self.stopped or time.monotonic()) - self.updated))


def frame(state: RunState, width: int, height: int) -> list[Text]:
    """Lay the state out in at most ``height - 1`` lines of at most ``width`` columns."""
    rows = max(1, height - 1)
    blank = [Text("")]
    head = [_title(state, width), _bar(state, width), *_flow(_speed(state), width)]
    position = _flow(_position(state), width)
    table = _table(state, width)
    halves = _flow(_second_halves(state), width)
    foot = _flow(_footer(state), width)

    upper, curve_lines = [], []
    for scores in (_scores(state, width), _averages(state, width)):
        upper = [*head, *position, *blank, *table, *halves, *scores, *blank]
        curve_lines = _curves(state, width, rows - len(upper) - len(foot) - 1)
        if curve_lines:
            break
    for lines in (
        [*upper, *curve_lines, *blank, *foot] if curve_lines else [*upper, *foot],
        [*head, *position, *table, *halves, *foot],
        [*head, *position, *table, *foot],
        [*head, *table, *position],
        [*head[:2], *table, *head[2:], *position][:rows],
    ):
        if len(lines) <= rows:
            break
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines


def _title(state: RunState, width: int) -> Text:
    facts = state.facts
    name = Text.assemble(" ", (facts.name, "bold"), "  ", (state.status, "dim"))
    ranks = f", {facts.ranks} ranks" if facts.ranks > 1 else ""
    right = f"{formatting.count(facts.parameters)} parameters, {facts.devices}{ranks} "
    room = width - name.cell_len - len(right)
    if room >= 2:
        name.append(" " * room + right, style="dim")
    return name


def _bar(state: RunState, width: int) -> Text:
    steps = max(1, state.facts.steps)
    share = min(1.0, state.step / steps)
    label = f" {state.step}/{state.facts.steps} steps {100 * share:3.0f}% "
    columns = width - len(label) - 1
    if columns < 4:
        return Text(label)
    halves = int(share * columns * 2)
    done = "━" * (halves // 2) + "╸" * (halves % 2)
    return Text.assemble(
        " ", (done, "green"), ("─" * (columns - len(done)), "dim"), (label, "bold")
    )


def _speed(state: RunState) -> list[tuple[str, str]]:
    train = state.train
    fields = [
        ("elapsed", formatting.duration(state.elapsed_s())),
        ("left", formatting.duration(state.remaining_s())),
        ("tokens/s", formatting.count(train["tokens_per_second"] if train else None)),
    ]
    if train and train["mfu"] is not None:
        fields.append(("MFU", formatting.percent(train["mfu"])))
    if train:
        fields.append(("memory", formatting.size(train["memory_bytes"])))
        # Shown only when the loop did wait: then it is what to look at.
        if train["data_wait_s"] >= formatting.NOTABLE_WAIT_S:
            fields.append(("waited for data", f"{train['data_wait_s']:.1f} s"))
    return fields


def _position(state: RunState) -> list[tuple[str, str]]:
    train = state.train
    epochs = formatting.passes(state.facts.epochs)
    ar_passes = formatting.passes(state.facts.ar_passes)
    if train is None:
        return [("epochs", epochs), ("AR passes", ar_passes)]
    return [
        ("lr", f"{train['lr']:.2e}"),
        ("alpha", formatting.number(train["alpha"])),
        ("epoch", f"{train['epoch']:.2f} of {epochs}"),
        ("AR passes", f"{train['ar_passes']:.2f} of {ar_passes}"),
        ("gradient norm", formatting.number(train["grad_norm"])),
        *((name, formatting.number(value)) for name, value in train["logged"].items()),
    ]


def _footer(state: RunState) -> list[tuple[str, str]]:
    fields = [("run", state.facts.run_dir)]
    if state.checkpoint is not None:
        fields.append(("last checkpoint", PurePath(state.checkpoint["message"]).name))
    return fields


def _flow(fields: Sequence[tuple[str, str]], width: int) -> list[Text]:
    """Set label-value pairs one after another, in as many lines as they need."""
    lines: list[Text] = []
    for label, value in fields:
        item = Text.assemble((label, "dim"), " ", value)
        if lines and lines[-1].cell_len + len(_GAP) + item.cell_len < width:
            lines[-1].append(_GAP).append_text(item)
        else:
            lines.append(Text(" ").append_text(item))
    return lines


def _table(state: RunState, width: int) -> list[Text]:
    columns = [("train", 9), ("held-out", 10), ("bits/byte", 11), ("best held-out", 24)]
    while columns and 11 + sum(size for _, size in columns) > width:
        columns.pop()
    shown = dict(columns)
    header = "".join(f"{name:>{size}}" for name, size in columns if name != "best held-out")
    lines = [Text(" " * 11 + header, style="dim")]
    if "best held-out" in shown:
        lines[0].append("    best held-out")
    for objective, label, style in (
        ("ar", " AR loss", AR_STYLE),
        ("diffusion", " diffusion", DIFFUSION_STYLE),
    ):
        cells = _losses(state, objective)
        text = Text(f"{label:<11}", style=style)
        for name, size in columns:
            value_style = HELD_OUT_STYLE if name == "held-out" else "default"
            cell = f"    {cells[name]}" if name == "best held-out" else f"{cells[name]:>{size}}"
            text.append(cell, style=value_style)
        lines.append(text)
    return lines


def _losses(state: RunState, objective: str) -> dict[str, str]:
    train, held_out, best = state.train, state.held_out, state.best.get(objective)
    train_loss = None
    if train is not None:
        train_loss = train["ar_loss"] if objective == "ar" else train["diffusion_loss"]
    nats, bits = (None, None) if held_out is None else losses_of(held_out, objective)
    best_text = formatting.MISSING
    if best is not None:
        best_text = f"{formatting.loss(losses_of(best, objective)[0])} at step {best['step']}"
    return {
        "train": formatting.loss(train_loss),
        "held-out": formatting.loss(nats),
        "bits/byte": formatting.loss(bits),
        "best held-out": best_text,
    }


def _second_halves(state: RunState) -> list[tuple[str, str]]:
    """Prefix mode beside AR on the tokens it scores: a column of the table would mislead."""
    if state.held_out is None:
        return []
    change, error = prefix_difference(state.held_out), state.held_out.get("prefix_minus_ar_error")
    same = state.held_out.get("ar_nll_same_tokens")
    if change is None:
        return []
    return [
        ("second halves of documents: AR", formatting.loss(same)),
        ("prefix", formatting.loss(state.held_out.get("prefix_nll"))),
        ("", formatting.difference(change, error)),
    ]


def _scores(state: RunState, width: int) -> list[Text]:
    """The newest score on every task, a line or more for each mode."""
    lines: list[Text] = []
    for mode, record in state.scores.items():
        named = {name: task["score"] for name, task in record["tasks"].items()}
        if len(named) > 1:
            named["average"] = record["average"]
        fields = [(f"{mode} scores at step", str(record["step"]))]
        lines += _flow([*fields, *((n, formatting.score(s)) for n, s in named.items())], width)
    return lines


def _averages(state: RunState, width: int) -> list[Text]:
    """The same where there is little room."""
    return _flow(
        [
            (f"{mode} score", formatting.score(record["average"]))
            for mode, record in state.scores.items()
        ],
        width,
    )


def _curves(state: RunState, width: int, rows: int) -> list[Text]:
    """Both objectives' curves in at most ``rows`` lines: side by side, else one under the other."""
    each = (width - 1 - len(_GAP)) // 2
    beside = each >= _MIN_CURVE_WIDTH
    height = rows - 1 - _SPARE_ROWS if beside else (rows - 2) // 2
    height = min(height, _MAX_CURVE_ROWS)
    if height < _MIN_CURVE_ROWS or width < _MIN_CURVE_WIDTH:
        return []
    columns = each if beside else width - 1
    left = _curve(state, "ar", "AR loss", AR_STYLE, columns, height)
    right = _curve(state, "diffusion", "diffusion loss", DIFFUSION_STYLE, columns, height)
    if not beside:
        return [Text(" ").append_text(line) for line in (*left, *right)]
    return [
        Text(" ").append_text(one).append(_GAP).append_text(other)
        for one, other in zip(left, right, strict=True)
    ]


def _curve(
    state: RunState, objective: str, label: str, style: str, width: int, height: int
) -> list[Text]:
    title = Text.assemble(
        " " * (curves.LABEL_WIDTH + 1),
        (label, style),
        ("  • ", HELD_OUT_STYLE),
        ("held-out", "dim"),
    )
    title.truncate(width, pad=True)
    plot = curves.plot(
        state.points(objective),
        state.points(f"{objective} held-out"),
        width=width,
        height=height,
        line_style=style,
        mark_style=HELD_OUT_STYLE,
    )
    return [title, *plot]
