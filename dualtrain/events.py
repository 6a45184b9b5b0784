"""The twelve moments of training, and who acts at them.

Algorithms change the :class:`State`, callbacks observe it; ``train`` announces each moment to the
:class:`Dispatcher`, which asks them in turn. To change the training, write an :class:`Algorithm`
and name it in the recipe: ``algorithms: [{use: my_module:MyAlgorithm}]``. :class:`Event` shows
where it may hook in; ``algorithms/input_masking.py`` is a complete one to start from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol, cast

from dualtrain.errors import UserError

if TYPE_CHECKING:
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine
    from torch import Tensor

    from dualtrain.data.batches import Batch
    from dualtrain.mixing import Mixture, Slot
    from dualtrain.model import DualLM, DualOutput, ImportedLM
    from dualtrain.objectives import Example
    from dualtrain.parameter_groups import ParameterGroup
    from dualtrain.recipe.schema import Recipe


class Event(Enum):
    """A moment of the training loop. This is the loop, with every moment at its place::

        model = DualLM(...)
        # INIT                change the model's modules and parameters
        engine = deepspeed.initialize(model, ...); restore the checkpoint
        # FIT_START           engine and optimizer exist, the state is that of the checkpoint
        while step < steps:
            # STEP_START      set learning_rate, alpha
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


@dataclass(frozen=True)
class Vocabulary:
    """What algorithms need to know of the tokenizer.

    Attributes:
        size: Number of tokens.
        mask_id: The mask token.
        special_ids: All special tokens, the mask token among them.
    """

    size: int
    mask_id: int
    special_ids: tuple[int, ...]


@dataclass
class State:
    """The training at one moment, on one rank.

    Algorithms change ``model`` at INIT; ``learning_rate`` and ``alpha`` at STEP_START; ``example``
    from BATCH_START to BEFORE_FORWARD; ``output`` at AFTER_FORWARD; ``loss`` at AFTER_LOSS. The
    rest is for reading.

    Attributes:
        recipe: The resolved recipe.
        steps: Steps of the whole run.
        rank: This process, 0..world_size-1.
        world_size: Processes of the run.
        device: This rank's device.
        vocabulary: Special tokens.
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
    engine: DeepSpeedEngine | None = None
    optimizer_groups: Sequence[ParameterGroup] = ()
    alpha: float = float("nan")
    learning_rate: float = float("nan")
    slot: Slot | None = None
    batch: Batch | None = None
    example: Example | None = None
    output: DualOutput | None = None
    loss: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Logger(Protocol):
    """Where algorithms report numbers: they appear in the step's record, averaged over slots."""

    def log(self, name: str, value: float | Tensor) -> None:
        """Add a number to the record; a scalar tensor on the device is read later, all at once."""
        ...


class Algorithm(ABC):
    """Something that changes the training.

    Derive from it, or just provide its four methods. An algorithm that keeps nothing between steps
    returns ``{}`` from ``state_dict``; whatever else it keeps must be there, as a resumed run
    continues from it. Randomness belongs to ``randomness.generator`` with keys such as the sequence
    ids: then there is nothing to keep, and no two ranks share it.
    """

    @abstractmethod
    def match(self, event: Event, state: State) -> bool:
        """Return whether ``apply`` is to be called at this moment."""

    @abstractmethod
    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Change the state."""

    @abstractmethod
    def state_dict(self) -> dict[str, object]:
        """Return what a resumed run needs, for ``torch.save``."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Continue from what ``state_dict`` returned."""


class Callback(ABC):
    """Something that watches the training.

    It has ``match`` like an algorithm, so that the twelve events remain the only names to learn (a
    method for each would repeat them), but ``observe`` instead of ``apply``: a view of the state
    that refuses assignments, and nothing to save.
    """

    @abstractmethod
    def match(self, event: Event, state: State) -> bool:
        """Return whether ``observe`` is to be called at this moment."""

    @abstractmethod
    def observe(self, event: Event, state: State) -> None:
        """Look at the state, after all algorithms."""


class AlgorithmError(Exception):
    """An algorithm or a callback raised an error; names it, the event and the step."""


@dataclass(frozen=True, slots=True)
class Trace:
    """That an algorithm, or a callback, was run.

    Attributes:
        step: State's step.
        slot: The slot's position in the step, at events of a slot.
        event: When.
        name: Who, as in the dispatcher's ``names``.
    """

    step: int
    slot: int | None
    event: Event
    name: str

    def __str__(self) -> str:
        slot = "" if self.slot is None else f" slot {self.slot}"
        return f"step {self.step}{slot}: {self.event.name} {self.name}"


SLOT_EVENTS = frozenset(
    {
        Event.BATCH_START,
        Event.BEFORE_FORWARD,
        Event.AFTER_FORWARD,
        Event.AFTER_LOSS,
        Event.AFTER_BACKWARD,
    }
)


class Dispatcher:
    """Call algorithms, then callbacks, at each event.

    Algorithms run in their order, which is the recipe's, reversed at AFTER_ events; callbacks
    always in theirs.

    Args:
        algorithms: In order.
        callbacks: In order.
        logger: Given to algorithms.
        traces: Calls remembered for :meth:`traces`; older ones are forgotten.
    """

    def __init__(
        self,
        algorithms: Sequence[Algorithm],
        callbacks: Sequence[Callback] = (),
        *,
        logger: Logger,
        traces: int = 256,
    ) -> None:
        self._algorithms = dict(zip(_unique_names(algorithms), algorithms, strict=True))
        self._callbacks = dict(zip(_unique_names(callbacks), callbacks, strict=True))
        self._logger = logger
        self._traces: deque[Trace] = deque(maxlen=traces)

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        """The algorithms, in order."""
        return tuple(self._algorithms.values())

    def dispatch(self, event: Event, state: State) -> None:
        """Announce an event to everybody.

        Raises:
            UserError: As raised by an algorithm or a callback.
            AlgorithmError: For any other error of theirs, which is its cause.
        """
        algorithms = list(self._algorithms.items())
        for name, algorithm in reversed(algorithms) if event.is_after else algorithms:
            with _blaming(name, event, state):
                if algorithm.match(event, state):
                    self._remember(name, event, state)
                    algorithm.apply(event, state, self._logger)
        # State is the type that callbacks are written for; the view only refuses assignments.
        view = cast("State", _View(state))
        for name, callback in self._callbacks.items():
            with _blaming(name, event, state):
                if callback.match(event, view):
                    self._remember(name, event, state)
                    callback.observe(event, view)

    def traces(self) -> tuple[Trace, ...]:
        """The last calls, oldest first; print them one a line."""
        return tuple(self._traces)

    def state_dict(self) -> dict[str, dict[str, object]]:
        """What every algorithm needs to be resumed, by its name."""
        return {name: algorithm.state_dict() for name, algorithm in self._algorithms.items()}

    def load_state_dict(self, states: Mapping[str, Mapping[str, object]]) -> None:
        """Resume every algorithm from what :meth:`state_dict` returned.

        Raises:
            UserError: The algorithms of the recipe are not those of the checkpoint.
        """
        if list(states) != list(self._algorithms):
            raise UserError(
                "algorithms",
                f"{', '.join(self._algorithms)}, but the checkpoint was made with "
                f"{', '.join(states) or 'none'}",
                "the same algorithms in the same order",
                "restore the recipe's list, or start anew from checkpoint.resume=weights:PATH",
            )
        for name, algorithm in self._algorithms.items():
            algorithm.load_state_dict(states[name])

    def _remember(self, name: str, event: Event, state: State) -> None:
        slot = state.slot.index if event in SLOT_EVENTS and state.slot is not None else None
        self._traces.append(Trace(state.step, slot, event, name))


@contextmanager
def _blaming(name: str, event: Event, state: State) -> Iterator[None]:
    """Name the algorithm and the event in whatever goes wrong inside."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise AlgorithmError(
            f"{name} failed at {event.name} of step {state.step}: {type(error).__name__}: {error}"
        ) from error


class _View:
    """A state that cannot be assigned to."""

    __slots__ = ("_state",)

    def __init__(self, state: State) -> None:
        object.__setattr__(self, "_state", state)

    def __getattr__(self, name: str) -> object:
        return getattr(self._state, name)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a callback must not change the state ({name}); write an Algorithm")


def _unique_names(members: Sequence[object]) -> list[str]:
    """Class names; the second of a class gets `#2`, and so on."""
    names: list[str] = []
    for member in members:
        kind = type(member).__name__
        number = 1 + sum(name.partition("#")[0] == kind for name in names)
        names.append(kind if number == 1 else f"{kind}#{number}")
    return names
