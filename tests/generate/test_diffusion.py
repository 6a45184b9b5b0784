"""Tests of: dualtrain.generate.diffusion.

Filling masks is checked against a plain loop over one row, its order against crafted models.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.texts import CONTEXT, MASK, SPECIAL, WORDS, allowed, generators, logits_of, with_ids
from hypothesis import given
from hypothesis import strategies as st

from dualtrain.common.errors import UserError
from dualtrain.generate.diffusion import fill_masks, plan_passes
from dualtrain.generate.settings import Settings

ROW = [1, 8, MASK, MASK, 11, MASK, 9, MASK, MASK, MASK, 13, MASK]
MASKED = [position for position, token in enumerate(ROW) if token == MASK]
OTHERS = [[1, MASK, MASK, 20], [1, *[MASK] * 10], [1, 8, 9]]


def fill(model, row, *, seed=0, **settings):
    settings = Settings(**{"temperature": 1.0, **settings})
    (filled,) = fill_masks(model, [row], settings, generators=generators(1, seed))
    return filled


def plain_loop(network, row, steps, shift, blocks):
    """One row, one block after the other, the likeliest token where it is surest."""
    row = list(row)
    for block in blocks:
        for left in range(steps, 0, -1):
            probabilities = allowed(logits_of(network, row, "full"), may_stop=False).softmax(-1)
            still = [p for p in block if row[p] == MASK]
            best = sorted(still, key=lambda p: -float(probabilities[p - shift].max()))
            for p in best[: -(-len(still) // left)]:
                row[p] = int(probabilities[p - shift].argmax())
    return row


@pytest.mark.parametrize("target", ["next", "in_place"])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_greedy_by_confidence_is_the_plain_loop(network, model, target, steps):
    shift = 1 if target == "next" else 0
    expected = plain_loop(network, ROW, steps, shift, [MASKED])
    mine = replace(model, target=target)
    assert fill(mine, ROW, steps=steps, temperature=0) == expected
    rows = [OTHERS[0], ROW, *OTHERS[1:]]
    settings = Settings(steps=steps, temperature=0)
    together = fill_masks(mine, rows, settings, generators=generators(4))
    assert together[1] == expected


def test_blocks_are_filled_from_left_to_right(network, model):
    expected = plain_loop(network, ROW, 2, 1, [MASKED[:3], MASKED[3:6], MASKED[6:]])
    # 2 passes a block, but for the last one, which has a single mask.
    assert fill(model, ROW, steps=5, block=3, temperature=0) == expected
    assert fill(model, ROW, steps=5, temperature=0) != expected


@pytest.mark.parametrize("order", ["confidence", "random", "left_to_right"])
@pytest.mark.parametrize(("steps", "block"), [(1, None), (3, None), (None, 2), (99, 1), (4, 2)])
def test_it_fills_the_masks_and_nothing_else(model, order, steps, block):
    rows = [ROW, *OTHERS[:1], OTHERS[2]]
    settings = Settings(steps=steps, block=block, order=order, temperature=1)
    filled = fill_masks(model, rows, settings, generators=generators(3))
    for before, after in zip(rows, filled, strict=True):
        assert [new for old, new in zip(before, after, strict=True) if old != MASK] == [
            old for old in before if old != MASK
        ]
        new = {new for old, new in zip(before, after, strict=True) if old == MASK}
        assert not new & set(SPECIAL)


def test_a_text_does_not_depend_on_what_else_is_in_the_batch(model):
    rows = [ROW, *OTHERS]
    for order in ("confidence", "random", "left_to_right"):
        settings = Settings(steps=4, block=5, order=order, temperature=1.2, top_k=9)
        together = fill_masks(model, rows, settings, generators=generators(4))
        alone = [
            fill_masks(model, [row], settings, generators=[own])[0]
            for row, own in zip(rows, generators(4), strict=True)
        ]
        assert together == alone


def test_the_seed_decides(model):
    first = fill(model, ROW)
    torch.manual_seed(99)
    assert fill(model, ROW) == first
    assert fill(model, ROW, seed=1) != first


def test_draws_follow_the_probabilities(network, model):
    row, draws = [1, 9, MASK, 14], 600
    settings = Settings(temperature=0.7)
    filled = fill_masks(model, [row] * draws, settings, generators=generators(draws))
    expected = (allowed(logits_of(network, row, "full")[1], may_stop=False) / 0.7).softmax(-1)
    found = torch.bincount(torch.tensor([ids[2] for ids in filled]), minlength=WORDS) / draws
    # Half the sum of differences: about 0.04 for 600 draws of some ten likely tokens.
    assert float((found - expected).abs().sum() / 2) < 0.1


def order_of(model, order, scores, seed=0, block=None):
    """In which order a model as sure of each position as given has its masks filled."""
    row = [1, *[MASK] * len(scores), 9]
    filled: list[int] = []

    def crafted(input_ids, *, attention, selection):
        logits = torch.zeros(len(selection), WORDS)
        logits[:, 20] = torch.tensor([scores[p + 1] for p in selection.tolist()])
        return SimpleNamespace(logits=logits)

    (result,) = fill_masks(
        replace(model, model=crafted),
        [row],
        Settings(order=order, block=block, temperature=0),
        generators=generators(1, seed),
        on_step=lambda done: filled.extend(done[0].fresh),
    )
    assert result == [1, *[20] * len(scores), 9]
    return filled


SCORES = {1: 2.0, 2: 5.0, 3: 1.0, 4: 3.0, 5: 4.0}


@pytest.mark.parametrize(
    ("order", "block", "expected"),
    [
        ("confidence", None, [2, 5, 4, 1, 3]),
        ("confidence", 3, [2, 1, 3, 5, 4]),
        ("left_to_right", None, [1, 2, 3, 4, 5]),
    ],
)
def test_the_order(model, order, block, expected):
    assert order_of(model, order, SCORES, block=block) == expected


def test_of_equals_the_leftmost_first(model):
    assert order_of(model, "confidence", dict.fromkeys(range(1, 6), 1.0)) == [1, 2, 3, 4, 5]


def test_random_order_is_the_seeds(model):
    orders = [tuple(order_of(model, "random", SCORES, seed)) for seed in (0, 0, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert len(set(orders)) > 2
    assert set(order_of(model, "random", SCORES, 5, block=2)[:2]) == {1, 2}


def test_steps_are_told(model):
    seen = []
    filled = fill_masks(
        model,
        [ROW, OTHERS[0]],
        Settings(steps=3, temperature=1),
        generators=generators(2),
        on_step=seen.append,
    )
    assert [[done.row for done in step] for step in seen] == [[0, 1], [0, 1], [0]]
    of_first = [done for step in seen for done in step if done.row == 0]
    assert [len(done.fresh) for done in of_first] == [3, 2, 2]
    assert sorted(p for done in of_first for p in done.fresh) == MASKED
    for done in of_first:
        assert all(done.ids[p] != MASK for p in done.fresh)
    assert of_first[-1].ids == filled[0]


def test_in_place_reads_a_first_mask_where_it_is(network, model):
    row = [MASK, 8, 9]
    expected = int(allowed(logits_of(network, row, "full")[0], may_stop=False).argmax())
    assert fill(replace(model, target="in_place"), row, temperature=0) == [expected, 8, 9]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ([MASK, 8], {}, "the first token is masked"),
        ([1] * (CONTEXT + 1), {}, "33 tokens with the gaps — expected at most 32"),
        ([1, MASK], {"steps": 0}, "--steps: 0"),
        ([1, MASK], {"block": 0}, "--block: 0"),
        (ROW, {"steps": 3, "block": 2}, "--steps: 3 for 7 masks in 4 blocks of 2 — expected at"),
    ],
)
def test_what_cannot_be_filled_is_refused(model, row, options, message):
    with pytest.raises(UserError, match=message):
        fill(model, row, **options)


def test_a_model_without_mask_token_is_refused(model):
    with pytest.raises(UserError, match="needs a mask token"):
        fill(with_ids(model, mask=None), ROW)


def test_steps_share_the_masks():
    def fills(masks, steps, block=None):
        passes = plan_passes(masks, steps=steps, block=block)
        return [(one.reach, one.fills) for one in passes]

    assert fills(7, 3) == [(7, 3), (7, 2), (7, 2)]
    assert fills(7, 1) == [(7, 7)]
    assert fills(3, None) == fills(3, 99) == [(3, 1)] * 3
    assert fills(8, 4, block=4) == [(4, 2), (4, 2), (8, 2), (8, 2)]
    assert fills(5, 3, block=4) == [(4, 2), (4, 2), (5, 1)]
    assert fills(0, 3) == []


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 45))
def test_every_plan_fills_every_mask_once(masks, steps, block):
    size = min(block, masks)
    blocks = -(-masks // size)
    if min(steps, masks) < blocks:
        with pytest.raises(UserError, match="at least one a block"):
            plan_passes(masks, steps=steps, block=block)
        return
    passes = plan_passes(masks, steps=steps, block=block)
    assert len(passes) == min(steps, masks)
    assert all(one.fills >= 1 for one in passes)
    for number in range(blocks):
        reach = min(masks, (number + 1) * size)
        filled = sum(one.fills for one in passes if one.reach == reach)
        assert filled == reach - number * size
