"""Algorithms that the recipes of several tests name."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from dualtrain.algorithms.events import Algorithm, Event, Logger, State


class Recorder(Algorithm):
    """Write what every slot was trained on: its place, its sequences, its exact input."""

    def match(self, event: Event, state: State) -> bool:
        return event is Event.BEFORE_FORWARD

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        slot, example = state.slot, state.example
        data = [example.input_ids, example.targets, example.weights, example.document_ids]
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in data)).hexdigest()
        line = [state.step, slot.index, slot.objective, slot.stream, slot.first_sequence, digest]
        with Path(state.recipe.run_dir, f"slots-{state.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


class Average(Algorithm):
    """Has a state: scales the loss by a number that depends on all losses so far."""

    def __init__(self) -> None:
        self.mean = 0.0

    def match(self, event: Event, state: State) -> bool:
        return event is Event.AFTER_LOSS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self.mean = 0.9 * self.mean + 0.1 * float(state.loss.detach())
        state.loss = state.loss * (1 + 0.01 * self.mean)
        logger.log("average/mean", self.mean)

    def state_dict(self) -> dict[str, object]:
        return {"mean": self.mean}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        self.mean = state_dict["mean"]


class Surgeon(Algorithm):
    """Freezes the embedding, and adds a buffer that every loss is scaled by and that changes."""

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.AFTER_LOSS)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event is Event.INIT:
            state.model.get_input_embeddings().requires_grad_(False)
            state.model.register_buffer("scale", torch.ones(()))
            return
        state.model.scale += 0.01
        state.loss = state.loss * state.model.scale.detach()


class RankState(Algorithm):
    """Keeps something else on every rank."""

    def match(self, event: Event, state: State) -> bool:
        self.rank = state.rank
        return False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        raise AssertionError("never asked to")

    def state_dict(self) -> dict[str, object]:
        return {"rank": torch.tensor([self.rank])}


class FileSizeLimit(Algorithm):
    """Let no file of a rank grow beyond a size, from one step to another: a disk that is full."""

    def __init__(self, *, rank: int, first: int, last: int, size: int) -> None:
        self.rank, self.steps, self.size = rank, range(first, last), size

    def match(self, event: Event, state: State) -> bool:
        return event is Event.STEP_START and state.rank == self.rank

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = self.size if state.step in self.steps else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


class Spoil(Algorithm):
    """Make the loss NaN in one step."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def match(self, event: Event, state: State) -> bool:
        return event is Event.AFTER_LOSS and state.step == self.step

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        state.loss = state.loss * torch.nan


class Fail(Algorithm):
    """Fail on one rank in one step."""

    def __init__(self, *, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def match(self, event: Event, state: State) -> bool:
        here = state.rank == self.rank and state.step == self.step
        return event is Event.STEP_START and here

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        raise RuntimeError("the reason of the failure")


class Slow(Algorithm):
    """Give the test time to send a signal."""

    def __init__(self, *, seconds: float) -> None:
        self.seconds = seconds

    def match(self, event: Event, state: State) -> bool:
        return event is Event.STEP_START

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        time.sleep(self.seconds)


class ShardRemover(Algorithm):
    """Cut a shard to nothing when the first step begins, as a failing disk does."""

    def __init__(self, *, shard: str) -> None:
        self.shard = Path(shard)

    def match(self, event: Event, state: State) -> bool:
        return event is Event.STEP_START and state.step == 0

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        os.truncate(self.shard, 0)


class Keeper(Algorithm):
    """Write what an evaluation found."""

    def match(self, event: Event, state: State) -> bool:
        return event is Event.EVAL_END and state.rank == 0

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        with Path(state.recipe.run_dir, "found.jsonl").open("a") as file:
            file.write(json.dumps({"step": state.step, **state.metrics}) + "\n")


class Signal(Algorithm):
    """Send one rank a stop signal when a step ends: after the vote of that step."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def match(self, event: Event, state: State) -> bool:
        return event is Event.STEP_END and state.step == self.step and state.rank == 1

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class Shift(Algorithm):
    """Change initial values at INIT, as a user's algorithm may; keep what it found there."""

    def match(self, event: Event, state: State) -> bool:
        return event is Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        weight = state.model.head_projection.weight
        assert weight.shape == (32, 32)
        with torch.no_grad():
            weight.add_(torch.eye(32), alpha=0.5)
