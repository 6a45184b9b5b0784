"""Losses that are not finite: found before they reach the weights, and written down.

``train`` gives every slot's loss to a :class:`LossWatch`. Before the update of a step the ranks
vote on whether one was NaN or infinite (``signals.StepVote``); then the step is either left out
(:func:`discard_step`) or ends the run with a report (:func:`write_report`) of the step's slots,
their losses, and the documents of the bad ones. Nothing else need be kept: a run is a pure function
of its step, so the same command meets the step again, bit for bit, from the newest checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dualtrain.common.errors import UserError
from dualtrain.common.files import write_json
from dualtrain.method.mixing import Slot

if TYPE_CHECKING:
    from dualtrain.data.batches import Batch
    from dualtrain.training.run import Run

DIRECTORY = "non-finite"
FORMAT = 3

Cause = Literal["loss", "gradient"]


class NonFiniteLoss(Exception):
    """A loss or a gradient became NaN or infinite; the run stops and keeps its last checkpoint."""


@dataclass(frozen=True)
class SlotLoss:
    """What one slot of a step came to.

    Attributes:
        documents: Per row, the numbers in the dataset of its documents.
    """

    slot: Slot
    documents: tuple[tuple[int, ...], ...]
    loss: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss)


class LossWatch:
    """The losses of this rank's slots in one step, on their way to the host.

    They are put side by side on the device and copied all at once, behind the last slot's forward
    pass and ahead of its backward pass. So when the host asks for them, the device still has a
    backward pass to work on: nothing is synchronised.
    """

    def __init__(self, slots: int, device: torch.device, *, skipped: int = 0) -> None:
        self.skipped = skipped
        # float64 holds every float32 exactly, so that the same step can be compared to the bit.
        self._losses = torch.zeros(slots, dtype=torch.float64, device=device)
        self._host, self._arrived = self._losses, None
        if device.type == "cuda":
            self._host = torch.zeros(slots, dtype=torch.float64, pin_memory=True)
            self._arrived = torch.cuda.Event(blocking=True)
        self._slots: list[tuple[Slot, Batch]] = []

    def start_step(self) -> None:
        """Forget the last step."""
        self._slots.clear()

    def add(self, slot: Slot, batch: Batch, loss: Tensor) -> None:
        """Note a slot's loss before its backward pass. Never waits for the device.

        Args:
            loss: () on the device, what backward is about to start from.
        """
        self._losses[len(self._slots)].copy_(loss.detach())
        self._slots.append((slot, batch))
        if self._arrived is not None and len(self._slots) == len(self._losses):
            self._host.copy_(self._losses, non_blocking=True)
            self._arrived.record()

    def non_finite(self) -> bool:
        """Whether a slot of this rank is bad; waits for the last forward pass of the step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return not bool(self._host.isfinite().all())

    def slots(self) -> list[SlotLoss]:
        """This rank's slots of the step, once :meth:`non_finite` has been asked."""
        return [
            SlotLoss(slot, batch.documents, loss)
            for (slot, batch), loss in zip(self._slots, self._host.tolist(), strict=True)
        ]


def describe(ranks: list[list[SlotLoss]], *, cause: Cause) -> str:
    """Say what was not finite, in a sentence; ``ranks`` holds the slots of each rank."""
    if cause == "gradient":
        return "every loss was finite, but the gradient was not"
    bad = [(slot, rank) for rank, slots in enumerate(ranks) for slot in slots if not slot.is_finite]
    first, rank = min(bad, key=lambda found: found[0].slot.index)
    others = f", and {len(bad) - 1} more of its losses not finite" if len(bad) > 1 else ""
    where = f"slot {first.slot.index} (rank {rank})"
    return f"the {first.slot.objective} loss of {where} was {first.loss}{others}"


def write_report(run: Run, ranks: list[list[SlotLoss]], *, cause: Cause) -> str:
    """Write down the step that is not finite."""
    path = run.run_dir / DIRECTORY / f"step-{run.state.step:08d}.json"
    if run.world.rank == 0:
        try:
            path.parent.mkdir(exist_ok=True)
            write_json(path, _facts(run, ranks, cause))
        except (OSError, UserError) as error:
            return f"The report could not be written: {error}"
    return f"The step's slots, losses and documents are in {path}"


def _facts(run: Run, ranks: list[list[SlotLoss]], cause: Cause) -> dict[str, object]:
    """What ``report.json`` holds."""
    slots = [_slot_facts(slot, rank) for rank, slots in enumerate(ranks) for slot in slots]
    device = run.state.device
    return {
        "format": FORMAT,
        "step": run.state.step,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cause": cause,
        "ranks": run.world.world_size,
        "zero_stage": run.zero_stage,
        "precision": run.recipe.engine.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dataset": run.fingerprint,
        "checkpoint": None if run.last_saved is None else str(run.last_saved),
        "slots": sorted(slots, key=lambda slot: slot["slot"]),
    }


def _slot_facts(found: SlotLoss, rank: int) -> dict[str, Any]:
    slot = found.slot
    facts: dict[str, Any] = {
        "slot": slot.index,
        "rank": rank,
        "objective": slot.objective,
        "stream": slot.stream,
        "first_sequence": slot.first_sequence,
        # JSON has no NaN and no infinity.
        "loss": found.loss if found.is_finite else str(found.loss),
    }
    if not found.is_finite:
        facts["documents"] = found.documents
    return facts
