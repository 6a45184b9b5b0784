"""Algorithms that the recipes of test_in_training.py name."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from helpers.run_workers import _Stateless

from dualtrain.algorithms.events import Event, Logger, State


class Keeper(_Stateless):
    """Write what an evaluation found."""

    def match(self, event: Event, state: State) -> bool:
        return event is Event.EVAL_END and state.rank == 0

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        with Path(state.recipe.run_dir, "found.jsonl").open("a") as file:
            file.write(json.dumps({"step": state.step, **state.metrics}) + "\n")


class Signal(_Stateless):
    """Send one rank a stop signal when a step ends: after the vote of that step."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def match(self, event: Event, state: State) -> bool:
        return event is Event.STEP_END and state.step == self.step and state.rank == 1

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
