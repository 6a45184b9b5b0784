"""What the views are told: the facts of a run at its start, and the summary at its end."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from dualtrain.common import formatting
from dualtrain.progress.metrics import (
    EvalRecord,
    Record,
    SampleRecord,
    TasksRecord,
    losses_of,
    prefix_difference,
)

AR_STYLE = "cyan"
DIFFUSION_STYLE = "magenta"
PREFIX_STYLE = "green"
HELD_OUT_STYLE = "yellow"


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What does not change during a run.

    Args:
        devices: What it runs on, for people: ``CPU``, ``8 x NVIDIA H200``.
        tokens_per_step: Input tokens of a step, over all ranks.
        epochs: Passes over it planned, both objectives together.
        ar_passes: AR passes of a token planned, on average.
        first_step: Updates done before this process started (resumed runs).
        elapsed_s: Wall time the run took before this process started.
    """

    name: str
    run_dir: str
    devices: str
    ranks: int
    parameters: int
    steps: int
    tokens_per_step: int
    unique_tokens: int
    epochs: float
    ar_passes: float
    first_step: int = 0
    elapsed_s: float = 0.0

    def sentence(self) -> str:
        """Return the facts in one sentence, for views without a frame."""
        ranks = f"{self.ranks} rank" + ("s" if self.ranks > 1 else "")
        text = (
            f"{self.name}: {formatting.count(self.parameters)} parameters on {self.devices}, "
            f"{ranks}; {self.steps} steps of {self.tokens_per_step:,} tokens = "
            f"{formatting.passes(self.epochs)} passes over "
            f"{formatting.count(self.unique_tokens)} unique tokens, "
            f"{formatting.passes(self.ar_passes)} of them autoregressive; to {self.run_dir}"
        )
        if self.first_step:
            text += f"; continues after step {self.first_step}"
        return text


@dataclass(frozen=True, slots=True)
class Sample:
    """A generated text.

    Args:
        title: What made it: ``AR sample``, ``infilled``.
        pieces: The text in order, each piece with whether the model generated it.
    """

    title: str
    pieces: tuple[tuple[str, bool], ...]

    @property
    def marked(self) -> str:
        """The text, what the model generated in brackets."""
        return "".join(f"[{text}]" if generated else text for text, generated in self.pieces)

    def record(self, step: int) -> SampleRecord:
        """Make the record of ``metrics.jsonl``."""
        return SampleRecord(kind="sample", step=step, title=self.title, text=self.marked)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run ends with.

    Args:
        scores: The last scores on tasks, of each mode.
        written: What was written, label to path, in the order shown.
        next_commands: (command, what it does), in the order shown.
    """

    step: int
    tokens: int
    elapsed_s: float
    held_out: EvalRecord | None = None
    scores: Sequence[TasksRecord] = ()
    samples: Sequence[Sample] = ()
    written: dict[str, str] = field(default_factory=dict)
    next_commands: Sequence[tuple[str, str]] = ()
    outcome: str = "done"


class RunView:
    """A place that records are shown. Every method does nothing until a view needs it."""

    def start(self, facts: RunFacts, history: Sequence[Record]) -> None:
        """Begin; ``history`` holds the records of an earlier process of the same run."""

    def record(self, record: Record) -> None:
        """Show a record."""

    def tick(self, step: int) -> None:
        """Note that a step is done. Called every step, so it must cost nothing."""

    def status(self, text: str) -> None:
        """Say what the run is busy with."""

    def message(self, text: str) -> None:
        """Show a line for the user."""

    def finish(self, summary: Summary) -> None:
        """Show the end of the run."""

    def close(self) -> None:
        """Give back the terminal, or the file. Called once, whatever happened before."""


def summary_lines(summary: Summary, width: int) -> Iterator[Text]:
    """Lay out the summary; wrapped at ``width`` columns, paths and commands never broken."""
    time = formatting.duration(summary.elapsed_s)
    yield Text("")
    yield Text(
        f"{summary.outcome}: {summary.step} steps, {formatting.count(summary.tokens)} tokens, "
        f"{time}",
        style="bold",
    )
    if summary.held_out is not None:
        yield from _held_out(summary.held_out)
    if summary.scores:
        yield from _scores(summary.scores)
    for sample in summary.samples:
        yield from _sample(sample, width)
    if summary.written:
        yield from _heading("written")
        label_width = max(map(len, summary.written))
        for label, path in summary.written.items():
            yield Text.assemble(f"  {label:<{label_width}}  ", (path, "green"))
    if summary.next_commands:
        yield from _heading("next")
        for command, purpose in summary.next_commands:
            yield Text.assemble("  ", (command, "bold green"))
            yield Text(f"      {purpose}", style="dim")


def _heading(text: str) -> Iterator[Text]:
    yield Text("")
    yield Text(text, style="bold")


def _held_out(record: EvalRecord) -> Iterator[Text]:
    yield from _heading(f"held-out loss, {record['tokens']:,} tokens")
    for label, style, key in (
        ("AR", AR_STYLE, "ar"),
        ("diffusion", DIFFUSION_STYLE, "diffusion"),
    ):
        nats, bits = losses_of(record, key)
        yield Text.assemble(
            (f"  {label:<9}  ", style),
            f"{formatting.loss(nats)} nats/token   {formatting.loss(bits)} bits/byte",
        )
    change = prefix_difference(record)
    if change is not None:
        error = record.get("prefix_minus_ar_error")
        yield Text.assemble(
            ("  prefix     ", PREFIX_STYLE),
            f"{formatting.loss(record.get('prefix_nll'))} nats/token   "
            f"{formatting.loss(record.get('prefix_bits_per_byte'))} bits/byte",
        )
        shown = formatting.difference(change, error)
        yield Text(f"    second halves of documents: {shown} to AR there")


def _scores(records: Sequence[TasksRecord]) -> Iterator[Text]:
    """A table of tasks by modes."""
    step = max(record["step"] for record in records)
    # An evaluation may have been cut short before all of its modes had their turn.
    records = [record for record in records if record["step"] == step]
    tasks = list(records[0]["tasks"])
    found = {name: [record["tasks"][name] for record in records] for name in tasks}
    cells = {
        name: [(task["score"], task["score_low"], task["score_high"]) for task in row]
        for name, row in found.items()
    }
    if len(tasks) > 1:
        cells["average"] = [(r["average"], r["average_low"], r["average_high"]) for r in records]
    yield from _heading(
        f"scores on tasks at step {step} (0 is chance, 100 perfect; 95 % intervals)"
    )
    width = max(map(len, cells))
    header = "".join(f"{record['mode']:>22}" for record in records)
    yield Text(f"  {'':<{width}}{header}", style="dim")
    for name, row in cells.items():
        shown = "".join(f"{formatting.score(*cell):>22}" for cell in row)
        yield Text(f"  {name:<{width}}{shown}")


def _sample(sample: Sample, width: int) -> Iterator[Text]:
    yield Text("")
    yield Text.assemble((sample.title, "bold"), (" (generated text in brackets)", "dim"))
    width = max(20, min(width, 100) - 2)
    for paragraph in formatting.printable(sample.marked).split("\n"):
        for line in textwrap.wrap(paragraph, width, break_on_hyphens=False) or [""]:
            yield Text(f"  {line}")
