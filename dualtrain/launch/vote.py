"""The one vote that the ranks hold in every step: whether to stop, and whether to update.

Signals reach the ranks at different moments, and a loss may be bad on one rank alone, but all ranks
must do the same: so ``train`` has them vote before each update.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dualtrain.launch.stop import StopSignals, show_cursor


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

    Attributes:
        signals: To be entered; a second one ends this process at once.
        is_acknowledged: Whether the user has been told that the first one has arrived.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self.signals = StopSignals(self._leave_on_second)
        self.is_acknowledged = False
        several = dist.is_initialized() and dist.get_world_size() > 1
        timeout = timedelta(seconds=timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if several else None

    def take(self, *, non_finite: bool) -> Verdict:
        """Vote, with whether a slot of this rank has a loss that is not finite; all ranks call."""
        stop = self.signals.count > 0
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

    def _leave_on_second(self, number: int) -> None:
        if self.signals.count > 1:
            # Not sys.exit: a rank that hangs in a collective would never get to it.
            show_cursor()
            os._exit(128 + number)
