"""What ``sweep``, ``fit`` and ``compare`` leave: tables on the terminal, and a directory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dualtrain.common.errors import UserError

WIDEST = 10_000


def new_table(*columns: str) -> Table:
    """A table without lines: text in the first column to the left, all else to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def show(table: Table, notes: Iterable[str] = ()) -> None:
    """Print a table as wide as it is, and notes below it.

    Rich cuts what does not fit; a terminal or a file loses nothing of lines that are too long.
    """
    console = Console(highlight=False, markup=False)
    console.width = WIDEST
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)


def with_interval(value: float | None, interval: Sequence[float] | None, form: str) -> str:
    """A number and its 95 % interval: ``-0.0181 (-0.0250, -0.0112)``.

    Args:
        value: None, or what is not finite, is shown as ``-``.
        interval: Its ends; None where there is none.
        form: Format of each number, such as ``+.4f``.
    """
    if value is None or not math.isfinite(value):
        return "-"
    if interval is None:
        return f"{value:{form}}"
    return f"{value:{form}} ({interval[0]:{form}}, {interval[1]:{form}})"


def make_directory(out: Path, *, may_exist: bool = False) -> None:
    """Make the directory that ``--out`` asks for.

    Raises:
        UserError: It is there already, or cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=may_exist)
    except FileExistsError:
        what = f"{out} is there already"
        raise UserError("--out", what, "a directory that is not there") from None
    except OSError as error:
        what = f"{out} cannot be made: {error.strerror}"
        raise UserError("--out", what, "a directory", "choose another place") from None
