"""The lowest held-out loss of a run: its checkpoint stays, and long after it a run may stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dualtrain.common.formatting import counted


@dataclass
class BestLoss:
    """Follows one held-out loss from evaluation to evaluation, across resumes.

    Attributes:
        objective: Whose loss: ``ar``, ``diffusion`` or ``prefix``; None follows none.
        patience: Evaluations without a lower one that are enough; None is never enough.
        value: The lowest so far, in nats per token; None before there is one.
        step: When it was found.
        waited: Evaluations since.
    """

    objective: str | None
    patience: int | None
    value: float | None = None
    step: int | None = None
    waited: int = 0

    @classmethod
    def of(cls, objective: str | None, patience: int | None, facts: Mapping[str, Any]) -> BestLoss:
        """Go on from what a checkpoint's ``state.json`` says of the same loss."""
        saved: dict[str, Any] = facts.get("best") or {}
        if saved.get("objective") != objective:
            saved = {}
        return cls(**(saved | {"objective": objective, "patience": patience}))

    def add(self, value: float, step: int) -> None:
        """Take the loss of an evaluation; one that is not finite is no lower."""
        if value < (float("inf") if self.value is None else self.value):
            self.value, self.step, self.waited = value, step, 0
        else:
            self.waited += 1

    @property
    def is_enough(self) -> bool:
        """Whether the run is to stop."""
        return self.patience is not None and self.waited >= self.patience

    def facts(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        names = ("objective", "value", "step", "waited")
        return {name: getattr(self, name) for name in names}

    def sentence(self) -> str:
        """What a user is told when it is enough."""
        times = counted(self.waited, "evaluation")
        if self.value is None:
            return f"no {self.objective} loss was finite in {times}"
        found = f"{self.objective} {self.value:.4f} of step {self.step}"
        return f"{times} without a lower loss than {found}"
