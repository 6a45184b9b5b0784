"""Algorithms that make a slot's loss or gradient not finite, and functions run on real ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dualtrain.algorithms.events import Algorithm, Event, Logger, State


class _AtSlot(Algorithm):
    """Acts at one event of the given steps, on one slot."""

    event = Event.AFTER_LOSS

    def __init__(self, *, step: int, slot: int) -> None:
        self.step, self.slot = step, slot

    def match(self, event: Event, state: State) -> bool:
        if event is not self.event or state.step != self.step:
            return False
        return state.slot is not None and state.slot.index == self.slot


class SpoilLoss(_AtSlot):
    """Make a loss NaN after the model, and log a NaN beside it."""

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        state.loss = state.loss * torch.nan
        logger.log("spoilt", float("nan"))


class SpoilInput(_AtSlot):
    """Give the model a token id whose embedding overflows."""

    event = Event.BEFORE_FORWARD

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        weights = state.example.weights.clone()
        weights.view(-1)[weights.view(-1).nonzero()[0]] = torch.inf
        state.example.weights = weights


class SpoilGradient(_AtSlot):
    """Leave the loss as it is, but give it a slope that is infinite."""

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        state.loss = state.loss + (state.loss - state.loss.detach()).sqrt()


class Drift(Algorithm):
    """Has a state, which every slot changes, and draws from torch's global generator."""

    def __init__(self) -> None:
        self.mean = 0.0

    def match(self, event: Event, state: State) -> bool:
        return event is Event.AFTER_LOSS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self.mean = 0.9 * self.mean + 0.1 * state.slot.index + float(torch.rand(()))
        state.loss = state.loss * (1 + 0.01 * self.mean)

    def state_dict(self) -> dict[str, object]:
        return {"mean": self.mean}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        self.mean = state_dict["mean"]


def run_all(cases: list[tuple[str, tuple[int, ...]]]) -> list[int]:
    """Run recipes one after another on these ranks; of some, steps are never taken.

    Args:
        cases: Resolved recipes, each with the steps that are left out as if they were not there:
            their data is passed over, nothing is computed.
    """
    import yaml

    from dualtrain.engine.process import (
        init_distributed,
        leave_distributed,
        prepare_process,
    )
    from dualtrain.recipe.schema import Recipe
    from dualtrain.training.train import train

    prepare_process(compile_model=False)
    init_distributed(timeout_s=600)
    codes = []
    for text, without in cases:
        recipe = Recipe.model_validate(yaml.safe_load(text))
        codes.append(_train_without(recipe, without) if without else train(recipe, view="none"))
    leave_distributed()
    return codes


def _train_without(recipe, without: tuple[int, ...]) -> int:
    from dualtrain.training.assemble import assemble
    from dualtrain.training.train import finish_step, train_step

    run = assemble(recipe, view="none")
    while run.state.step < run.state.steps:
        if run.state.step in without:
            for _ in range(run.slots_per_rank):
                next(run.batches)
            run.state.step += 1
        else:
            train_step(run)
        finish_step(run, stop=False)
    run.close()
    run.engine.destroy()
    return 0


def vote() -> list[tuple[bool, bool]]:
    """Vote with rank 1 alone asking for a stop, then rank 0 alone having a bad slot."""
    import torch.distributed as dist

    from dualtrain.engine.process import (
        init_distributed,
        leave_distributed,
    )
    from dualtrain.launch.vote import StepVote

    init_distributed(timeout_s=600)
    rank, ballot = dist.get_rank(), StepVote(timeout_s=600)
    verdicts = []
    if rank == 1:
        ballot.signals.count = 1
    verdicts.append(ballot.take(non_finite=False))
    ballot.signals.count = 0
    verdicts.append(ballot.take(non_finite=rank == 0))
    verdicts.append(ballot.take(non_finite=False))
    del ballot
    leave_distributed()
    return [(verdict.stop, verdict.non_finite) for verdict in verdicts]
