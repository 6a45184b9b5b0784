"""What ``dualtrain data`` shows: progress while it works, and tables of what it made."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from data_tools.reporting import Report, StageProgress
from dualtrain.common.files import in_utf8
from dualtrain.progress.bar import WorkBar

if TYPE_CHECKING:
    from data_tools.inspection import Bin
    from dualtrain.data.dataset import DatasetInfo
    from dualtrain.recipe.schema import BuildSection

_BAR = 30
_WIDTH = 120

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line on standard output as it is."""
    console.print(in_utf8(text), markup=False)


class ConversionView(Report):
    """Follows long work on standard error."""

    def __init__(self) -> None:
        self._bar = WorkBar()
        self.made = False
        """Whether a dataset was written, and not just found."""
        self._began = time.monotonic()
        self._first = StageProgress("", 0, 0, "documents")
        self.encoded = ""
        """How fast the last conversion encoded, in words; empty if none did."""

    def __enter__(self) -> ConversionView:
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def show(self, progress: StageProgress) -> None:
        self.made = self.made or progress.stage.startswith("writing")
        if progress.stage != self._first.stage:
            self._first, self._began = progress, time.monotonic()
            self._bar.begin(progress.stage)
        self._bar.update(progress.done, progress.total or None, self._facts(progress))

    def say(self, text: str) -> None:
        self._bar.say(text)

    def _facts(self, progress: StageProgress) -> str:
        if not progress.documents:
            if progress.unit == "bytes":
                return f"{_megabytes(progress.done)} of input"
            of = f" of {progress.total:,}" if progress.total else ""
            return f"{progress.done:,}{of} {progress.unit}"
        # Of this process alone: what an interrupted conversion had done took no time.
        read = progress.text_bytes - self._first.text_bytes
        speed = read / max(time.monotonic() - self._began, 1e-3) / 1e6
        self.encoded = f"{read / 1e6:,.1f} MB of text encoded at {speed:.1f} MB/s"
        return f"{progress.documents:,} documents, {progress.tokens:,} tokens, {speed:.1f} MB/s"


def build_with_view(build: BuildSection, path: Path, *, workers: int | None = None) -> bool:
    """Make a dataset unless it is there, showing how far it is, then what it holds.

    Returns:
        Whether it was made now.
    """
    from data_tools.convert import build_dataset
    from dualtrain.data.dataset import LEFT_OUT_FILE

    began = time.monotonic()
    with ConversionView() as view:
        info = build_dataset(build, path, workers=workers, report=view)
    if not view.made:
        return False
    print_facts(path, info)
    encoded = f"; {view.encoded}" if view.encoded else ""
    say(f"  made in {time.monotonic() - began:.1f} s{encoded}")
    if (path / LEFT_OUT_FILE).exists():
        say(f"  what could not be read is listed in {path / LEFT_OUT_FILE}")
    return True


def print_facts(place: str | Path, info: DatasetInfo) -> None:
    """Print what a dataset holds, as a table, and what its making left out."""
    say(f"{place}: vocabulary {info.vocab_size:,}, tokens as {info.dtype}")
    rows = [
        (
            name,
            f"{split.documents:,}",
            f"{split.tokens:,}",
            _megabytes(split.bytes),
            f"{split.bytes / split.tokens:.3f}",
        )
        for name, split in info.splits.items()
    ]
    _print_table(("split", "documents", "tokens", "text", "bytes/token"), rows, left="split")
    if info.left_out:
        say("  left out: " + ", ".join(f"{n:,} {reason}" for reason, n in info.left_out.items()))
    elif info.skipped_documents:
        say(f"  left out: {info.skipped_documents:,} empty")


def print_histogram(bins: Sequence[Bin]) -> None:
    """Print how many documents there are of which length, and the tokens in them."""
    most = max(row.documents for row in bins)
    total = sum(row.tokens for row in bins)
    rows = [
        (
            f"{row.first:,}-{row.last:,}" if row.last > row.first else f"{row.first:,}",
            f"{row.documents:,}",
            f"{row.tokens / total:.1%}",
            "#" * -(-row.documents * _BAR // most),
        )
        for row in bins
    ]
    _print_table(("tokens", "documents", "share of tokens", ""), rows, left="")


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: str) -> None:
    """Print a table, one of its columns aligned to the left."""
    table = Table(box=None, padding=(0, 1, 0, 2), header_style="")
    for name in columns:
        table.add_column(name, justify="left" if name == left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Where there is no terminal, rich would cut the columns at 80 characters.
    console.print(table, soft_wrap=False, width=None if console.is_terminal else _WIDTH)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"
