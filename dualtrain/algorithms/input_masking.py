"""Masked-input regularisation: autoregressive training on inputs with gaps (arXiv 2606.06888).

Also the example to start your own algorithm from. It shows all there is to one:

- its keyword arguments are the recipe's ``args``, checked by name and given to ``__init__``;
- ``match`` names the moment (see the map in ``events.Event``) and the slots it is meant for;
- ``apply`` changes the state, here the example that the model is about to see;
- randomness comes from ``randomness.generator``, keyed by a purpose of its own and by the sequence:
  the same on any number of ranks and after a resume, with nothing to keep;
- ``logger.log`` adds a number to the record of the step;
- it remembers nothing between steps; what one does remember, ``state_dict`` returns.

Put yours into a module that Python finds, such as a file beside the recipe, and name it there::

    algorithms:
      - use: my_module:MyAlgorithm
        args: {share: 0.3}
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dualtrain.algorithms.events import Algorithm, Event, Logger, State
from dualtrain.common.randomness import generator
from dualtrain.method.mixing import STREAM_NUMBERS


class InputMasking(Algorithm):
    """Replace some input tokens of some autoregressive sequences by the mask token.

    Targets and weights stay: the model has to predict the next token, masked ones too, from what
    it still sees. The paper adds such a loss, times 0.4, to that on clean inputs; chosen
    sequences in place of a second forward pass give the same mixture at no cost: 0.4 / 1.4 ≈ 0.3.
    The recorded AR loss is that of all sequences, with and without gaps.

    Args:
        share: Probability that a sequence gets gaps.
        max_rate: A sequence with gaps has each token masked with a probability that is uniform
            between 0 and this.
    """

    def __init__(self, *, share: float = 0.3, max_rate: float = 0.5) -> None:
        for name, value in (("share", share), ("max_rate", max_rate)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, not a probability in [0, 1]")
        self.share, self.max_rate = share, max_rate

    def match(self, event: Event, state: State) -> bool:
        return event is Event.BEFORE_FORWARD and state.slot.objective == "ar"

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        example, batch = state.example, state.batch
        stream = STREAM_NUMBERS[batch.stream]
        rows = []
        for sequence in batch.sequence_ids.tolist():
            rng = generator(state.recipe.seed, "input masking", stream, sequence)
            rate = self.max_rate * rng.random() if rng.random() < self.share else 0.0
            rows.append(rng.random(example.input_ids.shape[1]) < rate)
        special = torch.isin(example.input_ids, torch.tensor(state.vocabulary.special_ids))
        masked = torch.from_numpy(np.stack(rows)) & ~special
        inputs = example.input_ids.masked_fill(masked, state.vocabulary.mask_id)
        state.example = replace(example, input_ids=inputs)
        logger.log("input_masking/rate", masked.float().mean())
