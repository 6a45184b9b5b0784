"""Tests of: dualtrain.sweep.advice, fit_file: the paper's rules, and the advice of a fit."""

from __future__ import annotations

import json
import re
from fractions import Fraction

import pytest

from dualtrain.common.errors import UserError
from dualtrain.recipe.schema import parse_share
from dualtrain.sweep.advice import by_fit, by_rules, short_share


@pytest.mark.parametrize(
    ("repetitions", "alpha", "window"),
    [
        (1, 63 / 64, None),
        (16, 63 / 64, None),
        (32, 1 / 2, (1 / 4, 1)),
        (64, 1 / 4, (1 / 8, 1 / 2)),
        (128, 1 / 8, (1 / 16, 1 / 4)),
    ],
)
def test_the_papers_rules(repetitions, alpha, window):
    advice = by_rules(repetitions)
    assert (advice.alpha, advice.window, advice.warnings) == (alpha, window, ())
    assert "rule" in advice.basis and "interpolated" not in advice.basis


@pytest.mark.parametrize(
    ("repetitions", "written"),
    [
        (32, "1/2"),
        (33.3, "160/333"),
        (40, "2/5"),
        (48, "1/3"),
        (100, "4/25"),
        (128, "1/8"),
        (1000, "2/125"),
        (33.333333333333336, "2000000000000000/4166666666666667"),
    ],
)
def test_the_second_rule_is_16_passes_exactly(repetitions, written):
    advice = by_rules(repetitions)
    text = "\n".join(advice.lines(256))
    told = re.search(r"write alpha: (\S+)\. ", text)
    assert told is not None and told[1] == written
    assert parse_share(told[1]) * Fraction(str(repetitions)) == 16
    assert "\n  16 AR passes over a document" in text


def test_between_the_rules_it_is_interpolated_and_said_so():
    found = [by_rules(r) for r in (16.01, 20, 24, 28, 31.99)]
    alphas = [advice.alpha for advice in found]
    assert alphas == sorted(alphas, reverse=True)
    assert alphas[0] == pytest.approx(63 / 64, abs=1e-3)
    assert alphas[-1] == pytest.approx(1 / 2, abs=1e-3)
    assert all("interpolated" in advice.basis for advice in found)


def test_what_is_outside_is_said_or_refused():
    assert by_rules(500).warnings and by_rules(0.5).warnings
    for wrong in (0, -3, 1e7, float("nan"), float("inf")):
        with pytest.raises(UserError, match="a number above 0"):
            by_rules(wrong)


def test_slots_that_realise_alpha():
    text = "\n".join(by_rules(128).lines(4))
    assert "write alpha: 1/8. With 4 slots in a step 0.5 are AR and 3.5 diffusion" in text
    assert "all steps alike is 1/4: 1 AR and 3 diffusion slots" in text
    assert "a slot in every 2 steps" in text
    whole = "\n".join(by_rules(128).lines(256))
    assert "32 are AR and 224 diffusion" in whole and "steps differ" not in whole


def test_slots_that_realise_an_alpha_without_a_power_of_two():
    text = "\n".join(by_rules(40).lines(256))
    assert "alpha 0.4 for 40" in text and "16 AR passes over a document, 24 diffusion" in text
    assert "With 256 slots in a step 102.4 are AR and 153.6 diffusion on average" in text
    assert "all steps alike is 51/128: 102 AR and 154 diffusion" in text
    assert "steps differ" not in "\n".join(by_rules(40).lines(20))
    rare = "\n".join(by_rules(1000).lines(25))
    assert "0.4 are AR and 24.6 diffusion" in rare and "a slot in every 2.5 steps" in rare


def test_what_is_told_of_an_estimate_is_that_of_the_share_to_write():
    advice = by_rules(24)
    assert isinstance(advice.alpha, float) and advice.share == Fraction(11, 13)
    text = "\n".join(advice.lines(13))
    assert "write alpha: 11/13. With 13 slots in a step 11 are AR and 2 diffusion" in text
    assert "20.3077 AR passes over a document, 3.69231 diffusion" in text


def test_an_alpha_far_away_is_not_advised_for_having_all_steps_alike():
    far = "\n".join(by_rules(1).lines(4))  # 63/64, of which 3/4 has 16 times the diffusion
    assert "no alpha near it has all steps alike with 4 slots" in far
    assert "a slot in every 16 steps" in far
    near = "\n".join(by_rules(1).lines(32))
    assert "the nearest alpha with all steps alike is 31/32: 31 AR and 1 diffusion" in near
    assert "with 1 slots" in "\n".join(by_rules(64).lines(1))


@pytest.mark.parametrize(
    ("alpha", "share"),
    [
        (0.5, "1/2"),
        (63 / 64, "63/64"),
        (0.9432, "17/18"),
        (0.334, "1/3"),
        (0.032, "1/31"),
        (0.0, "0"),
        (1, "1"),
    ],
)
def test_short_shares(alpha, share):
    assert short_share(alpha) == Fraction(share)


def test_a_share_is_none_of_the_ends_however_near_it_is():
    assert float(short_share(1.6e-5)) == pytest.approx(1.6e-5, rel=0.05)
    assert float(1 - short_share(1 - 1.6e-5)) == pytest.approx(1.6e-5, rel=0.05)


def write_fit(path, entries):
    numbers = {"ar_passes": 4.0, "value": 3.0, "at_border": None, "noise": 0.1}
    curve = [
        {
            "repetitions": r,
            "quantiles": {"0.05": low, "0.5": median, "0.95": high},
            "notes": notes,
            "effect_in_noise": 9.0,
        }
        | numbers
        for r, low, median, high, notes in entries
    ]
    fit = {
        "format": 1,
        "metric": "ar_nll",
        "is_loss": True,
        "sweep": "sweeps/made",
        "where": [],
        "axes": {"repetitions": "log2(R)", "alpha": "x", "epsilon": 0.1, "metric": "log"},
        "kernel": "Matern",
        "r_squared": 0.9,
        "left_out": {"r_squared": 0.9, "rmse": 0.1},
        "runs": [],
        "best_alpha": {"sampled": [], "curve": curve},
        "single_objectives": [{"repetitions": 4.0}],
        "notes": [],
    }
    path.write_text(json.dumps(fit))
    return path


def test_advice_of_a_fit(tmp_path):
    entries = [(4, 0.5, 0.75, 1.0, []), (16, 0.125, 0.25, 0.5, ["noise swamps alpha"])]
    file = write_fit(tmp_path / "fit.json", entries)
    assert by_fit(file, 4).alpha == 0.75 and by_fit(file, 16).alpha == 0.25
    between = by_fit(file, 8)
    assert between.alpha == pytest.approx(0.5)
    assert between.window == pytest.approx((0.3125, 0.75))
    assert between.warnings == ("noise swamps alpha",)
    with pytest.raises(UserError, match="the fit has runs from 4 to 16 only"):
        by_fit(file, 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("{}", "is no fit"),
        ("[1]", "is no fit"),
        ("null", "is no fit"),
        ('{"best_alpha": 3}', "is no fit"),
        ('{"metric": "ar_nll", "best_alpha": {"curve": []}}', "is no fit"),
        ('{"metric": "ar_nll", "best_alpha": {"curve": [{"repetitions": 8}]}}', "or damaged"),
        ("{" + 4301 * "9", "is not JSON"),
    ],
)
def test_a_file_that_is_no_fit(tmp_path, content, message):
    file = tmp_path / "fit.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        by_fit(file, 8)


@pytest.mark.parametrize(
    "entries",
    [
        [(16, 0.1, 0.2, 0.3, []), (4, 0.1, 0.2, 0.3, [])],
        [(0, 0.1, 0.2, 0.3, [])],
        [(10**400, 0.1, 0.2, 0.3, [])],
        [(4, 0.3, 0.2, 0.3, [])],
        [(4, 0.1, 0.2, 1.5, [])],
        [(4, -0.1, 0.2, 0.3, [])],
        [(4, 0.1, float("nan"), 0.3, [])],
        [(True, 0.1, 0.2, 0.3, [])],
        [(4, 0.1, 0.2, 0.3, [None])],
        [(4, 0.1, 0.2, 0.3, None)],
    ],
)
def test_a_fit_with_impossible_numbers(tmp_path, entries):
    with pytest.raises(UserError, match="is no fit, or damaged"):
        by_fit(write_fit(tmp_path / "fit.json", entries), 8)
