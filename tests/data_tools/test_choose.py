"""Tests of: data_tools.choose: a pure function of lengths, hashes and settings."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.choose import Choice, choose_documents, may_be_held_out
from dualtrain.common.errors import UserError
from dualtrain.recipe.schema import BuildSection

RANDOM = np.random.default_rng(0)
HASHES = RANDOM.integers(0, 2**64, 400, dtype=np.uint64)
LENGTHS = RANDOM.integers(1, 100, 400)


def choose(lengths: np.ndarray, hashes: np.ndarray, **options: object) -> Choice:
    build = BuildSection.model_validate({"source": "text"} | options)
    return choose_documents(np.asarray(lengths), np.asarray(hashes), build, where="text")


def split_of(choice: Choice, hashes: np.ndarray) -> dict[int, str]:
    return {int(hashes[i]): split for split, order in choice.order.items() for i in order}


def test_every_document_is_in_one_split_or_counted() -> None:
    choice = choose(LENGTHS, HASHES, val_fraction=0.1)
    both = np.concatenate(list(choice.order.values()))
    assert sorted(both.tolist()) == list(range(400))
    assert choice.left_out.total() == 0
    assert 20 <= len(choice.order["val"]) <= 60
    assert set(choice.order["val"]) == set(np.flatnonzero(HASHES < 0.1 * 2.0**64))


def test_documents_added_to_the_source_move_no_other_between_splits() -> None:
    few = split_of(choose(LENGTHS[:150], HASHES[:150], val_fraction=0.1), HASHES[:150])
    many = split_of(choose(LENGTHS, HASHES, val_fraction=0.1), HASHES)
    assert all(many[document] == split for document, split in few.items())


@pytest.mark.parametrize("fraction", [None, 0.3])
def test_val_tokens_takes_the_lowest_hashes_until_it_has_enough(fraction: float | None) -> None:
    choice = choose(LENGTHS, HASHES, val_tokens=1000, val_fraction=fraction)
    val = choice.order["val"]
    held_out = LENGTHS[val].sum()
    assert 1000 <= held_out < 1000 + LENGTHS.max()
    assert HASHES[val].max() < np.delete(HASHES, val).min()
    if fraction is None:
        assert len(choice.order["train"]) + len(val) == 400
    else:
        assert HASHES[choice.order["train"]].min() >= fraction * 2.0**64
        assert choice.left_out["held out beyond val_tokens"] == 400 - len(val) - len(
            choice.order["train"]
        )


def test_val_tokens_moves_documents_out_of_val_only() -> None:
    few = split_of(choose(LENGTHS[:150], HASHES[:150], val_tokens=800), HASHES[:150])
    many = split_of(choose(LENGTHS, HASHES, val_tokens=800), HASHES)
    assert not any(many[d] == "val" for d, split in few.items() if split == "train")
    both = {"val_tokens": 800, "val_fraction": 0.3}
    few = split_of(choose(LENGTHS[:150], HASHES[:150], **both), HASHES[:150])
    many = split_of(choose(LENGTHS, HASHES, **both), HASHES)
    assert all(many.get(d, split) == split for d, split in few.items()), "left out, never moved"


def test_equal_documents_are_never_on_both_sides() -> None:
    hashes = np.repeat(HASHES[:50], 4)
    lengths = np.repeat(LENGTHS[:50], 4)
    for options in ({"val_fraction": 0.2}, {"val_tokens": 333}):
        order = choose(lengths, hashes, **options).order
        assert not set(hashes[order["train"]]) & set(hashes[order["val"]])


def test_duplicates_leave_their_first() -> None:
    hashes = np.concatenate([HASHES[:100], HASHES[:60], HASHES[:10]])
    choice = choose(np.ones(170), hashes, drop_duplicates=True, val_fraction=0.2, shuffle_seed=None)
    assert sorted(np.concatenate(list(choice.order.values()))) == list(range(100))
    assert choice.left_out == {"duplicate": 70}


def test_smaller_max_tokens_is_a_prefix_of_a_larger_one() -> None:
    whole = choose(LENGTHS, HASHES).order["train"]
    for most in (1, 500, 5000):
        choice = choose(LENGTHS, HASHES, max_tokens=most)
        order = choice.order["train"]
        assert order.tolist() == whole[: len(order)].tolist()
        assert LENGTHS[order].sum() >= most > LENGTHS[order[:-1]].sum()
        assert choice.left_out["beyond max_tokens"] == len(whole) - len(order)
    assert choose(LENGTHS, HASHES, max_tokens=10**9).left_out.total() == 0


def test_documents_without_tokens_are_counted() -> None:
    lengths = LENGTHS.copy()
    lengths[::10] = 0
    assert choose(lengths, HASHES).left_out == {"without tokens": 40}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2**64 - 1)), max_size=12),
    st.one_of(st.none(), st.floats(0.01, 0.99)),
    st.one_of(st.none(), st.integers(1, 60)),
)
def test_any_choice_fills_both_splits_or_says_why_not(
    documents: list[tuple[int, int]], fraction: float | None, tokens: int | None
) -> None:
    lengths = np.array([d[0] for d in documents], dtype=np.int64)
    hashes = np.array([d[1] for d in documents], dtype=np.uint64)
    try:
        choice = choose(lengths, hashes, val_fraction=fraction, val_tokens=tokens)
    except UserError as error:
        assert error.where == "text" and error.what and error.expected
        return
    assert all(len(order) for order in choice.order.values())
    assert sum(map(len, choice.order.values())) + choice.left_out.total() == len(documents)


def test_too_small_a_fraction_says_which_one_would_do() -> None:
    with pytest.raises(UserError, match="none of its 3 documents") as caught:
        choose(np.ones(3), HASHES[:3], val_fraction=1e-9)
    said = re.search(r"hold out a share of (\S+)", caught.value.hint)
    assert said is not None
    fraction = float(said[1])
    assert len(choose(np.ones(3), HASHES[:3], val_fraction=fraction).order["val"]) == 1


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "has no documents"),
        (1, {}, "one document cannot be divided"),
        (5, {"val_tokens": 100}, "val_tokens is 100, .* have 5 tokens"),
        (5, {"val_tokens": 5}, "all of its 5 documents are held out"),
        (5, {"val_fraction": 0.999999}, "all of its 5 documents are held out"),
    ],
)
def test_too_little_for_two_splits(count: int, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(np.ones(count, dtype=np.int64), HASHES[:count], **options)


def test_same_texts_cannot_be_divided() -> None:
    with pytest.raises(UserError, match="all documents are the same"):
        choose(np.ones(3), np.full(3, 7, dtype=np.uint64))


@pytest.mark.parametrize(
    "options",
    [{"val_fraction": 0.1}, {"val_tokens": 500}, {"val_tokens": 500, "val_fraction": 0.2}, {}],
)
def test_what_may_be_held_out_is_known_before_encoding(options: dict) -> None:
    build = BuildSection.model_validate({"source": "text"} | options)
    sizes = LENGTHS * 4  # bytes
    early = may_be_held_out(sizes, HASHES, build)
    held_out = choose(LENGTHS, HASHES, **options).order["val"]
    assert early[held_out].all() and not early.all()
