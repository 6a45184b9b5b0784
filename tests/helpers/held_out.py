"""A tiny model, held-out text and its losses by hand."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from helpers.datasets import InMemory
from torch import Tensor

from dualtrain.common.vocabulary import Vocabulary
from dualtrain.data.batches import Batch, ValidationData
from dualtrain.method.objectives import MaskingNoise, validation_noise
from dualtrain.model.handle import ModelHandle, Target
from dualtrain.network.attention import plan_attention
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM

VOCABULARY, LENGTH, MASK, SPECIAL = 40, 16, 4, (0, 1, 2, 3, 4)
SIZES = [0 if token in SPECIAL else 1 + token * token % 11 for token in range(VOCABULARY)]
"""Bytes of each token: very unequal ones."""

PARTS = (
    "tokens",
    "bytes",
    "ar",
    "diffusion_tokens",
    "diffusion_bytes",
    "diffusion",
    "prefix_tokens",
    "prefix_bytes",
    "prefix",
    "ar_same_tokens",
)


def tiny_model(seed: int = 0) -> DualLM:
    config = DualConfig(
        VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        head="linear",
    )
    model = DualLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # as made, the blocks add nothing: every position would see only itself
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def handle(model, **options) -> ModelHandle:
    vocabulary = Vocabulary(size=VOCABULARY, special_ids=SPECIAL, bos_id=1, eos_id=2, mask=MASK)
    return ModelHandle(model=model, vocabulary=vocabulary, context=LENGTH, **options)


def knowing_nothing() -> DualLM:
    """A model to which all tokens are equally likely, whatever it reads."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def texts(count: int, *, longest: int = 20, unknown: float = 0.1, seed: int = 0) -> list[list[int]]:
    """Random documents of 1 to `longest` tokens, some of them ``<unk>``."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(5, VOCABULARY, n) for n in rng.integers(1, longest + 1, count)]
    return [np.where(rng.random(len(d)) < unknown, 0, d).tolist() for d in documents]


def validation(
    documents: Sequence[Sequence[int]], sequences: int | None = None, *, append_eos: bool = True
) -> ValidationData:
    """The real held-out sequences of documents."""
    dataset = InMemory(documents)
    dataset.token_bytes = np.array(SIZES)
    return ValidationData(
        dataset,  # type: ignore[arg-type]
        sequence_length=LENGTH,
        append_eos=append_eos,
        sequences=sequences,
    )


def held_out(sequences: int, **options) -> ValidationData:
    """So many sequences of short documents."""
    found = validation(texts(3 * sequences + 9, **options), sequences)
    assert len(found) == sequences
    return found


def losses_by_hand(
    model: DualLM, data: ValidationData, *, target: Target = "next", seed: int = 0
) -> dict[int, dict[str, float]]:
    """The sums of each document, scored one at a time, from the definitions of the three modes."""
    found: dict[int, dict[str, float]] = defaultdict(lambda: dict.fromkeys(PARTS, 0.0))
    for number in range(len(data)):
        batch = data.batch(number, 1)
        noise = validation_noise(seed, [number], len(data), LENGTH)
        masked, weight = masked_by_hand(batch, noise, target)
        for document, name in enumerate(batch.documents[0]):
            places = (batch.document_ids[0] == document).nonzero()[:, 0]
            text = [*batch.inputs[0, places].tolist(), int(batch.targets[0, places[-1]])]
            hidden = {n for n, place in enumerate(places.tolist()) if place in masked}
            sums = document_by_hand(model, text, places, hidden, weight, target)
            for part, value in sums.items():
                found[name][part] += value
    return dict(found)


def masked_by_hand(batch: Batch, noise: MaskingNoise, target: Target) -> tuple[set[int], float]:
    """The masked places of a sequence: every number of them that there can be equally often."""
    documents, ids = batch.document_ids[0].tolist(), batch.inputs[0].tolist()
    may = [i for i in range(LENGTH) if ids[i] not in SPECIAL]
    if target == "next":  # something has to predict it
        may = [i for i in may if i and documents[i] == documents[i - 1]]
    if not may:
        return set(), 0.0
    count = min(math.floor(noise.rate.item() * len(may)) + 1, len(may))
    order = noise.order[0].tolist()
    return set(sorted(may, key=lambda i: order[i])[:count]), len(may) / count


def document_by_hand(
    model: DualLM,
    text: list[int],
    places: Tensor,
    hidden: set[int],
    weight: float,
    target: Target,
) -> dict[str, float]:
    """The sums of what a sequence has of one document, in a row of its own.

    Args:
        text: Its inputs and the last target.
        places: Of the inputs in the sequence, for the positions of the model.
        hidden: Inputs that are masked.
        weight: Of each masked one.
    """
    ids, last = text[:-1], len(text) - 1
    scored = [n for n in range(1, last + 1) if n == last or text[n] not in SPECIAL]
    prompt = math.ceil(len(ids) / 2)
    second = [n for n in scored if n >= prompt]
    causal, prefix = (entropies(model, ids, places, kind, prompt) for kind in ("causal", "prefix"))
    full = entropies(
        model, [MASK if n in hidden else token for n, token in enumerate(ids)], places, "full"
    )
    if target == "next":
        of_diffusion = scored
        diffusion = full[last - 1][text[last]]
        diffusion += weight * math.fsum(full[n - 1][text[n]] for n in hidden)
    else:
        of_diffusion = [n for n in range(last) if text[n] not in SPECIAL]
        diffusion = weight * math.fsum(full[n][text[n]] for n in hidden)
    return {
        "tokens": len(scored),
        "bytes": sum(SIZES[text[n]] for n in scored),
        "ar": math.fsum(causal[n - 1][text[n]] for n in scored),
        "diffusion_tokens": len(of_diffusion),
        "diffusion_bytes": sum(SIZES[text[n]] for n in of_diffusion),
        "diffusion": diffusion,
        "prefix_tokens": len(second),
        "prefix_bytes": sum(SIZES[text[n]] for n in second),
        "prefix": math.fsum(prefix[n - 1][text[n]] for n in second),
        "ar_same_tokens": math.fsum(causal[n - 1][text[n]] for n in second),
    }


def entropies(
    model: DualLM, ids: list[int], places: Tensor, kind: str, prompt: int = 0
) -> list[list[float]]:
    """By position and token, -log p."""
    documents = torch.zeros(1, len(ids), dtype=torch.int32)
    options = {"in_prefix": torch.arange(len(ids))[None] < prompt} if kind == "prefix" else {}
    plan = plan_attention(kind, documents, backend="sdpa", device="cpu", **options)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), attention=plan, positions=places[None]).logits
    return (-F.log_softmax(logits[0].double(), dim=-1)).tolist()
