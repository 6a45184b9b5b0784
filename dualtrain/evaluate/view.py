"""What ``dualtrain eval`` shows while it works: a bar on a terminal, else lines now and then."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from dualtrain.common import formatting

_LINE_S = 30.0


class View:
    """Follows the work on standard error."""

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
        self._what = ""
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> View:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Show a line."""
        self._bars.console.print(text, markup=False)

    def begin(self, what: str) -> None:
        """Say what is being done now."""
        self._what = what
        self._began = self._printed = time.monotonic()
        self._bars.reset(self._task, description=what, total=None, facts="")

    def progress(self, done: int, total: int) -> None:
        """Say how much of it is done."""
        now = time.monotonic()
        facts = f"{done:,} of {total:,}"
        if self._console.is_terminal:
            self._bars.update(self._task, completed=done, total=total, facts=facts)
        elif now - self._printed >= _LINE_S and 0 < done < total:
            self._printed = now
            left = (now - self._began) * (total - done) / done
            self.say(f"{self._what}: {facts}, about {formatting.duration(left)} left")
