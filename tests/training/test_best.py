"""Tests of: dualtrain.training.best: the best checkpoint is kept, and a run stops early."""

from __future__ import annotations

import shutil

import pytest
from helpers.runs import records, results, rewind, said, train_on

from dualtrain.training.best import BestLoss

# Few words again and again: the held-out loss falls, and rises.
OVERFITS = (
    *("steps=40", "unique_tokens=300", "alpha=1", "optim.lr=1e-2", "sample={tokens: 0}"),
    *("checkpoint.keep=2", "checkpoint.interval_steps=5"),
)
EVAL = "eval={{sequences: 4, interval_steps: 3, best: ar, patience: {}}}"


def checkpoints(recipe) -> list[int]:
    return sorted(int(path.name[5:]) for path in recipe.recipe.directory.glob("step-*"))


def stops(recipe) -> list[tuple[int, str]]:
    found = records(recipe, "event")
    return [(r["step"], r["message"]) for r in found if r["event"] == "early_stop"]


def test_it_stops_where_the_loss_has_not_fallen_and_goes_on_only_if_asked(tiny, tmp_path):
    whole = tiny(*OVERFITS, EVAL.format("null"), name="whole")
    early = tiny(*OVERFITS, EVAL.format(2), name="early")
    assert train_on(2, tmp_path, whole, early) == [0, 0]
    losses = {r["step"]: r["ar_nll"] for r in records(whole, "eval")}
    lowest = min(losses, key=losses.__getitem__)
    end = next(
        step
        for step in losses
        if sum(s <= step for s in losses) > 2
        and min(v for s, v in losses.items() if s <= step - 6)
        <= min(v for s, v in losses.items() if step - 6 < s <= step)
    )
    before = min((s for s in losses if s <= end), key=losses.__getitem__)
    assert end == before + 6 < 40  # or nothing is shown here
    assert checkpoints(whole) == sorted({lowest, 35, 40}) and stops(whole) == []
    assert checkpoints(early)[0] == before and checkpoints(early)[-1] == end
    found = f"2 evaluations without a lower loss than ar {losses[before]:.4f} of step {before}"
    assert stops(early) == [(end, f"stopping early: {found}")]
    stopped = results(early)

    again = shutil.copytree(early.recipe.directory, tmp_path / "again")
    repeated, goes_on = (
        tiny(*OVERFITS, EVAL.format(2), name="again"),
        tiny(*OVERFITS, EVAL.format("null"), name="early"),
    )
    killed = tiny(*OVERFITS, EVAL.format(2), name="killed")
    shutil.copytree(again, killed.recipe.directory)
    rewind(killed, before)
    assert train_on(2, tmp_path, repeated, killed, goes_on) == [0, 0, 0]
    assert results(repeated) == stopped and checkpoints(repeated)[-1] == end
    assert sorted(results(killed)) == sorted(stopped) and stops(killed)[-1] == stops(early)[0]
    assert sorted(results(goes_on)) == sorted(results(whole))
    assert checkpoints(goes_on)[0] == lowest


def test_only_a_lower_finite_loss_counts_and_another_loss_begins_anew():
    best = BestLoss.of("ar", 2, {})
    best.add(float("nan"), 1)
    assert not best.is_enough
    best.add(2.0, 2)
    for step in (3, 4):
        assert not best.is_enough
        best.add(2.0, step)
    assert best.is_enough and (best.value, best.step) == (2.0, 2)
    kept = {"best": best.facts()}
    assert BestLoss.of("ar", 2, kept).is_enough
    assert not BestLoss.of("ar", 3, kept).is_enough
    other = BestLoss.of("prefix", 2, kept)
    assert (other.objective, other.value, other.waited) == ("prefix", None, 0)
    assert "no ar loss was finite" in BestLoss("ar", 1, waited=2).sentence()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("eval.patience=2", "eval.patience: 2, but no loss is followed"),
        ("eval={best: ar, interval_steps: 0}", "eval.best: ar, but only the end is evaluated"),
        ("eval.best=loss", "eval.best"),
        ("eval.patience=0", "eval.patience"),
    ],
)
def test_settings_that_say_nothing(settings, message, monkeypatch, capsys):
    code, error = said(monkeypatch, capsys, "run", "quickstart", settings, "--dry-run")
    assert code == 2 and message in error
