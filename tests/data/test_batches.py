"""Tests of: dualtrain.data.batches: packing and rotation against what they promise, by token."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.datasets import InMemory, distinct_documents, write_dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dualtrain.common.errors import UserError
from dualtrain.data import batches, plan_files
from dualtrain.data.batches import TrainingData, ValidationData
from dualtrain.data.dataset import TokenDataset
from dualtrain.method.mixing import Mixture

ALPHAS = [Fraction(a) for a in ("1/2", "0.0805", "3/4", "1/3", "0.3333", "255/256", "1/64")]
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=14)
CORPORA = st.one_of(
    st.lists(st.integers(1, 30), min_size=30, max_size=60),
    st.lists(st.integers(1, 400), min_size=2, max_size=44),
    st.integers(300, 6000).map(lambda length: [length]),
    # A heavy tail: one document is longer than all others together.
    st.lists(st.integers(1, 40), min_size=5, max_size=40).map(lambda few: [*few, 3 * sum(few)]),
)
SMALL_CORPORA = st.one_of(LENGTHS, st.just([700]), st.just([1, 3, 400, 2, 9]))
Position = tuple[int, int]


def mixture(alpha: object = None, **options: object) -> Mixture:
    """A mixture that rotates by alpha; None: not at all."""
    values = {"steps": 100, "slots": 2, "micro_batch": 2, "rotation": alpha is not None} | options
    return Mixture(alpha=Fraction(1, 2) if alpha is None else alpha, **values)  # type: ignore[arg-type]


def training_data(lengths: list[int], alpha: object = None, **options: object) -> TrainingData:
    values = {
        "mixture": mixture(alpha),
        "sequence_length": 5,
        "seed": 3,
        "unique_tokens": None,
        "append_eos": False,
    } | options
    return TrainingData(InMemory(distinct_documents(lengths)), **values)  # type: ignore[arg-type]


def packed(lengths: list[int], *, append_eos: bool = False) -> list[list[int]]:
    return [[1, *d, *([2] if append_eos else [])] for d in distinct_documents(lengths)]


def read_batch(data: TrainingData, stream: str, first: int) -> list[list[Position]]:
    """The positions (document, place in it) that the rows of a batch really hold.

    Tokens are distinct, so the input tells the place; the target has to be the next one.
    """
    batch = data.batch(stream, first)  # type: ignore[arg-type]
    lengths = data.dataset.lengths.tolist()
    begins = (np.cumsum(lengths) - lengths + 16).tolist()
    rows = []
    for inputs, targets, ids, documents in zip(
        batch.inputs.tolist(),
        batch.targets.tolist(),
        batch.document_ids.tolist(),
        batch.documents,
        strict=True,
    ):
        row = []
        for token, target, number in zip(inputs, targets, ids, strict=True):
            document = documents[number]
            place = 0 if token == 1 else token - begins[document] + 1
            following = begins[document] + place if place < lengths[document] else 2
            assert 0 <= place <= lengths[document] and target == following
            row.append((document, place))
        rows.append(row)
    return rows


def read_stream(data: TrainingData, stream: str, sequences: int) -> list[Position]:
    """The positions of a stream's first sequences, in the order in which they are read."""
    return [
        position
        for first in range(0, sequences, data.micro_batch)
        for row in read_batch(data, stream, first)
        for position in row
    ]


def read_run(data: TrainingData, mix: Mixture) -> dict[str, Counter[Position]]:
    """How often a whole run reads each position with each objective."""
    counts: dict[str, Counter[Position]] = {"ar": Counter(), "diffusion": Counter()}
    for step in range(mix.steps):
        for slot in mix.slots(step):
            for row in read_batch(data, slot.stream, slot.first_sequence):
                counts[slot.objective].update(row)
    return counts


def unique_positions(data: TrainingData, *, append_eos: bool) -> list[Position]:
    """The positions of the unique subset: the first ones of the corpus."""
    lengths = data.dataset.lengths.tolist()
    every = [(d, place) for d, n in enumerate(lengths) for place in range(n + append_eos)]
    return every[: data.unique_tokens]


@st.composite
def runs(draw: st.DrawFn) -> tuple[TrainingData, Mixture, Fraction, bool]:
    """Runs over any corpus, with any alpha and number of repetitions, whole or not."""
    lengths, append_eos = draw(CORPORA), draw(st.booleans())
    alpha = draw(st.one_of(st.sampled_from(ALPHAS), st.fractions(0, 1, max_denominator=300)))
    repetitions = draw(st.sampled_from([Fraction(r) for r in ("1", "2", "8", "2.5", "0.5", "7.3")]))
    slots, micro_batch = draw(st.sampled_from([(1, 1), (2, 2), (5, 1), (3, 2)]))
    length = draw(st.sampled_from([4, 7, 16]))
    room = min(sum(lengths) + append_eos * len(lengths), 1200)
    step = slots * micro_batch * length
    steps = int(room * repetitions / step)
    assume(steps >= 1)
    mix = mixture(alpha, steps=steps, slots=slots, micro_batch=micro_batch)
    data = training_data(
        lengths,
        mixture=mix,
        sequence_length=length,
        seed=draw(st.integers(0, 5)),
        unique_tokens=int(steps * step / repetitions),
        append_eos=append_eos,
    )
    return data, mix, alpha, append_eos


@settings(max_examples=150, deadline=None)
@given(runs())
def test_every_token_has_its_share_of_passes(run: tuple) -> None:
    """Read R times, by AR alpha·R times, both rounded up or down: whatever the corpus."""
    data, mix, alpha, append_eos = run
    counts = read_run(data, mix)
    positions = unique_positions(data, append_eos=append_eos)
    assert counts["ar"].keys() | counts["diffusion"].keys() <= set(positions)
    ar = [counts["ar"][position] for position in positions]
    both = [counts["diffusion"][position] + n for position, n in zip(positions, ar, strict=True)]
    for found in (ar, both):
        # Not one token is read twice as long as there is one that could have been read instead.
        assert max(found) - min(found) <= 1
    slot = data.micro_batch * data.sequence_length
    assert abs(sum(ar) - alpha * sum(both)) <= slot / 2


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.sampled_from(ALPHAS), st.booleans())
def test_whole_numbers_of_passes_are_the_same_for_every_token(
    lengths: list[int], alpha: Fraction, append_eos: bool
) -> None:
    unique = sum(lengths) + append_eos * len(lengths)
    repetitions = alpha.denominator
    while repetitions < 6 or repetitions * unique < 40:
        repetitions += alpha.denominator
    assume(repetitions * unique < 3000)
    # One sequence of one token in a slot: steps and slots fit any number of passes.
    mix = mixture(alpha, steps=repetitions * unique, slots=1, micro_batch=1)
    data = training_data(lengths, mixture=mix, sequence_length=1, append_eos=append_eos)
    counts = read_run(data, mix)
    everyone = unique_positions(data, append_eos=append_eos)
    assert counts["ar"] == dict.fromkeys(everyone, alpha * repetitions)
    assert counts["diffusion"] == dict.fromkeys(everyone, (1 - alpha) * repetitions)


@settings(max_examples=60, deadline=None)
@given(CORPORA, st.lists(st.fractions(0, 1, max_denominator=60), min_size=1, max_size=8))
def test_a_schedule_of_alpha_gives_every_token_its_sum(
    lengths: list[int], table: list[Fraction]
) -> None:
    steps = 24
    mix = mixture(lambda step: table[step * len(table) // steps], steps=steps, slots=3)
    step = 3 * mix.micro_batch * 5
    assume(sum(lengths) >= step)
    unique = min(sum(lengths), 6 * step)
    data = training_data(lengths, mixture=mix, unique_tokens=unique)
    counts = read_run(data, mix)
    ar = [counts["ar"][position] for position in unique_positions(data, append_eos=False)]
    assert max(ar) - min(ar) <= 1
    wanted = sum(table[n * len(table) // steps] for n in range(steps)) * step
    assert abs(sum(ar) - wanted) <= data.micro_batch * 5 / 2


@settings(max_examples=20, deadline=None)
@given(SMALL_CORPORA, st.sampled_from(ALPHAS), st.integers(0, 9))
def test_the_objectives_share_every_epoch_as_a_walk_round_a_circle_does(
    lengths: list[int], alpha: Fraction, seed: int
) -> None:
    """The same by brute force: a finger goes round all positions, one token at a time."""
    mix = mixture(alpha, steps=10**6, slots=1, micro_batch=1)
    data = training_data(lengths, mixture=mix, sequence_length=1, seed=seed)
    unique = data.unique_tokens
    rotation = data._plans["ar"]._rotation
    assert rotation is not None
    circle = []
    for unit in rotation.circle().tolist():
        document, begin = rotation._units.locate(unit)
        size = int(rotation._units.lengths(np.array([unit]))[0])
        circle += [(document, begin + n) for n in range(size)]
    assert sorted(circle) == unique_positions(data, append_eos=False)
    walker, other = ("ar", "diffusion") if alpha <= Fraction(1, 2) else ("diffusion", "ar")
    share, finger, read = min(alpha, 1 - alpha), 0, {walker: 0, other: 0}
    # A slot is one token here: what the walker has of the first epochs are its slots in them.
    turns = [mix.slots(step)[0].objective == walker for step in range(4 * unique)]
    for epoch in range(4):
        upto = sum(turns[: (epoch + 1) * unique])
        wanted = [circle[n % unique] for n in range(finger, upto)]
        assert abs(len(wanted) - share * unique) <= 1
        for stream, positions in (
            (walker, wanted),
            (other, set(circle) - set(wanted)),
        ):
            found = [
                position
                for n in range(read[stream], read[stream] + len(positions))
                for row in read_batch(data, stream, n)
                for position in row
            ]
            assert Counter(found) == Counter(positions)
            read[stream] += len(positions)
        finger = upto


@settings(max_examples=60, deadline=None)
@given(CORPORA, st.sampled_from([None, *ALPHAS]), st.sampled_from(["ar", "diffusion"]))
def test_documents_are_cut_only_where_they_must_be(
    lengths: list[int], alpha: Fraction | None, stream: str
) -> None:
    """Sequences in the order of the text: documents follow one another, whole but for few."""
    assume(alpha is None or alpha.denominator < 60)
    data = training_data(lengths, alpha, sequence_length=2)
    plan, unique = data._plans[stream], data.unique_tokens  # type: ignore[index]
    pieces = plan.pieces(0, plan.epoch_start(6))
    longest = max(math.ceil(unique / 64), 16 * 2)
    whole = {d: -(-n // -(-n // longest)) for d, n in enumerate(lengths)}
    cut = sum(
        piece.start % whole[piece.document] != 0
        or piece.stop not in (lengths[piece.document], piece.start + whole[piece.document])
        for piece in pieces
        # Two pieces of one document may happen to follow each other.
        if piece.stop - piece.start <= whole[piece.document]
    )
    # Two a pass, where the other objective's part begins and ends; each leaves two pieces.
    assert cut <= (0 if alpha is None else 4 * 6)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.sampled_from([None, *ALPHAS]), st.lists(st.integers(0, 60), max_size=8))
def test_any_batch_equals_the_sequential_walk(
    lengths: list[int], alpha: Fraction | None, sequences: list[int]
) -> None:
    """Random access does not depend on what was read before."""
    walked = training_data(lengths, alpha)
    rows = [row for first in range(0, 64, 2) for row in read_batch(walked, "diffusion", first)]
    data = training_data(lengths, alpha)
    for first in sequences:
        assert read_batch(data, "diffusion", first) == rows[first : first + 2]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from([None, *ALPHAS]), st.integers(0, 40))
def test_document_ids_restart_and_count(
    lengths: list[int], alpha: Fraction | None, first: int
) -> None:
    batch = training_data(lengths, alpha).batch("diffusion", first)
    assert batch.inputs.shape == batch.targets.shape == batch.document_ids.shape == (2, 5)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.document_ids.dtype == torch.int32
    assert batch.sequence_ids.tolist() == [first, first + 1]
    for inputs, targets, ids, documents in zip(
        batch.inputs, batch.targets, batch.document_ids, batch.documents, strict=True
    ):
        # A document goes on exactly where the input is the target of the one before.
        breaks = (inputs[1:] != targets[:-1]).long().cumsum(0)
        assert ids.tolist() == [0, *breaks.tolist()]
        assert len(documents) == 1 + int(breaks[-1])


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 200), st.integers(1, 200), st.booleans())
def test_subsets_are_nested_prefixes(
    lengths: list[int], one: int, other: int, append_eos: bool
) -> None:
    """A smaller unique subset holds the first tokens of the corpus, and of any larger one."""
    everything = sum(lengths) + append_eos * len(lengths)
    small, large = sorted((min(one, everything), min(other, everything)))
    contents = []
    for unique in (small, large):
        data = training_data(
            lengths, unique_tokens=unique, append_eos=append_eos, sequence_length=1
        )
        assert data.unique_tokens == unique
        contents.append(set(read_stream(data, "all", unique)[:unique]))
        assert contents[-1] == set(unique_positions(data, append_eos=append_eos))
    assert contents[0] <= contents[1]


def test_a_batch_mixes_passages_of_many_documents() -> None:
    """16 sequences come from as many documents as 16 places drawn at random do."""
    lengths = [500] * 60
    data = training_data(lengths, mixture=mixture(micro_batch=16), sequence_length=20)
    documents = [
        len({number for row in data.batch("ar", first).documents for number in row})
        for first in range(0, 1440, 16)
    ]
    drawn = np.random.default_rng(0).integers(0, 30_000 - 20, (2000, 16))
    expected = np.mean([len(set(row // 500) | set((row + 19) // 500)) for row in drawn])
    assert np.mean(documents) == pytest.approx(expected, rel=0.03)


def test_no_token_is_dropped_between_epochs_however_sequences_fall() -> None:
    """103 tokens and 10 a sequence: epochs begin within sequences, which are read in any order."""
    data = training_data([50, 33, 20], sequence_length=10)
    for epochs in range(1, 12):
        read = Counter(read_stream(data, "all", 104)[: 103 * epochs // 10 * 10])
        assert set(read.values()) <= {epochs - 1, epochs}
    assert set(Counter(read_stream(data, "all", 1030)).values()) == {100}


def test_sequences_are_shuffled_anew_in_every_epoch_and_stream() -> None:
    data = training_data([1000], sequence_length=10, unique_tokens=1000)
    plans = data._plans
    orders = [
        [plans[stream].sequence(100 * epoch + n)[0].start for n in range(100)]  # type: ignore[index]
        for stream in ("ar", "diffusion", "all")
        for epoch in (0, 1, 2)
    ]
    assert all(len(set(order)) > 90 for order in orders)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    # Far from the order of the text.
    for order in orders:
        neighbours = sum(b - a == 10 for a, b in zip(order, order[1:], strict=False))
        assert neighbours < 8


def test_runs_with_different_alpha_share_their_order() -> None:
    """What two runs have in common they see in the same order, so that they can be compared."""
    lengths = [3] * 40

    def documents(alpha: Fraction) -> list[int]:
        plan = training_data(lengths, alpha)._plans["ar"]
        return [piece.document for piece in plan.pieces(0, plan.epoch_start(1))]

    whole, part = documents(Fraction(1)), documents(Fraction(3, 4))
    assert len(whole) == 40 and len(part) == 30
    # The rest of an arc's two ends apart, which hold the walk of the other objective together.
    kept = [document for document in whole if document in part]
    assert sum(a == b for a, b in zip(kept, part, strict=True)) >= 28


def test_one_huge_document_is_mixed_like_many() -> None:
    """At R = 1 and alpha 1/2 each objective has text from everywhere in it, not one half."""
    data = training_data([20_000], Fraction(1, 2), mixture=mixture(Fraction(1, 2), steps=1000))
    plan = data._plans["ar"]
    pieces = plan.pieces(0, plan.epoch_start(1))
    assert sum(piece.stop - piece.start for piece in pieces) == 10_000
    places = np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces])
    quarters = np.bincount(places // 5000, minlength=4)
    assert quarters.min() > 1000
    assert len(pieces) > 20


def test_more_tokens_than_there_are() -> None:
    with pytest.raises(UserError, match="1,000 tokens are more.*at most 10") as caught:
        training_data([4, 6], unique_tokens=1000)
    assert caught.value.where == "unique_tokens"
    with pytest.raises(UserError, match="at most 12.*with </s>"):
        training_data([4, 6], unique_tokens=15, append_eos=True)


def test_one_document_shorter_than_a_sequence() -> None:
    data = training_data([2], sequence_length=7)
    batch = data.batch("ar", 0)
    assert batch.inputs[0].tolist() == [1, 16, 1, 16, 1, 16, 1]
    assert batch.targets[0].tolist() == [16, 17, 16, 17, 16, 17, 16]
    assert batch.document_ids[0].tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert batch.documents[0] == (0, 0, 0, 0)
    ended = training_data([2], sequence_length=7, append_eos=True).batch("ar", 0)
    assert ended.inputs[0].tolist() == [1, 16, 17, 1, 16, 17, 1]
    assert ended.targets[0].tolist() == [16, 17, 2, 16, 17, 2, 16]


def test_no_sequence_before_the_first_nor_of_an_empty_stream() -> None:
    with pytest.raises(ValueError, match="no token -5"):
        training_data([4]).batch("ar", -1)
    ends = training_data([400], lambda step: Fraction(step < 50))
    assert ends.batch("ar", 98).inputs.shape == (2, 5)
    with pytest.raises(ValueError, match="no token"):
        ends.batch("ar", 400)


@pytest.mark.parametrize("alpha", [Fraction(1, 4), None])
def test_ranks_together_read_what_one_rank_reads(alpha: Fraction | None) -> None:
    mix = Mixture(alpha=Fraction(1, 4), steps=8, slots=4, micro_batch=2, rotation=alpha is not None)

    def read(world_size: int, step: int) -> list[str]:
        rows = []
        for rank in range(world_size):
            data = training_data([5] * 20, mixture=mix)  # each rank has its own
            for slot in mix.for_rank(step, rank, world_size):
                batch = data.batch(slot.stream, slot.first_sequence)
                rows.append(f"{slot.index} {slot.objective} {batch.inputs.tolist()}")
        return sorted(rows)

    for step in range(8):
        assert read(1, step) == read(2, step) == read(4, step)


PRINT_HASH = """
import hashlib, sys
from fractions import Fraction
from dualtrain.data.batches import TrainingData
from dualtrain.data.dataset import TokenDataset
from dualtrain.method.mixing import Mixture
mixture = Mixture(alpha=Fraction(1, 4), steps=100, slots=4, micro_batch=3, rotation=True)
data = TrainingData(TokenDataset.open(sys.argv[1]), mixture=mixture, sequence_length=16, seed=1,
                    unique_tokens=700, append_eos=True)
text = repr([data.batch(s, i).inputs.tolist() for s in ("diffusion", "ar") for i in (40, 3, 0)])
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_another_process_reads_the_same(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data", distinct_documents([30] * 25), shard_bytes=500)
    data = TrainingData(
        TokenDataset.open(path),
        mixture=mixture(Fraction(1, 4), slots=4, micro_batch=3),
        sequence_length=16,
        seed=1,
        unique_tokens=700,
        append_eos=True,
    )
    rows = {
        (s, i): data.batch(s, i).inputs.tolist() for i in (0, 3, 40) for s in ("ar", "diffusion")
    }
    text = repr([rows[s, i] for s in ("diffusion", "ar") for i in (40, 3, 0)])
    other = subprocess.run(
        [sys.executable, "-c", PRINT_HASH, str(path)],
        env=os.environ | {"PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == hashlib.sha256(text.encode()).hexdigest()


def test_damaged_token_names_the_shard(tmp_path: Path) -> None:
    """Ids that preflight did not look at are caught before they reach the embedding."""
    documents = distinct_documents([9] * 60)
    documents[37][4] = 5000
    path = write_dataset(tmp_path / "data", documents, shard_bytes=300)
    dataset = TokenDataset.open(path, check=False)
    data = TrainingData(
        dataset,
        mixture=mixture(micro_batch=1),
        sequence_length=540,
        seed=0,
        unique_tokens=None,
        append_eos=False,
    )
    with pytest.raises(UserError, match="document 37 has token id 5000") as caught:
        data.batch("ar", 0)
    assert caught.value.where == str(dataset.shard_of(37))


@pytest.mark.parametrize("append_eos", [False, True])
def test_validation_is_the_split_in_order(append_eos: bool) -> None:
    lengths = [4, 9, 2, 7, 8]
    documents = packed(lengths, append_eos=append_eos)
    inputs = [token for document in documents for token in document[:-1]]
    targets = [token for document in documents for token in document[1:]]
    dataset = InMemory(distinct_documents(lengths))
    data = ValidationData(dataset, sequence_length=6, append_eos=append_eos)  # type: ignore[arg-type]
    assert len(data) == len(inputs) // 6
    found = data.batch(0, 100)
    for tokens, flat in ((found.inputs, inputs), (found.targets, targets)):
        assert tokens.tolist() == [flat[i * 6 : i * 6 + 6] for i in range(len(data))]
    part = data.batch(len(data) - 1, 2)
    assert part.inputs.tolist() == found.inputs[-1:].tolist()
    assert part.sequence_ids.tolist() == [len(data) - 1]


def test_few_validation_sequences_are_spread_over_the_whole_split() -> None:
    dataset = InMemory(distinct_documents([50] * 40))
    data = ValidationData(dataset, sequence_length=10, append_eos=False, sequences=20)  # type: ignore[arg-type]
    rows = [row[0] for row in data.batch(0, 20).documents]
    assert rows == list(range(0, 40, 2))


def test_validation_split_shorter_than_a_sequence() -> None:
    with pytest.raises(UserError, match="has 10 tokens.*12.*val_fraction"):
        ValidationData(
            InMemory(distinct_documents([5, 5])),  # type: ignore[arg-type]
            sequence_length=12,
            append_eos=False,
        )


def test_large_corpora_keep_plans_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files change nothing but where the arrays are, and old epochs are removed."""
    monkeypatch.setattr(plan_files, "_AHEAD_AFTER_S", 0.0)
    lengths = [1 + i % 7 for i in range(200)]
    expected = training_data(lengths, Fraction(3, 4))
    monkeypatch.setattr(batches, "DOCUMENTS_IN_MEMORY", 10)
    data = training_data(lengths, Fraction(3, 4), plan_dir=tmp_path)
    for first in range(0, 1200, 50):
        for stream in ("ar", "diffusion", "all"):
            assert torch.equal(
                data.batch(stream, first).inputs, expected.batch(stream, first).inputs
            )
    (directory,) = tmp_path.iterdir()
    assert len(list(directory.glob("ar-*.npy"))) <= 3, "this part, the next, perhaps the last"
    again = training_data(lengths, Fraction(3, 4), plan_dir=tmp_path)
    for first in (999, 3):
        assert torch.equal(again.batch("ar", first).inputs, expected.batch("ar", first).inputs)
    other = training_data(lengths, Fraction(1, 2), plan_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "other settings, other files"
    del data, again
    for thread in threading.enumerate():
        if thread.name.startswith("plan-"):  # what is built ahead is still in use
            thread.join()
    training_data(lengths, Fraction(1, 4), plan_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "what nobody uses any more is removed"
    assert not directory.exists() and other.batch("ar", 0)


def test_small_corpora_write_no_plans(tmp_path: Path) -> None:
    training_data([3] * 50, Fraction(1, 2), plan_dir=tmp_path).batch("ar", 0)
    assert not list(tmp_path.iterdir())


def test_tokens_are_taken_as_they_are_stored() -> None:
    """The largest id that 16 bits hold comes through as itself."""
    dataset = InMemory([[65535, 16]])
    data = TrainingData(
        dataset,  # type: ignore[arg-type]
        mixture=mixture(micro_batch=1),
        sequence_length=2,
        seed=0,
        unique_tokens=None,
        append_eos=False,
    )
    assert data.batch("all", 0).inputs.tolist() == [[1, 65535]]
    assert data.batch("all", 0).targets.tolist() == [[65535, 16]]
    assert np.uint16(65535) == dataset.read(0, 0, 1)[0]
