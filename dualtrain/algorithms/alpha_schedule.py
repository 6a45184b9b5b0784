"""Puts the AR share of the step into the state."""

from __future__ import annotations

from collections.abc import Mapping

from dualtrain.events import Algorithm, Event, Logger, State


class AlphaSchedule(Algorithm):
    """Set ``state.alpha`` at each step, for the records and for algorithms that go by it.

    The mixture is what decides: data is prepared ahead of the loop, so which slots a step has must
    be known before the step begins. This copies its alpha and cannot disagree with it.
    """

    def match(self, event: Event, state: State) -> bool:
        return event is Event.STEP_START

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        state.alpha = float(state.mixture.alpha_at(state.step))

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        return None
