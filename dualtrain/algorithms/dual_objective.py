"""The hook that makes the training dual: it gives each micro-batch its objective."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualtrain.algorithms.events import Algorithm, Event, Logger, State
from dualtrain.method import objectives
from dualtrain.method.mixing import STREAM_NUMBERS

if TYPE_CHECKING:
    from dualtrain.data.batches import Batch
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
        slot, batch = state.slot, state.batch
        if slot.objective == "ar":
            state.example = objectives.autoregressive(
                batch.inputs,
                batch.targets,
                batch.document_ids,
                special_ids=state.vocabulary.special_ids,
                ar_weight=self.objective.ar_weight,
            )
        else:
            state.example = self._diffusion(batch, state)

    def _diffusion(self, batch: Batch, state: State) -> objectives.Example:
        corruption, vocabulary = self.objective.corruption, state.vocabulary
        noise = objectives.masking_noise(
            self.seed,
            "corruption",
            STREAM_NUMBERS[batch.stream],
            batch.sequence_ids,
            batch.document_ids.shape[1],
            spans=corruption.name == "span",
        )
        if corruption.rate is not None:
            noise = objectives.with_scheduled_rate(noise, corruption.rate, state.step, state.steps)
        return objectives.diffusion(
            batch.inputs,
            batch.targets,
            batch.document_ids,
            mask_id=vocabulary.mask_id,
            special_ids=vocabulary.special_ids,
            noise=noise,
            corruption=corruption,
            target=self.objective.target,
            vocab_size=vocabulary.size,
        )
