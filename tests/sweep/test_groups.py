"""Tests of: dualtrain.sweep.groups: points compared over their seeds."""

from __future__ import annotations

import json

import pytest
from helpers.sweeps import FILE, loss, make_sweep
from typer.testing import CliRunner

from dualtrain.cli import app
from dualtrain.common.errors import UserError
from dualtrain.sweep.command import CompareOptions
from dualtrain.sweep.groups import compare_groups

MORE = """  list:
    - {repetitions: 16, alpha: 1, seed: 0, optim.weight_decay: 0.8}
    - {repetitions: 16, alpha: 1, seed: 1, optim.weight_decay: 0.8}
    - {repetitions: 16, alpha: 1, seed: 0, algorithms: [{use: input_masking}]}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    def value(point):
        # Each seed is as far from the others in every group, but for a little in one of them.
        recipe = point.loaded.recipe
        return loss(point) - 0.001 * recipe.seed * (recipe.alpha == 0.5)

    return make_sweep(tmp_path_factory.mktemp("groups"), text=FILE + MORE, value=value)


def test_groups_are_compared_over_their_seeds(made, capsys):
    result = compare_groups(
        CompareOptions(
            runs=[made],
            where=["repetitions=16", "optim.weight_decay=0.1", "algorithms=[]"],
            to=["alpha=1"],
        )
    )
    groups = result["metrics"]["ar_nll"]
    assert list(groups) == [f"alpha={a}" for a in ("0", "1/8", "1/4", "1/2", "3/4", "1")]
    assert result["to"] == "alpha=1" and "difference" not in groups["alpha=1"]
    # Pairs of seeds: what seeds have in common is gone, and what is left has its interval.
    low, high = groups["alpha=1/4"]["difference_interval"]
    assert high - low < 1e-9
    half = groups["alpha=1/2"]
    low, high = half["difference_interval"]
    assert (high - low) / 2 == pytest.approx(4.3027 * 0.001 / 3**0.5, rel=1e-3)
    assert half["mean"] == pytest.approx(sum(half["interval"]) / 2)
    printed = capsys.readouterr().out
    assert "ar_nll, nats per token" in printed and "difference to alpha=1 (95 %)" in printed


def test_a_group_is_named_by_what_is_unusual_about_it(made, tmp_path):
    out = tmp_path / "out"
    result = compare_groups(
        CompareOptions(
            runs=[made],
            where=["repetitions=16", "alpha=1"],
            to=["algorithms=[{use: input_masking}]"],
            metric=["ar_nll", "best.ar_nll"],
            out=out,
        )
    )
    names = ["base", "optim.weight_decay=0.8"]
    assert list(result["metrics"]["ar_nll"])[:2] == names
    assert "input_masking" in result["to"]
    # Of one seed there is no interval, and of two there is, though of one pair there is not.
    assert result["metrics"]["ar_nll"][result["to"]]["interval"] is None
    decayed = result["metrics"]["ar_nll"]["optim.weight_decay=0.8"]
    assert decayed["interval"] is not None and decayed["difference_interval"] is None
    assert any("one seed only" in note for note in result["notes"])
    assert any("optim.weight_decay=0.1, algorithms=[]" in note for note in result["notes"])
    assert json.loads((out / "comparison.json").read_text()) == result
    assert {file.name for file in out.glob("*.png")} == {"ar_nll.png", "best.ar_nll.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": ["repetitions=16", "alpha=1/2"]}, "one group of points only"),
        ({"metric": ["ar_nlll"]}, "did you mean ar_nll"),
        ({"to": ["alpha=0.3"]}, "--to: no point has alpha=0.3"),
        ({"to": ["alpha=1"]}, "alpha=1 holds for 3 groups: repetitions=4, alpha=1, "),
    ],
)
def test_what_makes_no_comparison_is_refused(made, options, message):
    with pytest.raises(UserError, match=message):
        compare_groups(CompareOptions(runs=[made], **options))


def test_options_of_a_sweep_are_refused_for_runs(made):
    runs = [str(path) for path in sorted(made.glob("repetitions=4,*"))[:2]]
    found = CliRunner().invoke(app, ["compare", *runs, "--metric", "ar_nll"])
    assert found.exit_code != 0 and "are for a single sweep" in str(found.exception or found.output)


def test_a_sweep_is_no_run(made):
    file = made.parent / "sweep.yaml"
    found = CliRunner().invoke(app, ["run", str(file)])
    assert found.exit_code != 0
    assert "`dualtrain sweep` with this file" in str(found.exception or found.output)
