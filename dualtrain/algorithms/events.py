"""The twelve moments of training, and who acts at them.

Algorithms change the :class:`State`, or observe it; ``train`` announces each moment to the
:class:`Dispatcher`, which asks them in turn. To change the training, write an :class:`Algorithm`
and name it in the recipe: ``algorithms: [{use: my_module:MyAlgorithm}]``. :class:`Event` shows
where it may hook in; ``algorithms/input_masking.py`` is a complete one to start from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from dualtrain.common.errors import UserError
from dualtrain.common.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine
    from torch import Tensor

    from dualtrain.data.batches import Batch
    from dualtrain.engine.groups import ParameterGroup
    from dualtrain.method.mixing import Mixture, Slot
    from dualtrain.method.objectives import Example
    from dualtrain.model.imported import ImportedLM
    from dualtrain.network.output import DualOutput
    from dualtrain.network.transformer import DualLM
    from dualtrain.recipe.schema import Recipe


class Event(Enum):
    """A moment of the training loop. This is the loop, with every moment at its place::

        model = DualLM(...)
        # INIT                change the model's modules and parameters
        engine = deepspeed.initialize(model, ...); restore the checkpoint
        # FIT_START           engine and optimizer exist, the state is that of the checkpoint
        while step < steps:
            # STEP_START      learning_rate and alpha are those of the step: change the rate
            for slot, batch in the slots of this rank:
                # BATCH_START     batch holds clean sequences: make the example
                # BEFORE_FORWARD  change the example: input_ids, targets, weights, attention
                output = engine(example)
                # AFTER_FORWARD   output is there
                loss = output.loss * slot.loss_scale
                # AFTER_LOSS      change loss, such as adding an auxiliary one
                engine.backward(loss)
                # AFTER_BACKWARD  observe only: gradients may be sharded
            if every loss is finite on every rank: engine.step()
            # STEP_END        weights are updated, unless the step was left out
            step += 1
            if due: evaluate
                # EVAL_END        held-out losses, and scores on tasks, are in metrics
            if due: save a checkpoint
                # CHECKPOINT_SAVED
        # FIT_END             also after a signal, never after a failure

    ``state.step`` counts finished steps: it is n during step n (the first is 0), up to STEP_END,
    and n + 1 at that step's EVAL_END and CHECKPOINT_SAVED.
    """

    INIT = "init"
    FIT_START = "fit_start"
    STEP_START = "step_start"
    BATCH_START = "batch_start"
    BEFORE_FORWARD = "before_forward"
    AFTER_FORWARD = "after_forward"
    AFTER_LOSS = "after_loss"
    AFTER_BACKWARD = "after_backward"
    STEP_END = "step_end"
    EVAL_END = "eval_end"
    CHECKPOINT_SAVED = "checkpoint_saved"
    FIT_END = "fit_end"

    @property
    def is_after(self) -> bool:
        """Whether algorithms run in reverse order: each undoes its work inside those before it."""
        return self.name.startswith("AFTER_")


@dataclass
class State:
    """The training at one moment, on one rank.

    Algorithms change ``model`` at INIT; ``learning_rate`` at STEP_START; ``example`` from
    BATCH_START to BEFORE_FORWARD; ``output`` at AFTER_FORWARD; ``loss`` at AFTER_LOSS. The rest is
    for reading. What has not come yet is no attribute: ``slot`` before the first BATCH_START.

    Attributes:
        vocabulary: What ids are no text.
        mixture: Which slots a step has. Data is prepared ahead by it, so it never changes.
        model: The bare model; ``engine`` wraps it.
        step: Finished steps; the number of the one that runs.
        engine: DeepSpeed's engine, from FIT_START on.
        optimizer_groups: Which parameters share a learning rate; from FIT_START on.
        alpha: AR share of this step, as ``mixture`` has it; for records and for algorithms.
        learning_rate: Of this step; each group multiplies it by its ``lr_scale``.
        slot: What this micro-batch is: its objective and its place in the step.
        batch: Clean sequences, (B, T) inputs and targets, on the CPU.
        example: What the model is given, on the CPU.
        output: What the model returned.
        loss: Scalar on the device; backward starts there.
        metrics: Held-out losses of the last evaluation by name, and scores on tasks, if it had
            any, as `MODE/TASK`.
    """

    recipe: Recipe
    steps: int
    rank: int
    world_size: int
    device: torch.device
    vocabulary: Vocabulary
    mixture: Mixture
    model: DualLM | ImportedLM
    step: int = 0
    engine: DeepSpeedEngine = field(init=False)
    optimizer_groups: Sequence[ParameterGroup] = field(init=False)
    alpha: float = field(init=False)
    learning_rate: float = field(init=False)
    slot: Slot = field(init=False)
    batch: Batch = field(init=False)
    example: Example = field(init=False)
    output: DualOutput = field(init=False)
    loss: Tensor = field(init=False)
    metrics: dict[str, float] = field(default_factory=dict)


class Logger(Protocol):
    """Where algorithms report numbers: they appear in the step's record, averaged over slots."""

    def log(self, name: str, value: float | Tensor) -> None:
        """Add a number to the record; a scalar tensor on the device is read later, all at once."""
        ...


class Algorithm(ABC):
    """Something that changes the training.

    Derive from it, or just provide its four methods. One that keeps something between steps returns
    it from ``state_dict``, as a resumed run continues from that. Randomness belongs to
    ``randomness.generator`` with keys such as the sequence ids: then there is nothing to keep, and
    no two ranks share it.
    """

    @abstractmethod
    def match(self, event: Event, state: State) -> bool:
        """Return whether ``apply`` is to be called at this moment."""

    @abstractmethod
    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Change the state."""

    def state_dict(self) -> dict[str, object]:
        """Return what a resumed run needs, for ``torch.save``."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Continue from what ``state_dict`` returned."""
        if state_dict:
            raise ValueError(
                f"{type(self).__name__} keeps {', '.join(state_dict)}, but loads nothing"
            )


_FORMER = ("AlphaSchedule", "LearningRate")
"""Algorithms without state that checkpoints of earlier versions name; the loop does their work."""


class AlgorithmError(Exception):
    """An algorithm raised an error; names it, the event and the step."""


class Dispatcher:
    """Call algorithms at each event, in the recipe's order, which is reversed at AFTER_ events."""

    def __init__(self, algorithms: Sequence[Algorithm], *, logger: Logger) -> None:
        self._algorithms = dict(zip(_unique_names(algorithms), algorithms, strict=True))
        self._logger = logger

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        """The algorithms, in order."""
        return tuple(self._algorithms.values())

    def dispatch(self, event: Event, state: State) -> None:
        """Announce an event to every algorithm."""
        algorithms = list(self._algorithms.items())
        for name, algorithm in reversed(algorithms) if event.is_after else algorithms:
            try:
                if algorithm.match(event, state):
                    algorithm.apply(event, state, self._logger)
            except UserError:
                raise
            except Exception as error:
                raise AlgorithmError(
                    f"{name} failed at {event.name} of step {state.step}: "
                    f"{type(error).__name__}: {error}"
                ) from error

    def state_dict(self) -> dict[str, dict[str, object]]:
        """What every algorithm needs to be resumed, by its name."""
        return {name: algorithm.state_dict() for name, algorithm in self._algorithms.items()}

    def load_state_dict(self, states: Mapping[str, Mapping[str, object]]) -> None:
        """Resume every algorithm from what :meth:`state_dict` returned."""
        saved = [name for name in states if name not in _FORMER]
        if saved != list(self._algorithms):
            raise UserError(
                "algorithms",
                f"{', '.join(self._algorithms)}, but the checkpoint was made with "
                f"{', '.join(saved) or 'none'}",
                "the same algorithms in the same order",
                "restore the recipe's list, or start anew from checkpoint.resume=weights:PATH",
            )
        for name, algorithm in self._algorithms.items():
            algorithm.load_state_dict(states[name])


def _unique_names(members: Sequence[object]) -> list[str]:
    """Class names; the second of a class gets `#2`, and so on."""
    names: list[str] = []
    for member in members:
        kind = type(member).__name__
        number = 1 + sum(name.partition("#")[0] == kind for name in names)
        names.append(kind if number == 1 else f"{kind}#{number}")
    return names
