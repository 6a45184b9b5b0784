"""Stop signals: the first asks for the end, a second one ends at once.

So it is for a rank, for the process that started the ranks, and for a sweep of runs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

# SIGHUP is what a closed terminal or a lost connection sends.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

SAME_SIGNAL_S = 1.0
"""Within this time of the first stop signal, another one is the same.

What stops a job often signals all of its processes, so that one is reached both directly and by
its parent, which passes on what reached it.
"""


class StopSignals:
    """Counts the stop signals that reach this process while the context is entered.

    What is ignored already stays so: nohup asks for it.

    Args:
        on_signal: Called with the number of each signal that counts.

    Attributes:
        count: 1 after a request to stop; 2 or more when it must end at once.
        last: The number of the newest signal; 0 before the first.
    """

    def __init__(self, on_signal: Callable[[int], None] = lambda number: None) -> None:
        self.count, self.last = 0, 0
        self._on_signal = on_signal
        self._at: float | None = None

    def __enter__(self) -> StopSignals:
        watched = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in watched}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # At once, since another signal may interrupt this very function.
        before, self._at = self._at, time.monotonic()
        if before is not None and self._at - before < SAME_SIGNAL_S:
            self._at = before
            return
        self.count, self.last = self.count + 1, number
        self._on_signal(number)


def show_cursor() -> None:
    """Give a terminal its cursor back, which a live view that is killed has hidden."""
    if os.isatty(1):
        os.write(1, b"\x1b[?25h")
