"""Puts the learning rate of the step into the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dualtrain.events import Algorithm, Event, Logger, State
from dualtrain.schedules import learning_rate_factor

if TYPE_CHECKING:
    from dualtrain.recipe.schema import ScheduleSection


class LearningRate(Algorithm):
    """Set ``state.learning_rate`` at each step: the peak, times the schedule's factor.

    The engine gives each parameter group that rate times its ``lr_scale`` before the update.

    Args:
        peak: The recipe's ``optim.lr``.
        schedule: The recipe's ``optim.schedule``.
    """

    def __init__(self, *, peak: float, schedule: ScheduleSection) -> None:
        self.peak, self.schedule = peak, schedule

    def match(self, event: Event, state: State) -> bool:
        return event is Event.STEP_START

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        factor = learning_rate_factor(self.schedule, state.step, state.steps)
        state.learning_rate = self.peak * factor

    def state_dict(self) -> dict[str, object]:
        # The rate is a function of the step.
        return {}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        return None
