"""The live view of a terminal, redrawn in place with rich; ``frame`` says what it shows."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from dualtrain.common import formatting
from dualtrain.progress.frame import STARTING, TRAINING, RunState, frame
from dualtrain.progress.metrics import Record
from dualtrain.progress.report import RunFacts, RunView, Summary, summary_lines

REFRESH_PER_SECOND = 2


class _ResizingLive(Live):
    """A live display that survives a terminal made smaller.

    rich goes back up by the number of lines it printed; once the terminal has wrapped those lines
    that is too few, and their remains would stay on the screen. Nothing but a cleared screen helps.
    """

    _size: ConsoleDimensions | None = None

    def refresh(self) -> None:
        size, last = self.console.size, self._size
        self._size = size
        if last is not None and (size.width < last.width or size.height < last.height):
            self.console.clear()
        super().refresh()


class LiveView(RunView):
    """Redraw the state in place; messages scroll by above it.

    Args:
        console: A rich console on the terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._state: RunState | None = None
        self._live: Live | None = None
        self._drawn = 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Called at every redraw, so the layout follows the terminal's size.
        if self._state is not None:
            yield from frame(self._state, options.max_width, options.size.height)

    def start(self, facts: RunFacts, history: Sequence[Record]) -> None:
        self._state = RunState(facts, step=facts.first_step)
        for record in history:
            self._state.add(record, now=False)
        self._live = _ResizingLive(
            self,
            console=self._console,
            refresh_per_second=REFRESH_PER_SECOND,
            vertical_overflow="crop",
        )
        self._live.start(refresh=True)

    def record(self, record: Record) -> None:
        if self._state is None or self._live is None:
            return
        self._state.add(record)
        # rich's own thread redraws as well, but only here is a lost terminal noticed.
        if time.monotonic() - self._drawn >= 1 / REFRESH_PER_SECOND:
            self._drawn = time.monotonic()
            self._live.refresh()

    def tick(self, step: int) -> None:
        if self._state is not None:
            self._state.step = step
            if self._state.status == STARTING:
                self._state.status = TRAINING

    def status(self, text: str) -> None:
        if self._state is not None:
            self._state.status = text

    def message(self, text: str) -> None:
        self._console.print(Text(formatting.printable(text)))

    def finish(self, summary: Summary) -> None:
        self.status(summary.outcome)
        self.close()
        for line in summary_lines(summary, self._console.width):
            self._console.print(line, soft_wrap=True)

    def close(self) -> None:
        if self._live is None:
            return
        if self._state is not None:
            self._state.stopped = time.monotonic()
        live, self._live = self._live, None
        live.stop()
