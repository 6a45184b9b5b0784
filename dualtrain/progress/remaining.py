"""How long a run will still take."""

from __future__ import annotations

from collections import deque
from statistics import median

from dualtrain.progress.metrics import TrainRecord

WINDOW = 21


class RemainingTime:
    """Estimate the time left from train records.

    The rate of training is the median over recent intervals, so that neither compilation at the
    start nor one slow interval moves it; the time that evaluations and checkpoints took between
    records comes on top, as its average per step since the start of this process.
    """

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=WINDOW)
        self._last: TrainRecord | None = None
        self._paused_s = 0.0
        self._steps = 0

    def add(self, record: TrainRecord) -> None:
        """Take the next train record of this process."""
        last, self._last = self._last, record
        if last is None:
            return
        steps = record["step"] - last["step"]
        tokens = record["tokens"] - last["tokens"]
        elapsed = record["elapsed_s"] - last["elapsed_s"]
        speed = record["tokens_per_second"]
        if steps <= 0 or elapsed <= 0:
            return
        training = min(elapsed, tokens / speed) if speed else elapsed
        self._rates.append(training / steps)
        self._paused_s += elapsed - training
        self._steps += steps

    def seconds(self) -> float | None:
        """Return the seconds left at the time of the last record, or ``None`` while unknown."""
        if self._last is None:
            return None
        steps = self._last["steps"] - self._last["step"]
        if self._rates:
            return steps * (median(self._rates) + self._paused_s / self._steps)
        speed = self._last["tokens_per_second"]
        if not speed or not self._last["step"]:
            return None
        # One record so far: its own speed, at this run's tokens per step.
        return steps * self._last["tokens"] / self._last["step"] / speed
