"""A run: all that the loop works with, on one rank. ``assemble`` makes it, ``train`` drives it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dualtrain.algorithms.events import Dispatcher, Event, State
from dualtrain.data.batches import ValidationData
from dualtrain.data.dataset import TokenDataset
from dualtrain.data.prefetch import Prefetcher
from dualtrain.derived.derive import Derived
from dualtrain.engine.gradients import Gradients
from dualtrain.launch.vote import StepVote
from dualtrain.launch.world import World
from dualtrain.model.handle import ModelHandle
from dualtrain.progress.meter import Meter
from dualtrain.progress.metrics import EvalRecord, TasksRecord
from dualtrain.progress.progress import Progress
from dualtrain.recipe.schema import Recipe
from dualtrain.training.best import BestLoss
from dualtrain.training.losses import LossWatch
from dualtrain.training.origin import Origin

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from dualtrain.training.evaluation import TaskScoring


@dataclass
class Run:
    """The parts of a run that the loop works with; one on every rank.

    Attributes:
        derived: Steps, tokens and slots that follow from the recipe.
        state: What algorithms see, the engine among it.
        handle: The engine as evaluation and sampling call it.
        batches: Slots and sequences of this rank, made ahead.
        gradients: The raw gradient of the step: its norm, and clipping.
        progress: Records and view; silent on ranks other than 0.
        lock: Rank 0's claim to the run directory.
        best: The lowest held-out loss, if the recipe asks for it.
        last_scores: The newest scores on tasks, of each mode.
        last_saved: The newest checkpoint, also one that this run began from.
    """

    recipe: Recipe
    world: World
    origin: Origin
    derived: Derived
    parameters: int
    dataset: TokenDataset
    held_out: ValidationData
    tasks: TaskScoring | None
    state: State
    dispatcher: Dispatcher
    handle: ModelHandle
    batches: Prefetcher
    slots_per_rank: int
    gradients: Gradients
    meter: Meter
    progress: Progress
    losses: LossWatch
    vote: StepVote
    lock: IO[bytes] | None
    best: BestLoss = field(init=False)
    last_eval: EvalRecord | None = field(init=False)
    last_scores: list[TasksRecord] = field(init=False)
    last_saved: Path | None = field(init=False)

    def __post_init__(self) -> None:
        facts, resume = self.origin.facts, self.origin.resume
        self.best = BestLoss.of(self.recipe.eval.best, self.recipe.eval.patience, facts)
        self.last_eval = facts.get("last_eval")
        self.last_scores = facts.get("last_scores", [])
        self.last_saved = resume.path if resume.kind == "full" else None
        self._began, self._waited_s = time.monotonic(), 0.0

    @property
    def run_dir(self) -> Path:
        return self.origin.run_dir

    @property
    def engine(self) -> DeepSpeedEngine:
        return self.state.engine

    def dispatch(self, event: Event) -> None:
        """Announce an event to the algorithms."""
        self.dispatcher.dispatch(event, self.state)

    def elapsed_s(self) -> float:
        """Wall time of the run so far, over all the processes that worked on it."""
        return self.origin.elapsed_s + time.monotonic() - self._began

    def data_wait_s(self) -> float:
        """Seconds this rank waited for data since the last call."""
        before, self._waited_s = self._waited_s, self.batches.wait_s
        return self._waited_s - before

    def close(self) -> None:
        """Give back terminal, threads and files."""
        # First, so that a batch in the making does not wait for its shards to be tried again.
        self.dataset.close()
        self.batches.close()
        self.progress.close()
        if self.lock is not None:
            self.lock.close()
