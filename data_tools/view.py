"""What ``dualtrain data`` shows: progress while it works, and tables of what it made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from data_tools.reporting import Report, StageProgress
from dualtrain.common.files import in_utf8

if TYPE_CHECKING:
    from data_tools.inspection import Bin
    from dualtrain.data.dataset import DatasetInfo

_LINE_S = 30.0
_BAR = 30
_WIDTH = 120

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line on standard output as it is."""
    console.print(in_utf8(text), markup=False)


class ConversionView(Report):
    """Follows long work on standard error: a bar in a terminal, else a line every half minute."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bars.add_task("starting", total=None, facts="")
        self._stage = ""
        self.made = False
        """Whether a dataset was written, and not just found."""
        self._began = self._printed = time.monotonic()
        self._first = StageProgress("", 0, 0, "documents")
        self.encoded = ""
        """How fast the last conversion encoded, in words; empty if none did."""

    def __enter__(self) -> ConversionView:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def show(self, progress: StageProgress) -> None:
        now = time.monotonic()
        self.made = self.made or progress.stage.startswith("writing")
        if progress.stage != self._stage:
            self._stage, self._first = progress.stage, progress
            self._began = self._printed = now
            self._bars.reset(self._task, description=progress.stage, total=None)
        facts = self._facts(progress, now - self._began)
        if not self._console.is_terminal:
            if now - self._printed >= _LINE_S:
                self._printed = now
                share = f"{progress.done / progress.total:.0%} " if progress.total else ""
                self._console.print(f"{progress.stage}: {share}{facts}", markup=False)
            return
        self._bars.update(
            self._task, completed=progress.done, total=progress.total or None, facts=facts
        )

    def say(self, text: str) -> None:
        self._bars.console.print(in_utf8(text), markup=False)

    def _facts(self, progress: StageProgress, elapsed_s: float) -> str:
        if not progress.documents:
            if progress.unit == "bytes":
                return f"{_megabytes(progress.done)} of input"
            of = f" of {progress.total:,}" if progress.total else ""
            return f"{progress.done:,}{of} {progress.unit}"
        # Of this process alone: what an interrupted conversion had done took no time.
        read = progress.text_bytes - self._first.text_bytes
        speed = read / max(elapsed_s, 1e-3) / 1e6
        self.encoded = f"{read / 1e6:,.1f} MB of text encoded at {speed:.1f} MB/s"
        return f"{progress.documents:,} documents, {progress.tokens:,} tokens, {speed:.1f} MB/s"


def print_facts(place: str | Path, info: DatasetInfo) -> None:
    """Print what a dataset holds, as a table, and what its making left out."""
    say(f"{place}: vocabulary {info.vocab_size:,}, tokens as {info.dtype}")
    table = Table(box=None, padding=(0, 1, 0, 2), header_style="")
    for name in ("split", "documents", "tokens", "text", "bytes/token"):
        table.add_column(name, justify="left" if name == "split" else "right", no_wrap=True)
    for name, split in info.splits.items():
        table.add_row(
            name,
            f"{split.documents:,}",
            f"{split.tokens:,}",
            _megabytes(split.bytes),
            f"{split.bytes / split.tokens:.3f}",
        )
    # Where there is no terminal, rich would cut the columns at 80 characters.
    console.print(table, soft_wrap=False, width=None if console.is_terminal else _WIDTH)
    if info.left_out:
        say("  left out: " + ", ".join(f"{n:,} {reason}" for reason, n in info.left_out.items()))
    elif info.skipped_documents:
        say(f"  left out: {info.skipped_documents:,} empty")


def print_histogram(bins: Sequence[Bin]) -> None:
    """Print how many documents there are of which length, and the tokens in them."""
    most = max(row.documents for row in bins)
    table = Table(box=None, padding=(0, 1, 0, 2), header_style="")
    for name in ("tokens", "documents", "share of tokens", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    total = sum(row.tokens for row in bins)
    for row in bins:
        table.add_row(
            f"{row.first:,}-{row.last:,}" if row.last > row.first else f"{row.first:,}",
            f"{row.documents:,}",
            f"{row.tokens / total:.1%}",
            "#" * -(-row.documents * _BAR // most),
        )
    console.print(table, soft_wrap=False, width=None if console.is_terminal else _WIDTH)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"
