"""The losses of a step's slots, watched for NaN and infinity without waiting for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dualtrain.method.mixing import Slot

if TYPE_CHECKING:
    from dualtrain.data.batches import Batch

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
