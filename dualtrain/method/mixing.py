"""How the two objectives share the slots of a step, the ranks, and the documents.

A slot is one micro-batch of one rank in one optimizer step. :class:`Mixture` says which slots a
step has and which rank runs them; ``data`` reads a slot's sequences, ``dual_objective`` makes the
training example of its objective. Everything is a pure function of the step, in exact fractions:
nothing to save, the same slots on any number of ranks.

Quota. Up to step n, floor(n·α·S + 1/2) of the n·S slots are autoregressive (with a schedule, n·α is
the sum of its values so far), so that the share is within one slot of α over any window of steps.

Rotation. In every pass over the unique subset each token is read once, by one of the objectives.
:meth:`Mixture.ar_tokens` says how many of the run's first x tokens are autoregressive: α·x, as near
as whole slots allow. ``data.plan`` lets the objectives take turns over the text by that number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dualtrain.recipe.schema import AlphaSchedule

Objective = Literal["ar", "diffusion"]
Stream = Literal["ar", "diffusion", "all"]

STREAM_NUMBERS: dict[Stream, int] = {"ar": 0, "diffusion": 1, "all": 2}
"""Streams as they enter the keys of random numbers; part of what makes runs reproducible."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One micro-batch of a step.

    Attributes:
        index: Position among all slots of the step, the same for any number of ranks.
        stream: The stream that its sequences come from.
        first_sequence: Absolute index in that stream of the first of its micro_batch sequences.
        loss_scale: Factor on its loss; 2α or 2(1 - α) in a weighted sum, else 1.
    """

    index: int
    objective: Objective
    stream: Stream
    first_sequence: int
    loss_scale: float


def alpha_at(schedule: AlphaSchedule | Fraction, step: int, steps: int) -> Fraction:
    """Return the AR share of a step, exactly.

    Step n stands at n / steps of the run. ``phases``: the alpha of the first phase whose ``until``
    lies after that point. ``linear``: on the straight line from ``start`` at 0 through each
    phase's alpha at its ``until``.
    """
    if isinstance(schedule, (Fraction, int)):
        return Fraction(schedule)
    position = Fraction(step, steps)
    begin, before = Fraction(0), schedule.start
    for phase in schedule.phases:
        if position < phase.until:
            if schedule.name == "phases":
                return phase.alpha
            share = (position - begin) / (phase.until - begin)
            return before + share * (phase.alpha - before)
        begin, before = phase.until, phase.alpha
    return before


class Mixture:
    """The slots of every step: a pure function of (alpha, S, micro_batch, mixing).

    ``slots``: each slot has one objective and takes the next sequences of that objective's stream.
    ``weighted_sum``: each of the S micro-batches of stream ``all`` is trained with both objectives,
    in two slots scaled by 2α and 2(1 - α): their mean over 2S slots is α·L_AR + (1 - α)·L_MD. A
    constant alpha of 0 or 1 leaves one objective and S slots; a schedule that touches 0 or 1 keeps
    2S, since the accumulation of an engine cannot change within a run.

    Args:
        alpha: AR share, or a function from the step to it (see :func:`alpha_at`).
        rotation: Whether the objectives share each pass over the text; else each goes through all
            of it at its own pace.

    Raises:
        ValueError: `rotation` with a weighted sum, for which it means nothing; a share outside
            [0, 1].
    """

    def __init__(
        self,
        *,
        alpha: Callable[[int], Fraction] | Fraction,
        steps: int,
        slots: int,
        micro_batch: int,
        mixing: Literal["slots", "weighted_sum"] = "slots",
        rotation: bool,
    ) -> None:
        self.steps = steps
        self.micro_batch = micro_batch
        self.mixing = mixing
        self._rotation = rotation
        self._batches = slots
        self._alpha = alpha
        constant = None if callable(alpha) else Fraction(alpha)
        if rotation and mixing == "weighted_sum":
            raise ValueError("rotation needs mixing by slots")
        if constant is not None and not 0 <= constant <= 1:
            raise ValueError(f"alpha {constant} is outside [0, 1]")
        self._constant = constant
        self._paired = mixing == "weighted_sum" and constant not in (0, 1)
        self._scheduled = self._count_scheduled()
        self.slots_per_step = 2 * slots if self._paired else slots

    def alpha_at(self, step: int) -> Fraction:
        """The AR share of a step."""
        return Fraction(self._alpha(step) if callable(self._alpha) else self._alpha)

    @property
    def rotates(self) -> bool:
        """Whether both objectives have text, and share each pass over it."""
        return self._rotation and self._constant not in (0, 1)

    @property
    def ar_walks(self) -> bool:
        """Whether AR, not diffusion, is the objective that goes through the text without a break.

        The one with less of it: the other one has documents cut where its part of a pass ends. With
        a schedule always AR, so that it does not depend on steps to come.
        """
        return self._constant is None or self._constant <= Fraction(1, 2)

    @property
    def key(self) -> str:
        """The same for mixtures with the same :meth:`ar_tokens` and :attr:`ar_walks`."""
        last = self.alpha_at(self.steps - 1)
        return repr((self._constant, self._scheduled, last, self._batches, self.micro_batch))

    def ar_slots_before(self, step: int) -> int:
        """AR slots in steps 0..step-1: floor(n·α·S + 1/2), or S a step in a weighted sum.

        Args:
            step: 0..steps; at ``steps``, the number of the whole run. Beyond, as if the run went on
                with its last alpha.
        """
        if self._paired:
            return step * self._batches
        if self._constant is not None:
            return _nearest(step * self._constant * self._batches)
        further = max(0, step - self.steps)
        last = self.alpha_at(self.steps - 1) if further else Fraction(0)
        return self._scheduled[step - further] + _nearest(further * last * self._batches)

    def diffusion_slots_before(self, step: int) -> int:
        """Diffusion slots in steps 0..step-1."""
        return step * self.slots_per_step - self.ar_slots_before(step)

    def ar_tokens(self, tokens: int, sequence_length: int) -> int:
        """AR tokens among the first `tokens` input tokens of the run, for rotation.

        floor(α·tokens), but never more or less than the slots of the steps up to there, and of the
        one that it falls into, can have read. So when the run has read that many tokens, neither
        objective's stream is short of its share, nor beyond it, by more than the rest of a step.
        """
        slot = self.micro_batch * sequence_length
        step, rest = divmod(tokens, self._batches * slot)
        before = self.ar_slots_before(step) * slot
        if not rest:
            return before
        after = self.ar_slots_before(step + 1) * slot
        if self._constant is None:
            return before + (after - before) * rest // (self._batches * slot)
        # What diffusion has read up to there is between these, too.
        least = max(before, after - self._batches * slot + rest)
        most = min(after, before + rest)
        return min(max(floor(self._constant * tokens), least), most)

    def slots(self, step: int) -> tuple[Slot, ...]:
        """All slots of a step in their global order, which knows no ranks: AR first.

        In a weighted sum the two slots of a micro-batch stand together instead, AR first.
        """
        return self.for_rank(step, 0, 1)

    def for_rank(self, step: int, rank: int, world_size: int) -> tuple[Slot, ...]:
        """The slots that a rank runs in a step, in the order of its micro-steps.

        The ranks' slots are those of :meth:`slots`, divided. Diffusion slots, which cost more, are
        dealt like cards, going on in each step where the last one ended: over any window of steps
        the ranks' numbers differ by at most one. Every rank runs its AR slots first, so at most one
        micro-step of a step has ranks with different objectives.
        """
        if self._batches % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"rank {rank} of {world_size}: the ranks must divide {self._batches} slots"
            )
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is outside the run's {self.steps} steps")
        if self._paired:
            return tuple(self._pairs(step, rank, world_size))
        return tuple(self._deal(step, rank, world_size))

    def _deal(self, step: int, rank: int, world_size: int) -> Iterator[Slot]:
        ar_before = self.ar_slots_before(step)
        ar_here = self.ar_slots_before(step + 1) - ar_before
        diffusion_before = step * self._batches - ar_before
        per_rank = self._batches // world_size
        all_diffusion, rest = divmod(self._batches - ar_here, world_size)
        # Places from the rank whose turn it is: the first `rest` ranks get one slot more.
        turn = (rank - diffusion_before) % world_size
        all_ar = per_rank - all_diffusion - (1 if rest else 0)
        for i in range(all_ar):
            yield self._slot("ar", i * world_size + rank, ar_before, 0)
        if rest and turn >= rest:
            yield self._slot("ar", all_ar * world_size + turn - rest, ar_before, 0)
        if rest and turn < rest:
            yield self._slot("diffusion", turn, diffusion_before, ar_here)
        for i in range(all_diffusion):
            yield self._slot("diffusion", rest + i * world_size + rank, diffusion_before, ar_here)

    def _slot(self, objective: Objective, number: int, before: int, first_index: int) -> Slot:
        """The slot with that number among its step's slots of one objective."""
        # A weighted sum of one objective alone still reads its stream.
        stream: Stream = "all" if self.mixing == "weighted_sum" else objective
        sequence = (before + number) * self.micro_batch
        return Slot(first_index + number, objective, stream, sequence, 1.0)

    def _pairs(self, step: int, rank: int, world_size: int) -> Iterator[Slot]:
        scale = 2 * self.alpha_at(step)
        for number in range(rank, self._batches, world_size):
            sequence = (step * self._batches + number) * self.micro_batch
            yield Slot(2 * number, "ar", "all", sequence, float(scale))
            yield Slot(2 * number + 1, "diffusion", "all", sequence, float(2 - scale))

    def _count_scheduled(self) -> list[int]:
        """AR slots before each step 0..steps of a schedule; empty where a formula gives them."""
        if self._constant is not None or self._paired:
            return []
        counts, total = [0], Fraction(0)
        for step in range(self.steps):
            share = self.alpha_at(step)
            if not 0 <= share <= 1:
                raise ValueError(f"alpha {share} of step {step} is outside [0, 1]")
            total += share * self._batches
            counts.append(_nearest(total))
        return counts


def _nearest(number: Fraction) -> int:
    """floor(number + 1/2)."""
    return (2 * number.numerator + number.denominator) // (2 * number.denominator)
