"""Packing and rotation against what they promise, token by token."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import InMemory, distinct_documents, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtrain.data import batches
from dualtrain.data.batches import TrainingData, ValidationData
from dualtrain.data.dataset import TokenDataset
from dualtrain.errors import UserError
from dualtrain.mixing import Mixture, rotation_groups

ALPHAS = [Fraction(a) for a in ("1/2", "1/4", "3/4", "1/3", "1/8", "5/6", "0", "1")]
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=14)


def training_data(lengths: list[int], **options: object) -> TrainingData:
    values = {
        "sequence_length": 5,
        "micro_batch": 2,
        "seed": 3,
        "unique_tokens": None,
        "alpha": None,
    } | options
    return TrainingData(InMemory(distinct_documents(lengths)), **values)  # type: ignore[arg-type]


def stream_tokens(data: TrainingData, stream: str, count: int) -> list[tuple[int, int]]:
    """The first tokens of a stream as (document, token), from consecutive batches."""
    found: list[tuple[int, int]] = []
    sequence, last = 0, None
    while len(found) < count:
        batch = data.batch(stream, sequence)  # type: ignore[arg-type]
        for row, ids, documents in zip(
            batch.tokens, batch.document_ids, batch.documents, strict=True
        ):
            assert last is None or row[0] == last, "a sequence begins with the last one's last"
            last = row[-1]
            pairs = zip(row[:-1].tolist(), ids.tolist(), strict=True)
            found += [(documents[i], token) for token, i in pairs]
        sequence += data.micro_batch
    return found[:count]


def packed(lengths: list[int], *, append_eos: bool = False) -> list[list[int]]:
    return [[1, *d, *([2] if append_eos else [])] for d in distinct_documents(lengths)]


@settings(max_examples=60, deadline=None)
@given(
    LENGTHS,
    st.sampled_from(ALPHAS),
    st.integers(0, 5),
    st.booleans(),
    st.floats(0.05, 1),
    st.integers(2, 11),
)
def test_every_token_has_exactly_its_passes(
    lengths: list[int],
    alpha: Fraction,
    seed: int,
    append_eos: bool,
    share: float,
    sequence_length: int,
) -> None:
    """Over R epochs, R a multiple of G: alpha·R passes in AR, (1 - alpha)·R in diffusion."""
    everything = sum(map(len, packed(lengths, append_eos=append_eos)))
    unique = max(1, int(share * everything))
    data = training_data(
        lengths,
        alpha=alpha,
        seed=seed,
        append_eos=append_eos,
        unique_tokens=unique,
        sequence_length=sequence_length,
    )
    flat = [
        (document, token)
        for document, tokens in enumerate(packed(lengths, append_eos=append_eos))
        for token in tokens
    ]
    repetitions = 2 * rotation_groups(alpha)
    for stream, passes in {
        "ar": alpha * repetitions,
        "diffusion": repetitions * (1 - alpha),
    }.items():
        if passes:
            found = Counter(stream_tokens(data, stream, int(passes) * unique))
            assert found == {pair: passes for pair in flat[:unique]}


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from(ALPHAS[:-2]), st.sampled_from(["ar", "diffusion", "all"]))
def test_documents_stay_whole_and_epochs_hold_each_once(
    lengths: list[int], alpha: Fraction, stream: str
) -> None:
    """The stream is a concatenation of whole documents, none twice in an epoch."""
    data = training_data(lengths, alpha=alpha)
    found = stream_tokens(data, stream, 6 * data.unique_tokens)
    plan = data._plans[stream]  # type: ignore[index]
    epoch, position = 0, 0
    while (end := plan.epoch_start(epoch + 1)) <= len(found):
        seen = []
        while position < end:
            document = found[position][0]
            whole = [(document, token) for token in packed(lengths)[document]]
            assert found[position : position + len(whole)] == whole
            seen.append(document)
            position += len(whole)
        assert len(set(seen)) == len(seen)
        assert position == end
        epoch += 1


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.sampled_from([None, *ALPHAS[:-2]]), st.lists(st.integers(0, 60), max_size=8))
def test_any_batch_equals_the_sequential_walk(
    lengths: list[int], alpha: Fraction | None, sequences: list[int]
) -> None:
    """Random access does not depend on what was read before."""
    walked = training_data(lengths, alpha=alpha)
    tokens = [token for _, token in stream_tokens(walked, "ar", 63 * 5 + 1)]
    data = training_data(lengths, alpha=alpha)
    for first in sequences:
        batch = data.batch("ar", first)
        for row, i in zip(batch.tokens.tolist(), batch.sequence_ids.tolist(), strict=True):
            assert row == tokens[i * 5 : i * 5 + 6]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from([None, *ALPHAS[:-2]]), st.integers(0, 40))
def test_document_ids_restart_and_count(
    lengths: list[int], alpha: Fraction | None, first: int
) -> None:
    batch = training_data(lengths, alpha=alpha).batch("diffusion", first)
    assert batch.tokens.shape == (2, 6) and batch.tokens.dtype == torch.int64
    assert batch.document_ids.shape == (2, 5) and batch.document_ids.dtype == torch.int32
    assert batch.sequence_ids.tolist() == [first, first + 1]
    for row, ids, documents in zip(batch.tokens, batch.document_ids, batch.documents, strict=True):
        starts = (row == 1).long()
        starts[0] = 0
        assert ids.tolist() == starts.cumsum(0)[:-1].tolist()
        assert len(documents) == 1 + int(starts.sum())


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 200), st.integers(1, 200))
def test_subsets_are_nested_prefixes(lengths: list[int], one: int, other: int) -> None:
    """A smaller unique subset holds the first tokens of the corpus, and of any larger one."""
    flat = [(d, t) for d, tokens in enumerate(packed(lengths)) for t in tokens]
    small, large = sorted((min(one, len(flat)), min(other, len(flat))))
    contents = []
    for unique in (small, large):
        data = training_data(lengths, unique_tokens=unique)
        assert data.unique_tokens == unique
        contents.append(set(stream_tokens(data, "all", unique)))
        assert contents[-1] == set(flat[:unique])
    assert contents[0] <= contents[1]


def test_streams_and_epochs_have_their_own_shuffles() -> None:
    data = training_data([3] * 40)
    tokens = {s: stream_tokens(data, s, 320) for s in ("ar", "diffusion", "all")}
    orders = [tokens[s][epoch * 160 : epoch * 160 + 160] for s in tokens for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert stream_tokens(training_data([3] * 40, seed=4), "ar", 160) != orders[0]


def test_runs_with_different_alpha_share_their_order() -> None:
    """What two runs have in common they see in the same order, so that they can be compared."""
    whole = stream_tokens(training_data([3] * 40, alpha=Fraction(1)), "ar", 160)
    data = training_data([3] * 40, alpha=Fraction(3, 4))
    part = stream_tokens(data, "ar", 120)
    documents = {document for document, _ in part}
    assert len(documents) == 30
    assert part == [pair for pair in whole if pair[0] in documents]


def test_more_tokens_than_there_are() -> None:
    with pytest.raises(UserError, match="1,000 tokens are more.*at most 12") as caught:
        training_data([4, 6], unique_tokens=1000)
    assert caught.value.where == "unique_tokens"
    with pytest.raises(UserError, match="at most 14.*<s> and </s>"):
        training_data([4, 6], unique_tokens=15, append_eos=True)


def test_more_groups_than_documents() -> None:
    """With 2 documents and 256 groups nearly every epoch of the AR stream is empty."""
    alpha = Fraction(1, 256)
    data = training_data([4, 6], alpha=alpha)
    found = stream_tokens(data, "ar", 3 * 12)
    flat = [(d, t) for d, tokens in enumerate(packed([4, 6])) for t in tokens]
    assert Counter(found) == dict.fromkeys(flat, 3)
    assert data.epoch("ar", 30 // 5) >= 512
    assert Counter(stream_tokens(data, "diffusion", 255 * 12)) == dict.fromkeys(flat, 255)


def test_epoch_of_a_sequence() -> None:
    data = training_data([9] * 4, sequence_length=10, alpha=Fraction(1, 2))
    assert [data.epoch("ar", i) for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [data.epoch("all", i) for i in range(9)] == [0] * 4 + [1] * 4 + [2]


def test_one_document_shorter_than_a_sequence() -> None:
    data = training_data([2], sequence_length=7)
    batch = data.batch("ar", 0)
    assert batch.tokens[0].tolist() == [1, 16, 17, 1, 16, 17, 1, 16]
    assert batch.document_ids[0].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert batch.documents[0] == (0, 0, 0)


def test_no_sequence_before_the_first() -> None:
    with pytest.raises(ValueError, match="no token -5"):
        training_data([4]).batch("ar", -1)


@pytest.mark.parametrize("alpha", [Fraction(1, 4), None])
def test_ranks_together_read_what_one_rank_reads(alpha: Fraction | None) -> None:
    mixture = Mixture(
        alpha=Fraction(1, 4), steps=8, slots=4, micro_batch=2, rotation=alpha is not None
    )

    def read(world_size: int, step: int) -> list[str]:
        rows = []
        for rank in range(world_size):
            data = training_data([5] * 20, alpha=alpha)  # each rank has its own
            for slot in mixture.for_rank(step, rank, world_size):
                batch = data.batch(slot.stream, slot.first_sequence)
                rows.append(f"{slot.index} {slot.objective} {batch.tokens.tolist()}")
        return sorted(rows)

    for step in range(8):
        assert read(1, step) == read(2, step) == read(4, step)


PRINT_HASH = """
import hashlib, sys
from fractions import Fraction
from dualtrain.data.batches import TrainingData
from dualtrain.data.dataset import TokenDataset
data = TrainingData(TokenDataset.open(sys.argv[1]), sequence_length=16, micro_batch=3, seed=1,
                    unique_tokens=700, alpha=Fraction(1, 4))
text = repr([data.batch(s, i).tokens.tolist() for s in ("diffusion", "ar") for i in (40, 3, 0)])
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_another_process_reads_the_same(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data", distinct_documents([30] * 25), shard_bytes=500)
    data = TrainingData(
        TokenDataset.open(path),
        sequence_length=16,
        micro_batch=3,
        seed=1,
        unique_tokens=700,
        alpha=Fraction(1, 4),
    )
    rows = {
        (s, i): data.batch(s, i).tokens.tolist() for i in (0, 3, 40) for s in ("ar", "diffusion")
    }
    text = repr([rows[s, i] for s in ("diffusion", "ar") for i in (40, 3, 0)])
    other = subprocess.run(
        [sys.executable, "-c", PRINT_HASH, str(path)],
        env=os.environ | {"PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert other.stdout.strip() == hashlib.sha256(text.encode()).hexdigest()


def test_damaged_token_names_the_shard(tmp_path: Path) -> None:
    """Ids that preflight did not look at are caught before they reach the embedding."""
    documents = distinct_documents([9] * 60)
    documents[37][4] = 5000
    path = write_dataset(tmp_path / "data", documents, shard_bytes=300)
    dataset = TokenDataset.open(path, check=False)
    data = TrainingData(
        dataset, sequence_length=600, micro_batch=1, seed=0, unique_tokens=None, alpha=None
    )
    with pytest.raises(UserError, match="document 37 has token id 5000") as caught:
        data.batch("ar", 0)
    assert caught.value.where == str(dataset.shard_of(37))


@pytest.mark.parametrize("append_eos", [False, True])
def test_validation_is_the_split_in_order(append_eos: bool) -> None:
    lengths = [4, 9, 2, 7, 8]
    flat = [token for document in packed(lengths, append_eos=append_eos) for token in document]
    dataset = InMemory(distinct_documents(lengths))
    data = ValidationData(dataset, sequence_length=6, append_eos=append_eos)  # type: ignore[arg-type]
    assert len(data) == (len(flat) - 1) // 6
    found = data.batch(0, 100)
    assert found.tokens.tolist() == [flat[i * 6 : i * 6 + 7] for i in range(len(data))]
    part = data.batch(len(data) - 1, 2)
    assert part.tokens.tolist() == found.tokens[-1:].tolist()
    assert part.sequence_ids.tolist() == [len(data) - 1]
    assert data.bytes_per_token == pytest.approx(4 * sum(lengths) / len(flat))
    assert len(ValidationData(dataset, sequence_length=6, sequences=2)) == 2  # type: ignore[arg-type]


def test_validation_split_shorter_than_a_sequence() -> None:
    with pytest.raises(UserError, match="has 12 tokens.*13.*val_fraction"):
        ValidationData(InMemory(distinct_documents([5, 5])), sequence_length=12)  # type: ignore[arg-type]


def test_large_corpora_keep_plans_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files change nothing but where the arrays are, and old epochs are removed."""
    lengths = [1 + i % 7 for i in range(200)]
    expected = training_data(lengths, alpha=Fraction(3, 4))
    monkeypatch.setattr(batches, "DOCUMENTS_IN_MEMORY", 10)
    data = training_data(lengths, alpha=Fraction(3, 4), plan_dir=tmp_path)
    for first in range(0, 1200, 50):
        for stream in ("ar", "diffusion", "all"):
            assert torch.equal(
                data.batch(stream, first).tokens, expected.batch(stream, first).tokens
            )
    (directory,) = tmp_path.iterdir()
    assert len(list(directory.glob("groups-*.npy"))) == 1
    assert len(list(directory.glob("ar-*.npy"))) <= 4
    again = training_data(lengths, alpha=Fraction(3, 4), plan_dir=tmp_path)
    for first in (999, 3):
        assert torch.equal(again.batch("ar", first).tokens, expected.batch("ar", first).tokens)
    other = training_data(lengths, alpha=Fraction(1, 2), plan_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "other settings, other files"
    del data, again
    training_data(lengths, alpha=Fraction(1, 4), plan_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "what nobody uses any more is removed"
    assert not directory.exists() and other.batch("ar", 0)


def test_small_corpora_write_no_plans(tmp_path: Path) -> None:
    training_data([3] * 50, alpha=Fraction(1, 2), plan_dir=tmp_path).batch("ar", 0)
    assert not list(tmp_path.iterdir())


def test_tokens_are_taken_as_they_are_stored() -> None:
    """The largest id that 16 bits hold comes through as itself."""
    dataset = InMemory([[65535, 16]])
    data = TrainingData(
        dataset,  # type: ignore[arg-type]
        sequence_length=2,
        micro_batch=1,
        seed=0,
        unique_tokens=None,
        alpha=None,
    )
    assert data.batch("all", 0).tokens.tolist() == [[1, 65535, 16]]
    assert np.uint16(65535) == dataset.read(0, 0, 1)[0]
