"""The paper's rules, what lies between them, and the advice of a fit."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from dualtrain.errors import UserError
from dualtrain.sweep.advice import by_fit, by_rules, simple_share


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


def test_an_alpha_far_away_is_not_advised_for_having_all_steps_alike():
    far = "\n".join(by_rules(1).lines(4))  # 63/64, of which 3/4 has 16 times the diffusion
    assert "no alpha near it has all steps alike with 4 slots" in far
    assert "a slot in every 16 steps" in far
    near = "\n".join(by_rules(1).lines(32))
    assert "the nearest alpha with all steps alike is 31/32: 31 AR and 1 diffusion" in near
    assert "with 1 slots" in "\n".join(by_rules(64).lines(1))


@pytest.mark.parametrize(
    ("alpha", "share"),
    [(0.5, "1/2"), (63 / 64, "63/64"), (0.9432, "121/128"), (0.032, "1/32"), (0.0, "0"), (1, "1")],
)
def test_simple_shares(alpha, share):
    assert simple_share(alpha) == Fraction(share)


def test_a_share_is_none_of_the_ends_however_near_it_is():
    assert float(simple_share(1.6e-5)) == pytest.approx(1.6e-5, rel=0.05)
    assert float(1 - simple_share(1 - 1.6e-5)) == pytest.approx(1.6e-5, rel=0.05)


def write_fit(path, entries):
    curve = [
        {
            "repetitions": r,
            "quantiles": {"0.05": low, "0.5": median, "0.95": high},
            "notes": notes,
        }
        for r, low, median, high, notes in entries
    ]
    fit = {"format": 1, "metric": "ar_nll", "best_alpha": {"curve": curve}}
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
