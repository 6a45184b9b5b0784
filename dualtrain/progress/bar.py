"""How far long work is: a bar on a terminal, else a line every half minute, on standard error."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from dualtrain.common import formatting
from dualtrain.common.files import in_utf8

_LINE_S = 30.0


class WorkBar:
    """Follows work that has one part after another, as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bars.add_task("", total=None, facts="")
        self.begin("")

    def __enter__(self) -> WorkBar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Show a line, above the bar."""
        self._console.print(in_utf8(text), markup=False)

    def begin(self, what: str) -> None:
        """Say what is being done now."""
        self._what = in_utf8(what)
        self._began = self._printed = time.monotonic()
        self._bars.reset(self._task, description=self._what, total=None, facts="")

    def update(self, done: int, total: int | None, facts: str = "") -> None:
        """Say how much of it is done.

        Args:
            total: None where nobody knows.
            facts: Takes the place of "DONE of TOTAL".
        """
        facts = facts or (f"{done:,} of {total:,}" if total else f"{done:,}")
        if self._console.is_terminal:
            self._bars.update(self._task, completed=done, total=total, facts=facts)
            return
        now = time.monotonic()
        if now - self._printed < _LINE_S:
            return
        self._printed = now
        if total and 0 < done < total:
            left_s = (now - self._began) * (total - done) / done
            facts += f", about {formatting.duration(left_s)} left"
        self.say(f"{self._what}: {facts}")
