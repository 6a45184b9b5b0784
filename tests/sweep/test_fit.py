"""Tests of: dualtrain.sweep.fit, figures, progress.trackers.writer: on sweeps of known results."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import numpy as np
import pytest
from helpers.sweeps import FILE, loss, make_sweep

from dualtrain.common.errors import UserError
from dualtrain.progress.trackers import registry, writer
from dualtrain.sweep.advice import by_fit
from dualtrain.sweep.command import FitOptions
from dualtrain.sweep.directory import Outcome, write_outcome
from dualtrain.sweep.fit import describe, fit_sweep
from dualtrain.sweep.surface import Best


def fit(directory, **options):
    return fit_sweep(FitOptions(directory=directory, no_figures=True, **options)).model_dump()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_sweep(tmp_path_factory.mktemp("fit"))


def test_the_best_alpha_of_each_repetition(made, capsys):
    result = fit(made)
    out = made / "fit" / "ar_nll"
    assert json.loads((out / "fit.json").read_text()) == result
    assert len(result["runs"]) == 54 and result["r_squared"] > 0.98
    best = {entry["repetitions"]: entry for entry in result["best_alpha"]["sampled"]}
    assert best[4]["quantiles"]["0.5"] == 1 and best[4]["at_border"] == "highest"
    assert best[16]["quantiles"]["0.5"] == pytest.approx(0.25, abs=0.06)
    assert best[64]["ar_passes"] == pytest.approx(4, abs=3)
    single = result["single_objectives"][1]
    assert single["mixture"]["alpha"] == 0.25
    # Every alpha has the same differences between seeds: paired, nothing of them is left.
    low, high = single["mixture_minus_ar"]["interval"]
    assert high - low < 1e-9 < -high
    low, high = single["mixture"]["interval"]
    assert high - low == pytest.approx(2 * 4.3027 * 0.02 / 3**0.5, rel=1e-3)
    printed = capsys.readouterr().out
    assert "R²" in printed and "at 4 repetitions a single objective is best" in printed
    advice = by_fit(out / "fit.json", 16)
    assert advice.alpha == best[16]["quantiles"]["0.5"]


@pytest.mark.parametrize(
    ("median", "at_zero", "border", "effect", "notes"),
    [
        (0.2, 0.0, None, 9.0, []),
        (0.2, 0.3, None, 9.0, ["may be at the border, alpha 0: it is there in 30%"]),
        (0.2, 0.09, None, 9.0, []),
        (0.2, 0.0, "lowest", 9.0, ["is the lowest sampled"]),
        (0.2, 0.0, "highest", 9.0, ["is the highest sampled"]),
        (0.0, 0.9, "lowest", 1.5, ["a single objective is best", "noise swamps alpha"]),
    ],
)
def test_what_is_said_about_an_optimum(median, at_zero, border, effect, notes):
    samples = np.where(np.arange(100) < 100 * at_zero, 0.0, 0.2)
    best = Best(
        repetitions=8,
        quantiles=(0.0, 0.1, median, 0.3, 0.4),
        value=4.0,
        at_border=border,
        noise=0.01,
        effect=effect,
        samples=samples,
        ends=(0.0, 1.0),
    )
    found = describe(best)
    assert len(found.notes) == len(notes)
    assert all(part in note for part, note in zip(notes, found.notes, strict=True))
    assert found.ar_passes == 8 * median


def test_figures_have_labels_units_and_a_legend(made):
    fit_sweep(FitOptions(directory=made))
    out = made / "fit" / "ar_nll"
    for name in ("surface", "curves", "objectives"):
        picture = (out / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
        assert (out / f"{name}.svg").read_text().startswith("<?xml")
    texts = {name: comments((out / f"{name}.svg").read_text()) for name in ("surface", "curves")}
    assert {"ar_nll, nats per token", "α, the AR share", "1/8", "runs"} <= texts["surface"]
    assert "median of the best α" in texts["surface"] and "the paper's rules" in texts["surface"]
    assert {"optimizer updates", "α = 1/8", "64 repetitions"} <= texts["curves"]


def comments(svg: str) -> set[str]:
    """What matplotlib wrote as glyphs, which it also says in comments."""
    return {text.strip() for text in re.findall(r"<!--(.*?)-->", svg, re.DOTALL)}


def test_any_metric_can_be_the_target(made):
    result = fit(made, metric="best.ar_nll")
    assert result["metric"] == "best.ar_nll"
    with pytest.raises(UserError, match="did you mean ar_nll"):
        fit(made, metric="ar_nl")
    with pytest.raises(UserError, match="all runs have the same value"):
        fit(made, metric="diffusion_nll")


def test_scores_of_tasks_are_a_target_where_more_is_better(tmp_path):
    made = make_sweep(tmp_path)
    for folder in made.glob("repetitions=*"):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        path = folder / "eval" / "step-00000040" / "results.json"
        path.parent.mkdir(parents=True)
        score = {"score": {"value": -records[-1]["ar_nll"], "low": 0, "high": 0}}
        path.write_text(json.dumps({"tasks": {"blimp": {"modes": {"ar": score}}}, "average": {}}))
    result = fit(made, metric="ar.blimp")
    assert not result["is_loss"]
    best = {entry["repetitions"]: entry for entry in result["best_alpha"]["sampled"]}
    assert best[16]["quantiles"]["0.5"] == pytest.approx(0.25, abs=0.06)


def test_one_seed_gives_no_interval_and_says_why(tmp_path, capsys):
    made = make_sweep(tmp_path, text=FILE.replace("seed: [0, 1, 2]", "seed: 4"))
    result = fit(made)
    assert result["single_objectives"][0]["mixture"]["interval"] is None
    printed = capsys.readouterr().out
    assert "(one seed)" in printed and "one seed only: no interval, since" in printed


def test_points_that_failed_or_are_not_finished_are_left_out_and_named(tmp_path):
    made = make_sweep(tmp_path, leave_out=lambda p: p.number == 2)
    failed = made / "repetitions=4,alpha=1_8,seed=0"
    write_outcome(failed, Outcome("failed", 3, "not finite"))
    result = fit(made)
    assert len(result["runs"]) == 52
    assert result["notes"] == [
        "left out, because they failed: repetitions=4,alpha=1_8,seed=0",
        "left out, because they are not finished: repetitions=4,alpha=0,seed=2",
    ]


def test_points_of_other_recipes_are_chosen_by_the_user(tmp_path):
    more = "  list: [{alpha: 1, repetitions: 4, seed: 0, optim.weight_decay: 0.8}]\n"
    made = make_sweep(tmp_path, text=FILE + more)
    with pytest.raises(UserError) as error:
        fit(made)
    assert "points differ in optim.weight_decay: 0.1 (54 points), 0.8 (1 point)" in str(error.value)
    assert "--where 'optim.weight_decay=0.1'" in str(error.value)
    result = fit(made, where=["optim.weight_decay=0.1"])
    assert len(result["runs"]) == 54
    for where, message in (
        ("optim.weight_decay", "KEY=VALUE"),
        ("optim.weight=0.1", "does not set 'optim.weight'"),
        ("optim.weight_decay=0.3", "no point has optim.weight_decay=0.3 — expected a value of 0.1"),
    ):
        with pytest.raises(UserError) as error:
            fit(made, where=[where])
        assert message in str(error.value)


def test_results_that_are_not_finite_are_refused_by_name(tmp_path):
    made = make_sweep(tmp_path, value=lambda p: None if p.number == 5 else loss(p))
    with pytest.raises(UserError, match="not finite, in repetitions=4,alpha=1_8,seed=2"):
        fit(made)


def test_directories_without_results_are_refused(tmp_path, made):
    with pytest.raises(UserError, match="does not exist"):
        fit(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"has no sweep\.json"):
        fit(tmp_path)
    begun = make_sweep(tmp_path, leave_out=lambda p: True)
    with pytest.raises(UserError, match="no run has 'ar_nll'"):
        fit(begun)
    for folder in begun.glob("repetitions=*"):
        (folder / "point.yaml").unlink()
    with pytest.raises(UserError, match="none of its points has been begun"):
        fit(begun)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        fit(made, out=tmp_path / "file" / "below")


def test_fewer_than_four_alphas_are_refused(tmp_path):
    text = FILE.replace("alpha: [0, 1/8, 1/4, 1/2, 3/4, 1]", "alpha: [0, 1/2, 1]")
    with pytest.raises(UserError, match="3 distinct: 0, 0.5, 1 — expected at least 4"):
        fit(make_sweep(tmp_path, text=text))


def test_alpha_schedules_are_no_point_of_a_surface(tmp_path):
    schedule = "{name: phases, phases: [{until: 1, alpha: 1}]}"
    text = FILE.replace("alpha: [0, 1/8,", f"alpha: [{schedule}, 1/8,")
    with pytest.raises(UserError, match="alpha is a schedule"):
        fit(make_sweep(tmp_path, text=text, value=lambda p: 4.0))


def test_any_repetitions_that_were_sampled_can_be_asked_for(tmp_path):
    text = FILE.replace("[4, 16, 64]", "[0.5, 3, 5, 7]").replace("seed: [0, 1, 2]", "seed: 0")
    made = make_sweep(tmp_path, text=text)
    result = fit(made)
    curve = [entry["repetitions"] for entry in result["best_alpha"]["curve"]]
    assert curve == sorted(curve) and {0.5, 3, 5, 7} <= set(curve)
    assert all(high / low > 1.01 for low, high in pairwise(curve))
    for entry in result["best_alpha"]["sampled"]:
        advice = by_fit(made / "fit" / "ar_nll" / "fit.json", entry["repetitions"])
        assert advice.repetitions * advice.alpha == pytest.approx(entry["ar_passes"], rel=0.2)


def test_runs_of_different_budgets_are_no_surface(tmp_path):
    made = make_sweep(tmp_path)
    path = made / "repetitions=4,alpha=1_8,seed=0" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"tokens": 10240', '"tokens": 20480'))
    with pytest.raises(UserError) as error:
        fit(made)
    expected = "different numbers of tokens: 10,240 (53 points), 20,480 (1 point)"
    assert expected in str(error.value)


def test_figures_go_to_the_trackers_of_the_runs(tmp_path, monkeypatch, capsys):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(writer, "LONGEST_END_S", 600)
    trackers = "progress: {trackers: [tensorboard, wandb, mlflow]}\n"
    made = make_sweep(tmp_path, text=trackers + FILE)
    is_there = registry.find_spec
    monkeypatch.setattr(
        registry, "find_spec", lambda name: None if name == "mlflow" else is_there(name)
    )
    wandb = pytest.importorskip("wandb")
    try:
        fit_sweep(FitOptions(directory=made))
    finally:
        wandb.teardown()
    out = made / "fit" / "ar_nll"
    drawn = {file.stem: file for file in out.glob("*.png")}
    assert {"surface", "objectives"} <= drawn.keys()
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {f"figures/{name}" for name in drawn}
    (shown,) = events.Images("figures/surface")
    with Image.open(drawn["surface"]) as image:
        assert (shown.width, shown.height) == image.size
    sent = out.glob("wandb/offline-run-*/files/media/images/figures/*.png")
    assert {file.read_bytes() for file in sent} == {file.read_bytes() for file in drawn.values()}
    assert (
        "mlflow gets no figures: the package `mlflow` is not installed" in capsys.readouterr().out
    )
