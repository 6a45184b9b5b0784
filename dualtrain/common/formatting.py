"""Numbers as people read them, shared by the live view, the plain lines and the summary."""

from __future__ import annotations

import unicodedata

MISSING = "-"
# A shorter wait for data in an interval is not worth a reader's attention.
NOTABLE_WAIT_S = 0.1


def count(value: float | None) -> str:
    """Format a count with three digits and a decimal suffix: 950, 12.3k, 4.19M."""
    if value is None:
        return MISSING
    for limit, suffix in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "G"), (1e15, "T")):
        # 999.5 and above would print as 1000 with this suffix.
        if value < limit * 0.9995 or suffix == "T":
            scaled = value / (limit / 1e3)
            if suffix == "":
                return f"{scaled:.0f}"
            return f"{scaled:#.3g}".rstrip(".") + suffix
    raise AssertionError("unreachable: T takes every value")


def counted(number: float, noun: str) -> str:
    """Format a number of things: 1 point, 3 points."""
    return f"{number:g} {noun}{'s' * (number != 1)}"


def duration(seconds: float | None) -> str:
    """Format a duration as m:ss, h:mm:ss, or with days in front."""
    if seconds is None:
        return MISSING
    minutes, second = divmod(int(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}:{minute:02}:{second:02}"
    if hours:
        return f"{hours}:{minute:02}:{second:02}"
    return f"{minute}:{second:02}"


def size(value: float | None) -> str:
    """Format a number of bytes in MiB or GiB."""
    if value is None:
        return MISSING
    if value < 1000 * 2**20:
        return f"{value / 2**20:.0f} MiB"
    return f"{value / 2**30:,.1f} GiB"


def loss(value: float | None) -> str:
    """Format a loss in nats, or bits per byte, with four decimals as far as they are seen."""
    if value is None:
        return MISSING
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def difference(value: float | None, error: float | None) -> str:
    """Format a difference of two losses with its standard error."""
    if value is None:
        return MISSING
    return f"{value:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def score(value: float, low: float | None = None, high: float | None = None) -> str:
    """Format a task's score, with its interval if that is given."""
    if low is None or high is None:
        return f"{value:.1f}"
    return f"{value:.1f} ({low:.1f}, {high:.1f})"


def number(value: float | None) -> str:
    """Format any number with four digits."""
    return MISSING if value is None else f"{value:.4g}"


def percent(value: float | None) -> str:
    """Format a share as a percentage with one decimal."""
    return MISSING if value is None else f"{100 * value:.1f}%"


def passes(value: float) -> str:
    """Format a number of passes or epochs: two decimals, none for a whole number of 10 and more."""
    return f"{value:.0f}" if value >= 10 and value == int(value) else f"{value:.2f}"


def printable(text: str) -> str:
    """Return text that cannot move the cursor: a model may well generate escape sequences."""
    return "".join(
        char if char == "\n" or unicodedata.category(char)[0] != "C" else " " for char in text
    )
