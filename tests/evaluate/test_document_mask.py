"""Tests of: data.document_mask: without it a sequence is one stream, in training and evaluation.

Expected losses are of text laid end to end and of an independent model, in which every position
sees all before it.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.datasets import InMemory
from helpers.released import SETTINGS, SPECIAL, VOCABULARY, released_logits, released_weights

from dualtrain.common.vocabulary import Vocabulary
from dualtrain.data.batches import Batch, TrainingData, ValidationData
from dualtrain.evaluate.heldout import held_out_losses
from dualtrain.method.mixing import Mixture
from dualtrain.method.objectives import autoregressive, diffusion, masking_noise
from dualtrain.model.exported import exported_config, exported_document_mask
from dualtrain.model.handle import ModelHandle
from dualtrain.model.released import convert
from dualtrain.network.transformer import DualLM
from dualtrain.recipe.schema import UniformCorruption

LENGTH = 12
WORDS = Vocabulary(
    size=VOCABULARY, special_ids=tuple(range(16)), bos_id=1, eos_id=2, mask=4, stop_ids=(1, 2)
)


def documents() -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [rng.integers(16, VOCABULARY, n).tolist() for n in (3, 9, 1, 20, 5, 14, 2)]


def model() -> DualLM:
    config, weights = convert(
        released_weights(), SETTINGS, SPECIAL, where="weights", settings_file="settings"
    )
    made = DualLM(config)
    made.load_state_dict(weights)
    return made.eval()


def stream_loss() -> float:
    """Mean cross-entropy over all targets of the text, cut every LENGTH tokens."""
    inputs = [token for text in documents() for token in (1, *text)]
    targets = [token for text in documents() for token in (*text, 2)]
    count = len(inputs) // LENGTH
    rows = torch.tensor(inputs[: count * LENGTH]).view(count, LENGTH)
    wanted = torch.tensor(targets[: count * LENGTH]).view(count, LENGTH)
    logits = released_logits(released_weights(), rows, torch.zeros_like(rows), causal=True)
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten()).item()


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_held_out_loss_is_that_of_one_stream_of_tokens(backend):
    data = ValidationData(
        InMemory(documents()),  # type: ignore[arg-type]
        sequence_length=LENGTH,
        append_eos=True,
        document_mask=False,
    )
    handle = ModelHandle(model=model(), vocabulary=WORDS, context=LENGTH, backend=backend)
    with torch.no_grad():
        found = held_out_losses(handle, data, micro_batch=3)
    assert found.ar_nll == pytest.approx(stream_loss(), rel=1e-5)
    assert found.tokens == len(data) * LENGTH


def read(document_mask: bool) -> Batch:
    mixture = Mixture(alpha=Fraction(1, 2), steps=9, slots=2, micro_batch=3, rotation=True)
    data = TrainingData(
        InMemory(documents()),  # type: ignore[arg-type]
        mixture=mixture,
        sequence_length=LENGTH,
        seed=0,
        unique_tokens=None,
        append_eos=True,
        document_mask=document_mask,
    )
    return data.batch("ar", 0)


def test_training_reads_the_same_tokens_and_only_attention_differs():
    masked, whole = read(True), read(False)
    corruption = UniformCorruption()
    noise = masking_noise(0, "corruption", 0, masked.sequence_ids, LENGTH)
    assert masked.document_ids.max() > 0 and torch.equal(masked.document_ids, whole.document_ids)
    for make in (
        lambda batch: autoregressive(batch, WORDS),
        lambda batch: diffusion(batch, WORDS, noise, corruption),
    ):
        one, other = make(masked), make(whole)
        for name in ("input_ids", "targets", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert torch.equal(one.document_ids, masked.document_ids)
        assert not other.document_ids.any()
    # With <s> as an input every target is scored, </s> too: as where text is one stream.
    assert (autoregressive(whole, WORDS).weights == 1).all()


def test_exports_say_it_and_others_stay_as_they_were():
    config = model().config
    facts = {"target": "next", "append_eos": True}
    usual, without = (
        exported_config(config, **facts),
        exported_config(config, **facts, document_mask=False),
    )
    assert "document_mask" not in usual and exported_document_mask(usual)
    assert not exported_document_mask(without)
