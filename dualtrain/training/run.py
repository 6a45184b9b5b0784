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
from dualtrain.progress.progress import EvalRecord, Meter, Progress, TasksRecord
from dualtrain.recipe.schema import Recipe
from dualtrain.training.non_finite import LossWatch

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from dualtrain.training.evaluation import TaskScoring


@dataclass
class Run:
    """The parts of a run that the loop works with; one on every rank.

    Attributes:
        text: The same as YAML; goes into every checkpoint.
        fingerprint: Of the dataset; a resumed run must have the same.
        zero_stage: DeepSpeed's, 0 to 3.
        derived: Steps, tokens and slots that follow from the recipe.
        tasks: The tasks to be scored, if there are any.
        state: What algorithms see, the engine among it.
        handle: The engine as evaluation and sampling call it.
        batches: Slots and sequences of this rank, made ahead.
        slots_per_rank: Micro-batches of this rank in a step.
        gradients: The raw gradient of the step: its norm, and clipping.
        progress: Records and view; silent on ranks other than 0.
        losses: Of the slots of the step, watched for NaN.
        vote: The ranks' agreement on signals and bad losses.
        first_step: Updates done before this process started.
        elapsed_before_s: Wall time the run took before this process started.
        last_scores: The newest scores on tasks, of each mode.
        notes: What is to be said of where the run starts.
        lock: Rank 0's claim to the run directory.
    """

    recipe: Recipe
    text: str
    fingerprint: str
    zero_stage: int
    derived: Derived
    world: World
    run_dir: Path
    dataset: TokenDataset
    validation: ValidationData
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
    first_step: int
    elapsed_before_s: float
    last_eval: EvalRecord | None
    last_scores: list[TasksRecord]
    last_saved: Path | None
    notes: tuple[str, ...]
    lock: IO[bytes] | None
    _began: float = field(default_factory=time.monotonic)
    _waited_s: float = 0.0

    @property
    def engine(self) -> DeepSpeedEngine:
        """DeepSpeed's engine around the model."""
        assert self.state.engine is not None
        return self.state.engine

    def dispatch(self, event: Event) -> None:
        """Announce an event to the algorithms."""
        self.dispatcher.dispatch(event, self.state)

    def elapsed_s(self) -> float:
        """Wall time of the run so far, over all the processes that worked on it."""
        return self.elapsed_before_s + time.monotonic() - self._began

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
