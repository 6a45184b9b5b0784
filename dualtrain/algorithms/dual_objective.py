"""The hook that makes the training dual: it gives each micro-batch its objective."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualtrain.algorithms.events import Algorithm, Event, Logger, State
from dualtrain.method.mixing import STREAM_NUMBERS
from dualtrain.method.objectives import (
    autoregressive,
    diffusion,
    masking_noise,
    with_scheduled_rate,
)

if TYPE_CHECKING:
    from dualtrain.recipe.schema import ObjectiveSection


class DualObjective(Algorithm):
    """Turn the clean sequences of a slot into an example of the slot's objective.

    At BATCH_START it reads ``state.slot.objective`` and ``state.batch`` and sets ``state.example``:

    - ``ar``: clean inputs, causal attention, every target weighs ``ar_weight``;
    - ``diffusion``: corrupted inputs, full attention, masked tokens' predictors weigh 1/p.

    Both predict with the same network and the same head, so this is all that tells them apart. The
    masks belong to (seed, stream, sequence): no two ranks or epochs share them, and any number of
    ranks makes the same ones. A scheduled rate goes by the step alone.

    The z-loss is not an algorithm of its own: it needs the log-sum-exp of the logits that the
    model's fused cross-entropy has computed anyway, chunk by chunk, and whole logits never exist.
    So ``objective.z_loss`` is an option of the model's loss, with this example's weights.
    """

    def __init__(self, *, seed: int, objective: ObjectiveSection) -> None:
        self.seed, self.objective = seed, objective

    def match(self, event: Event, state: State) -> bool:
        return event is Event.BATCH_START

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if state.slot.objective == "ar":
            weight = self.objective.ar_weight
            state.example = autoregressive(state.batch, state.vocabulary, ar_weight=weight)
            return
        batch, corruption = state.batch, self.objective.corruption
        noise = masking_noise(
            self.seed,
            "corruption",
            STREAM_NUMBERS[batch.stream],
            batch.sequence_ids,
            batch.document_ids.shape[1],
            spans=corruption.name != "uniform",
        )
        if corruption.rate is not None:
            noise = with_scheduled_rate(noise, corruption.rate, state.step, state.steps)
        state.example = diffusion(
            batch, state.vocabulary, noise, corruption, target=self.objective.target
        )
