"""A line plot in a few terminal rows, drawn with braille dots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from rich.text import Text

Point = tuple[float, float]

_CAPACITY = 4096
_BLANK = 0x2800
# The bit of a braille dot by its row (from the top) and column in the cell.
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
LABEL_WIDTH = 6


@dataclass
class Series:
    """The history of one number, thinned by halves so that a long run stays small."""

    points: list[Point] = field(default_factory=list)
    _stride: int = 1
    _pending: list[Point] = field(default_factory=list)

    def add(self, x: float, y: float | None) -> None:
        """Add a value; ``None`` is left out."""
        if y is None:
            return
        self._pending.append((x, y))
        if len(self._pending) < self._stride:
            return
        points = [*self.points, _average(self._pending)]
        self._pending = []
        if len(points) >= _CAPACITY:
            points = [_average(points[i : i + 2]) for i in range(0, len(points), 2)]
            self._stride *= 2
        # A new list: the view's thread may be reading the old one.
        self.points = points


def _average(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def plot(
    line: Sequence[Point],
    marks: Sequence[Point],
    *,
    width: int,
    height: int,
    line_style: str = "",
    mark_style: str = "",
) -> list[Text]:
    """Draw a line and some marked points over it.

    Args:
        line: (x, y) in increasing x, joined by a line.
        marks: (x, y), each drawn as one bullet, over the line.
        width: Columns of the result, its axis labels included; at least ``LABEL_WIDTH + 2``.

    Returns:
        ``height`` lines of ``width`` columns: greatest and smallest value at the left, then the
        plot from the first x to the last.
    """
    columns = max(1, width - LABEL_WIDTH - 1)
    values = [y for _, y in (*line, *marks)]
    if not values:
        return [Text(" " * width) for _ in range(height)]
    low, high = min(values), max(values)
    xs = [x for x, _ in (*line, *marks)]
    first, last = min(xs), max(xs)
    x_span, y_span = (last - first) or 1.0, (high - low) or 1.0

    cells = np.zeros((height, columns), dtype=int)
    if line:
        heights = _resample(line, first, x_span, 2 * columns)
        _draw(cells, [None if y is None else (high - y) / y_span for y in heights])
    marked = {
        (
            round((high - y) / y_span * (height - 1)),
            round((x - first) / x_span * (columns - 1)),
        )
        for x, y in marks
    }
    labels = {0: _label(high), height - 1: _label(low)}
    return [
        _row(labels.get(row, ""), cells[row], row, marked, line_style, mark_style)
        for row in range(height)
    ]


def _row(
    label: str,
    cells: np.ndarray,
    row: int,
    marked: set[tuple[int, int]],
    line_style: str,
    mark_style: str,
) -> Text:
    text = Text.assemble((f"{label:>{LABEL_WIDTH}} ", "dim"))
    # Runs of one style: an escape sequence for every character would make the frame flicker.
    for is_mark, run in groupby(range(len(cells)), lambda column: (row, column) in marked):
        if is_mark:
            text.append("•" * len(list(run)), style=mark_style)
        else:
            dots = (chr(_BLANK + int(cells[column])) for column in run)
            text.append("".join(dots).replace(chr(_BLANK), " "), style=line_style)
    return text


def _resample(line: Sequence[Point], first: float, span: float, columns: int) -> list[float | None]:
    """Return the line's height at each dot column: the mean where it has values, else between."""
    x, y = np.array(line, dtype=float).T
    bins = np.round((x - first) / span * (columns - 1)).astype(int)
    number = np.bincount(bins, minlength=columns)
    total = np.bincount(bins, weights=y, minlength=columns)
    filled = np.flatnonzero(number)
    between = np.interp(np.arange(columns), filled, total[filled] / number[filled])
    inside = range(filled[0], filled[-1] + 1)
    return [float(between[c]) if c in inside else None for c in range(columns)]


def _draw(cells: np.ndarray, depths: Sequence[float | None]) -> None:
    """Set the dots of a line whose depth below the top, as a share, is given per dot column."""
    dots = cells.shape[0] * 4
    previous: int | None = None
    for column, depth in enumerate(depths):
        if depth is None:
            continue
        row = round(depth * (dots - 1))
        # Join steep steps, half of each in its own column would be finer than anyone sees.
        start = row if previous is None else previous + (row > previous) - (row < previous)
        for dot in range(min(start, row), max(start, row) + 1):
            cells[dot // 4, column // 2] |= _DOTS[dot % 4, column % 2]
        previous = row


def _label(value: float) -> str:
    if abs(value) >= 1000 or 1e-9 < abs(value) < 0.01:
        return f"{value:.0e}"[:LABEL_WIDTH]
    return f"{value:.2f}"[:LABEL_WIDTH]
