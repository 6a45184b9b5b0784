"""Held-out losses: right by brute force, the same for any number of ranks, the same every time."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from heldout_support import (
    LENGTH,
    MASK,
    OPTIONS,
    SPECIAL,
    VOCABULARY,
    Sequences,
    score,
    tiny_model,
)
from support import on_ranks

from dualtrain.evaluate import held_out_losses
from dualtrain.evaluate.heldout import document_losses, second_halves
from dualtrain.model import DualLM, plan_attention
from dualtrain.objectives import diffusion, validation_noise
from dualtrain.recipe.schema import UniformCorruption


def prefix_losses(model: DualLM, sequences: Sequences, number: int) -> list[list[float]]:
    """Losses of second halves in prefix mode and in AR: each document in a row of its own."""
    batch = sequences.batch(number, 1)
    found: list[list[float]] = [[], []]
    for document in batch.document_ids.unique():
        positions = (batch.document_ids[0] == document).nonzero().T
        ids = batch.tokens[:, positions[0]]
        prompt = (ids.shape[1] + 1) // 2
        alone = torch.zeros(ids.shape, dtype=torch.int32)
        first = torch.arange(ids.shape[1])[None] < prompt
        for kind, losses in (("prefix", found[0]), ("causal", found[1])):
            options = {"in_prefix": first} if kind == "prefix" else {}
            plan = plan_attention(kind, alone, backend="sdpa", device="cpu", **options)
            with torch.no_grad():
                logits = model(ids, attention=plan, positions=positions).logits[0, prompt - 1 : -1]
            losses += F.cross_entropy(logits, ids[0, prompt:], reduction="none").tolist()
    return found


def row_losses(model: DualLM, sequences: Sequences, number: int, target: str = "next"):
    """Both losses of one sequence, without the code under test."""
    batch = sequences.batch(number, 1)
    example = diffusion(
        batch.tokens,
        batch.document_ids,
        mask_id=MASK,
        special_ids=SPECIAL,
        noise=validation_noise(0, [number], sequences.count, LENGTH),
        corruption=UniformCorruption(smoothing=0.0),
        target=target,
        exact=True,
    )
    losses = []
    clean, following = batch.tokens[:, :-1], batch.tokens[:, 1:]
    for kind, ids, targets, weights in (
        ("causal", clean, following, torch.ones(1, LENGTH)),
        ("full", example.input_ids, example.targets, example.weights),
    ):
        plan = plan_attention(kind, batch.document_ids, backend="sdpa", device="cpu")
        with torch.no_grad():
            logits = model(ids, attention=plan).logits
        nll = F.cross_entropy(logits[0], targets[0], reduction="none")
        losses.append(float((nll * weights[0]).sum() / LENGTH))
    return losses


@pytest.mark.parametrize("target", ["next", "in_place"])
@pytest.mark.parametrize(("count", "micro_batch"), [(6, 3), (7, 3), (2, 5), (1, 1)])
def test_losses_are_the_means_over_sequences(target: str, count: int, micro_batch: int):
    model, sequences = tiny_model(), Sequences(count)
    found = held_out_losses(model, sequences, micro_batch=micro_batch, target=target, **OPTIONS)
    rows = torch.tensor([row_losses(model, sequences, n, target) for n in range(count)]).double()
    ar, diffusion_loss = rows.mean(0).tolist()
    assert found.ar_nll == pytest.approx(ar, rel=1e-5)
    assert found.diffusion_nll == pytest.approx(diffusion_loss, rel=1e-5)
    assert abs(found.ar_nll - found.diffusion_nll) > 1e-3
    assert found.ar_bits_per_byte == pytest.approx(ar / math.log(2) / 3.0, rel=1e-5)
    assert found.diffusion_bits_per_byte == pytest.approx(diffusion_loss / math.log(2) / 3, 1e-5)
    assert (found.sequences, found.tokens) == (count, count * LENGTH)
    errors = [0.0, 0.0]
    if count > 1:
        errors = (rows.std(0) / math.sqrt(count)).tolist()
    assert [found.ar_error, found.diffusion_error] == pytest.approx(errors, rel=1e-3)


@pytest.mark.parametrize("target", ["next", "in_place"])
@pytest.mark.parametrize(("count", "micro_batch"), [(7, 3), (2, 5), (1, 1)])
def test_second_halves_are_scored_as_in_rows_of_their_own(
    target: str, count: int, micro_batch: int
):
    model, sequences = tiny_model(), Sequences(count)
    found = held_out_losses(model, sequences, micro_batch=micro_batch, target=target, **OPTIONS)
    rows = [prefix_losses(model, sequences, number) for number in range(count)]
    prefix, same = ([loss for row in rows for loss in row[mode]] for mode in (0, 1))
    assert found.prefix_tokens == len(prefix)
    assert len(prefix) < count * LENGTH / 2 or count < 4
    assert found.prefix_nll == pytest.approx(math.fsum(prefix) / len(prefix), rel=1e-5)
    assert found.ar_nll_same_tokens == pytest.approx(math.fsum(same) / len(same), rel=1e-5)
    assert abs(found.prefix_nll - found.ar_nll_same_tokens) > 1e-3
    assert found.prefix_bits_per_byte == pytest.approx(found.prefix_nll / math.log(2) / 3)


def test_losses_of_documents_add_up_to_those_of_all():
    class Numbered(Sequences):
        """Row n begins in document n and goes on in n + 1, as packed documents do."""

        def batch(self, first: int, count: int):
            rows = tuple((n, n + 1) for n in range(first, first + count))
            return replace(super().batch(first, count), documents=rows)

    model, sequences, count = tiny_model(), Numbered(7), 7
    found = document_losses(model, sequences, micro_batch=3, **OPTIONS)
    whole = held_out_losses(model, Sequences(count), micro_batch=3, **OPTIONS)
    assert found.documents.tolist() == list(range(count + 1))
    assert (found.tokens.sum(), found.prefix_tokens.sum()) == (whole.tokens, whole.prefix_tokens)
    for part, tokens, mean in (
        (found.ar, found.tokens, whole.ar_nll),
        (found.diffusion, found.tokens, whole.diffusion_nll),
        (found.prefix, found.prefix_tokens, whole.prefix_nll),
        (found.ar_same_tokens, found.prefix_tokens, whole.ar_nll_same_tokens),
    ):
        assert part.sum() / tokens.sum() == pytest.approx(mean, rel=1e-6)
    # The first document is what row 0 has before its boundary, alone.
    starts = int((sequences.batch(0, 1).document_ids[0] == 0).sum())
    assert found.tokens[0] == starts


def test_errors_of_second_halves_are_those_of_sequences_drawn_anew():
    """The spread of the figures over many sets of sequences is what the error of one set says."""
    model, sets, size = tiny_model(), 40, 24

    class Part(Sequences):
        first = 0

        def _row(self, number: int):
            return super()._row(self.first + number)

    found = []
    for number in range(sets):
        part = Part(size)
        part.first = number * size
        found.append(held_out_losses(model, part, micro_batch=size, **OPTIONS))
    for values, errors in (
        ([f.prefix_nll for f in found], [f.prefix_error for f in found]),
        (
            [f.prefix_nll - f.ar_nll_same_tokens for f in found],
            [f.prefix_minus_ar_error for f in found],
        ),
    ):
        spread = float(torch.tensor(values).double().std())
        # 40 sets tell a spread to 11 %.
        assert sum(errors) / sets == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize(
    ("documents", "second"),
    [
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]),
        ([0, 0, 0, 1, 1, 2], [0, 0, 1, 0, 1, 0]),
        ([0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 1, 1]),
        ([0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]),
    ],
)
def test_second_halves(documents: list[int], second: list[int]):
    found = second_halves(torch.tensor([documents, [0] * 6]))
    assert found.int().tolist() == [second, [0, 0, 0, 1, 1, 1]]


def test_without_second_halves_there_is_no_prefix_loss():
    class Singles(Sequences):
        def batch(self, first: int, count: int):
            batch = super().batch(first, count)
            return replace(batch, document_ids=torch.arange(LENGTH).int().expand(count, LENGTH))

    found = held_out_losses(tiny_model(), Singles(3), micro_batch=2, **OPTIONS)
    assert found.prefix_tokens == 0 and math.isnan(found.prefix_nll)
    assert math.isfinite(found.ar_nll) and math.isfinite(found.diffusion_nll)


def test_a_model_that_knows_nothing_has_the_loss_of_guessing():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    # `<s>` in front: each of the T targets counts once, whatever is masked.
    found = held_out_losses(model, Sequences(5, start=0), micro_batch=2, **OPTIONS)
    assert found.ar_nll == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert found.diffusion_nll == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert found.prefix_nll == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_repeating_changes_nothing_and_training_goes_on():
    model, sequences = tiny_model(), Sequences(5)
    model.train()
    first = held_out_losses(model, sequences, micro_batch=2, **OPTIONS)
    assert model.training and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.manual_seed(1)
    assert held_out_losses(model, sequences, micro_batch=2, **OPTIONS) == first
    model.eval()
    assert held_out_losses(model, sequences, micro_batch=2, **OPTIONS) == first
    assert not model.training


def test_only_the_first_sequences_count():
    model = tiny_model()
    three = held_out_losses(model, Sequences(5), micro_batch=2, sequences=3, **OPTIONS)
    assert three == held_out_losses(model, Sequences(3), micro_batch=2, **OPTIONS)
    everything = held_out_losses(model, Sequences(5), micro_batch=2, sequences=99, **OPTIONS)
    assert everything.sequences == 5


def test_another_seed_has_other_masks():
    model, sequences = tiny_model(), Sequences(4)
    first = held_out_losses(model, sequences, micro_batch=2, **OPTIONS)
    second = held_out_losses(model, sequences, micro_batch=2, seed=1, **OPTIONS)
    assert first.ar_nll == second.ar_nll
    assert first.diffusion_nll != second.diffusion_nll


@pytest.mark.parametrize(("world", "counts"), [(2, [8, 5]), (3, [3])])
def test_any_number_of_ranks_finds_exactly_the_same(world: int, counts: list[int], tmp_path: Path):
    found = on_ranks(score, counts, str(tmp_path / "store"), ranks=world, tmp_path=tmp_path)
    for case, count in enumerate(counts):
        alone = held_out_losses(tiny_model(), Sequences(count), micro_batch=2, **OPTIONS)
        # As many passes of one shape on every rank: ZeRO-3 waits for all of them.
        passes = 3 * math.ceil(math.ceil(count / 2) / world)
        shapes = [(2, LENGTH)] * passes
        assert [rank[case] for rank in found] == [(alone, shapes)] * world


def test_the_record_holds_the_losses():
    losses = held_out_losses(tiny_model(), Sequences(3), micro_batch=2, **OPTIONS)
    record = losses.record(7, 8.0)
    held = asdict(losses)
    assert held.pop("sequences") == 3
    assert record == {"kind": "eval", "step": 7, "elapsed_s": 8.0, **held}
    assert losses.metrics().items() <= record.items()
