"""Stopping on request: one signal finishes the step and saves, a second one stops at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dualtrain.launch import show_cursor

# SIGHUP is what a closed terminal or a lost connection sends.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """What the ranks agree on at the end of each step.

    Signals reach the ranks at different moments, but all must stop after the same step. Each step
    ends with a vote on a process group of its own on the CPU; it is collected one step later, so
    nobody waits for it and no device is synchronised.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def agreed(self) -> bool:
        """Vote, and return whether the ranks agreed to stop; call once a step on every rank."""
        if self._group is None:
            return self.received is not None
        stop = False
        if self._pending is not None:
            work, votes = self._pending
            work.wait()
            stop = bool(votes.item())
        votes = torch.tensor([int(self.received is not None)])
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = (work, votes)
        return stop

    def close(self) -> None:
        """Collect the last vote, so that no communication is open when the group goes."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None


@contextmanager
def watch_signals(request: StopRequest) -> Iterator[None]:
    """Note the stop signals in ``request``; a second one ends this process at once."""

    def note(number: int, _frame: object) -> None:
        if request.received is not None:
            # Not sys.exit: a rank that hangs in a collective would never get to it.
            show_cursor()
            os._exit(128 + number)
        request.received = number

    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
