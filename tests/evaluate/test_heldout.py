"""Tests of: dualtrain.evaluate.heldout: by brute force, on any number of ranks, every time."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.held_out import (
    LENGTH,
    PARTS,
    SIZES,
    VOCABULARY,
    Target,
    handle,
    held_out,
    knowing_nothing,
    losses_by_hand,
    texts,
    tiny_model,
    validation,
)
from helpers.ranks import on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualtrain.evaluate.heldout import (
    HeldOut,
    document_losses,
    held_out_losses,
    in_prompt,
    mean_and_error,
)
from dualtrain.network.transformer import DualLM

TARGETS = pytest.mark.parametrize("target", ["next", "in_place"])
SIMILAR = {"rel": 2e-5, "abs": 1e-6}
"""Documents alone and among others in a row, in float32."""


# Against losses by hand


@TARGETS
@pytest.mark.parametrize(("count", "micro_batch"), [(9, 4), (7, 3), (2, 5), (1, 1)])
def test_losses_are_those_of_each_document_in_a_row_of_its_own(
    target: Target, count: int, micro_batch: int
):
    """With unknown tokens, documents of one token, and documents that rows cut."""
    model, data = tiny_model(), held_out(count)
    by_hand = losses_by_hand(model, data, target=target)
    found = document_losses(handle(model, target=target), data, micro_batch=micro_batch)
    assert found.documents.tolist() == sorted(by_hand)
    for part in PARTS:
        wanted = [by_hand[document][part] for document in sorted(by_hand)]
        assert getattr(found, part).tolist() == pytest.approx(wanted, **SIMILAR), part

    whole = held_out_losses(handle(model, target=target), data, micro_batch=micro_batch)
    total = {part: math.fsum(sums[part] for sums in by_hand.values()) for part in PARTS}
    nats = {"ar": "tokens", "diffusion": "diffusion_tokens", "prefix": "prefix_tokens"}
    for part, tokens in nats.items():
        mean, size = total[part] / total[tokens], total[tokens.replace("tokens", "bytes")]
        assert getattr(whole, f"{part}_nll") == pytest.approx(mean, rel=1e-5)
        in_bits = getattr(whole, f"{part}_bits_per_byte")
        assert in_bits == pytest.approx(total[part] / math.log(2) / size, rel=1e-5)
        # Not what a mean number of bytes per token of all the text would give.
        if count > 1:
            text = np.mean([SIZES[token] for token in range(5, VOCABULARY)])
            assert abs(in_bits / (mean / math.log(2) / text) - 1) > 0.01
    same = total["ar_same_tokens"] / total["prefix_tokens"]
    assert whole.ar_nll_same_tokens == pytest.approx(same, rel=1e-5)
    counts = (whole.tokens, whole.prefix_tokens, whole.documents, whole.sequences)
    assert counts == (total["tokens"], total["prefix_tokens"], len(by_hand), count)
    if count > 2:
        assert len({whole.ar_nll, whole.diffusion_nll, whole.prefix_nll, same}) == 4
        assert whole.prefix_tokens < whole.tokens < count * LENGTH


@TARGETS
@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("unknown", [0.0, 0.1])
def test_a_model_that_knows_nothing_has_the_loss_of_guessing_in_every_mode(
    target: Target, append_eos: bool, unknown: float
):
    """Whatever is masked, each scored token counts once: with documents of 1 to 20 tokens."""
    data = validation(texts(300, unknown=unknown), 60, append_eos=append_eos)
    found = held_out_losses(handle(knowing_nothing(), target=target), data, micro_batch=7)
    for loss in (found.ar_nll, found.diffusion_nll, found.prefix_nll, found.ar_nll_same_tokens):
        assert loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert found.prefix_error == pytest.approx(0, abs=1e-6)
    assert found.ar_error == pytest.approx(0, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    append_eos=st.booleans(),
    unknown=st.booleans(),
    target=st.sampled_from(["next", "in_place"]),
)
def test_guessing_costs_the_same_in_any_one_sequence(lengths, append_eos, unknown, target):
    documents = [[0 if unknown and n % 3 == 1 else 5 + n for n in range(k)] for k in lengths]
    data = validation([*documents, list(range(5, 5 + LENGTH))], 1, append_eos=append_eos)
    found = held_out_losses(handle(knowing_nothing(), target=target), data, micro_batch=1)
    losses = [found.ar_nll, found.prefix_nll]
    if target == "next" or any(token > 4 for token in data.batch(0, 1).inputs[0].tolist()):
        losses.append(found.diffusion_nll)
    assert losses == pytest.approx([math.log(VOCABULARY)] * len(losses), rel=1e-6)


def test_documents_of_one_token_count_in_every_mode():
    """There is nothing to mask or to read both ways: the same loss of the same tokens."""
    data = validation([[5 + n % 30] for n in range(50)], append_eos=False)
    found = held_out_losses(handle(tiny_model()), data, micro_batch=2)
    assert found.tokens == found.prefix_tokens == found.documents == 48
    for loss in (found.diffusion_nll, found.prefix_nll, found.ar_nll_same_tokens):
        assert loss == pytest.approx(found.ar_nll, rel=1e-6)
    assert found.prefix_minus_ar_error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("documents", "prompt"),
    [
        ([0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]),
        ([0, 0, 0, 1, 1, 2], [1, 1, 0, 1, 0, 1]),
        ([0, 1, 2, 2, 2, 2], [1, 1, 1, 1, 0, 0]),
        ([0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]),
        ([0, 0, 0, 0, 0, 1], [1, 1, 1, 0, 0, 1]),
    ],
)
def test_the_prompt_is_the_first_half_of_each_document(documents: list[int], prompt: list[int]):
    found = in_prompt(torch.tensor([documents, [0] * 6]))
    assert found.int().tolist() == [prompt, [1, 1, 1, 0, 0, 0]]


# Standard errors


def test_the_error_of_equal_documents_is_that_of_their_mean():
    means = np.random.default_rng(0).normal(4, 1, 50)
    mean, error = mean_and_error(means * 7, np.full(50, 7.0))
    assert mean == pytest.approx(means.mean())
    assert error == pytest.approx(means.std(ddof=1) / math.sqrt(50))
    mean, error = mean_and_error(np.array([8.0]), np.array([4.0]))
    assert mean == 2 and math.isnan(error)


def test_the_error_of_unequal_documents_is_the_spread_of_samples_drawn_anew():
    """Where long documents are easier, which the error of a mean of means knows nothing of."""
    rng, found = np.random.default_rng(1), []
    for _ in range(4000):
        tokens = rng.geometric(0.02, 80).astype(float)
        found.append(mean_and_error(tokens * (3 + rng.normal(0, 1, 80)) + 40, tokens))
    values, errors = np.array(found).T
    # 4000 samples tell a spread to 1.1 %; the linear error is a little low for so few documents.
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.06)


def long_documents(count: int, seed: int) -> list[list[int]]:
    """Documents of eight sequences and more, each of one sentence, said over and over."""
    rng = np.random.default_rng(seed)
    lengths = LENGTH * rng.integers(8, 15, count)
    return [
        np.resize(rng.integers(5, VOCABULARY, LENGTH // 2), length).tolist() for length in lengths
    ]


class EachAlone:
    """Sequences as if what each has of a document were a document of its own."""

    def __init__(self, data) -> None:
        self._data, self.token_bytes = data, data.token_bytes

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, first: int, count: int):
        batch = self._data.batch(first, count)
        rows = zip(batch.sequence_ids.tolist(), batch.documents, strict=True)
        return replace(
            batch,
            documents=tuple(tuple(1000 * n + d for d in documents) for n, documents in rows),
        )


def test_errors_are_the_spread_over_blocks_of_a_long_split():
    """Neighbouring sequences of a document are alike: as if independent, the error is too small."""
    blocks, size, model = 100, 12, tiny_model()
    split = long_documents(blocks * size, seed=0)
    found, as_if_independent = [], []
    for number in range(blocks):
        data = validation(split[number * size : (number + 1) * size])
        found.append(held_out_losses(handle(model), data, micro_batch=len(data)))
        assert found[-1].documents == size and len(data) >= 8 * size
        if number < 8:
            as_if_independent.append(
                held_out_losses(handle(model), EachAlone(data), micro_batch=len(data))
            )
    figures = {
        "ar_error": [f.ar_nll for f in found],
        "diffusion_error": [f.diffusion_nll for f in found],
        "prefix_error": [f.prefix_nll for f in found],
        "prefix_minus_ar_error": [f.prefix_nll - f.ar_nll_same_tokens for f in found],
    }
    for name, values in figures.items():
        spread = float(np.std(values, ddof=1))
        errors, too_small = (
            math.sqrt(np.mean([getattr(f, name) ** 2 for f in each]))
            for each in (found, as_if_independent)
        )
        # 100 blocks tell a spread to 7 %.
        assert errors == pytest.approx(spread, rel=0.2), name
        assert too_small < 0.7 * errors, name


# The same every time and everywhere


def test_repeating_changes_nothing_and_training_goes_on():
    model, data = tiny_model(), held_out(5)
    model.train()
    first = held_out_losses(handle(model), data, micro_batch=2)
    assert model.training and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.manual_seed(1)
    assert held_out_losses(handle(model), data, micro_batch=2) == first
    model.eval()
    assert held_out_losses(handle(model), data, micro_batch=2) == first
    assert not model.training


def test_another_seed_has_other_masks():
    model, data = tiny_model(), held_out(4)
    first = held_out_losses(handle(model), data, micro_batch=2)
    second = held_out_losses(handle(model), data, micro_batch=2, seed=1)
    assert first.ar_nll == second.ar_nll
    assert first.diffusion_nll != second.diffusion_nll


class Counting:
    """Count the passes of a model, and remember their shapes."""

    def __init__(self, model: DualLM) -> None:
        self.module = model
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, **options):
        assert not self.module.training and not torch.is_grad_enabled()
        self.shapes.append(tuple(input_ids.shape))
        return self.module(input_ids, **options)


def score(counts: list[int], store: str) -> list[tuple[HeldOut, list[tuple[int, ...]]]]:
    """The losses of so many sequences, and the shapes of this rank's passes, for each count."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = []
    for count in counts:
        forward = Counting(tiny_model())
        model = handle(forward, rank=rank, world_size=world)
        losses = held_out_losses(model, held_out(count), micro_batch=2)
        found.append((losses, forward.shapes))
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize(("world", "counts"), [(2, [8, 5]), (3, [3])])
def test_any_number_of_ranks_finds_exactly_the_same(world: int, counts: list[int], tmp_path: Path):
    found = on_ranks(score, counts, str(tmp_path / "store"), ranks=world, tmp_path=tmp_path)
    for case, count in enumerate(counts):
        alone = held_out_losses(handle(tiny_model()), held_out(count), micro_batch=2)
        # As many passes of one shape on every rank: ZeRO-3 waits for all of them.
        passes = 3 * math.ceil(math.ceil(count / 2) / world)
        shapes = [(2, LENGTH)] * passes
        assert [rank[case] for rank in found] == [(alone, shapes)] * world


def test_the_record_holds_the_losses():
    losses = held_out_losses(handle(tiny_model()), held_out(3), micro_batch=2)
    record = losses.record(7, 8.0)
    held = asdict(losses)
    assert held.pop("sequences") == 3
    assert record == {"kind": "eval", "step": 7, "elapsed_s": 8.0, **held}
    assert losses.metrics().items() <= record.items()


def test_documents_of_which_nothing_is_scored_tell_nothing_of_the_error():
    some = mean_and_error(np.array([2.0, 9.0, 0.0]), np.array([1.0, 3.0, 0.0]))
    assert some == mean_and_error(np.array([2.0, 9.0]), np.array([1.0, 3.0]))
    mean, error = mean_and_error(np.array([2.0, 0.0]), np.array([1.0, 0.0]))
    assert mean == 2.0 and math.isnan(error)
    assert all(map(math.isnan, mean_and_error(np.zeros(2), np.zeros(2))))
