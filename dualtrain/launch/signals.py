"""Stopping on request, and the one vote that the ranks hold in every step.

One signal finishes the step and saves; a second one ends the process at once. Signals reach the
ranks at different moments, and a loss may be bad on one rank alone, but all ranks must do the same:
so ``train`` has them vote before each update (:class:`StepVote`).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dualtrain.launch.ranks import SAME_SIGNAL_S, show_cursor

# SIGHUP is what a closed terminal or a lost connection sends.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Verdict:
    """What the ranks agreed on in a step.

    Attributes:
        stop: A rank has received a stop signal: save after this step and leave.
        non_finite: A rank has a slot whose loss is not finite: no update from this step.
    """

    stop: bool
    non_finite: bool


class StepVote:
    """The vote of a step: two flags, the larger of each over all ranks.

    It is taken on the CPU, in a process group of its own, while the device still works on the
    step's last backward pass: neither the device nor its communication waits for it.

    Args:
        timeout_s: Longest wait for the other ranks, seconds.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self.signal_received: int | None = None
        self.signal_at: float | None = None
        self.is_acknowledged = False
        several = dist.is_initialized() and dist.get_world_size() > 1
        timeout = timedelta(seconds=timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if several else None

    def take(self, *, non_finite: bool) -> Verdict:
        """Vote; every rank calls this once a step.

        Args:
            non_finite: Whether a slot of this rank has a loss that is not finite.
        """
        stop = self.signal_received is not None
        if self._group is None:
            return Verdict(stop, non_finite)
        flags = torch.tensor([stop, non_finite], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return Verdict(*(bool(flag) for flag in flags.tolist()))

    def gather(self, mine: object) -> list:
        """Collect a picklable object of every rank, in rank order, on every rank."""
        if self._group is None:
            return [mine]
        everyone: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone


@contextmanager
def watch_signals(vote: StepVote) -> Iterator[None]:
    """Note the stop signals for ``vote``; a second one ends this process at once."""

    def note(number: int, _frame: object) -> None:
        first, vote.signal_at = vote.signal_at, time.monotonic()
        if first is not None and vote.signal_at - first < SAME_SIGNAL_S:
            vote.signal_at = first
        elif first is not None:
            # Not sys.exit: a rank that hangs in a collective would never get to it.
            show_cursor()
            os._exit(128 + number)
        else:
            vote.signal_received = number

    # What is ignored already stays so: nohup asks for it.
    watched = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in watched}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
