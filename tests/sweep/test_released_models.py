"""Tests of: dualtrain.evaluate.many, dualtrain.sweep.reading: models in a directory, fitted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from export.test_released import BRANCHES, write_released
from helpers.tasks import question, write_task
from typer.testing import CliRunner

from dualtrain.cli import app
from dualtrain.sweep.reading import read_sweep


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    error = "" if isinstance(result.exception, SystemExit) else result.exception
    return f"{result.exit_code}: {error or ''} {result.output}"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    lines = [question(2, n % 2, text="cat " * n) for n in range(4)]
    return write_task(tmp_path_factory.mktemp("tasks"), lines)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tasks) -> Path:
    place = tmp_path_factory.mktemp("many")
    first = write_released(place / "copy" / BRANCHES[0])
    for branch in BRANCHES[1:]:
        shutil.copytree(first, place / "copy" / branch)
    assert run("import", place / "copy", "--all", "--to", place / "models").startswith("0:")
    said = evaluate(place / "models", tasks)
    assert said.startswith("0:") and said.count("written:") == 3 and "[3/3]" in said
    return place / "models"


@pytest.fixture
def models(evaluated, tmp_path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "models"))


def evaluate(models: Path, tasks: Path, *more: object) -> str:
    given = ("--tasks", "quiz", "--tasks-dir", tasks, "--mode", "ar", "--device", "cpu")
    return run("eval", models, "--all", *given, *more)


def change(model: Path, score: float, **settings: object) -> None:
    file = model / "eval" / "model" / "results.json"
    found = json.loads(file.read_text())
    found["tasks"]["quiz"]["modes"]["ar"]["score"]["value"] = score
    found["settings"] |= settings
    file.write_text(json.dumps(found))


def test_the_same_is_passed_over_and_a_broken_model_does_not_stop_the_rest(models, tasks):
    again = evaluate(models, tasks)
    assert again.startswith("0:") and again.count("there already:") == 3
    (models / BRANCHES[0] / "model.safetensors").write_bytes(b"x")
    shutil.rmtree(models / BRANCHES[2] / "eval")
    (models / BRANCHES[0] / "eval" / "model" / "results.json").write_text("{")
    said = evaluate(models, tasks)
    assert said.startswith("1:") and f"1 of 3 models failed: {BRANCHES[0]}" in said
    assert said.count("there already:") == 1 and said.count("written:") == 1
    other = evaluate(models, tasks, "--limit", 2)
    assert other.count("written:") == 2 and "there already" not in other


def test_a_fit_takes_alpha_and_repetitions_of_the_names(models, tmp_path):
    # As the paper's names are rounded: 1/256 is 0.004 there.
    alphas = (0, 1 / 256, 0.25, 63 / 64, 1)
    names = [f"alpha_{a:.3f}_n-reps={r}" for a in alphas for r in (8, 64)]
    for number, name in enumerate(names):
        if not (models / name).exists():
            shutil.copytree(models / BRANCHES[0], models / name)
        change(models / name, score=40 - (number - 4.5) ** 2)
    for branch in BRANCHES:
        shutil.rmtree(models / branch)
    shutil.copytree(models / names[0], models / "mine")
    shutil.copytree(models / names[0], models / "alpha_0.900_n-reps=8")
    shutil.rmtree(models / "alpha_0.900_n-reps=8" / "eval")
    said = run("fit", models, "--metric", "ar.quiz", "--no-figures")
    assert said.startswith("0:") and "ar.quiz of 10 runs" in said
    assert "left out, because not named as alpha_0.500_n-reps=8: mine" in said
    assert "left out, because they have no scores: alpha_0.900_n-reps=8" in said
    fit = models / "fit" / "ar.quiz" / "fit.json"
    points = {(r["alpha"], r["repetitions"]) for r in json.loads(fit.read_text())["runs"]}
    assert points == {(a, r) for a in alphas for r in (8, 64)}
    assert run("alpha", "--repetitions", 64, "--fit", fit).startswith("0:")
    chosen = ("--where", "repetitions=64", "--where", "alpha=1/256", "--where", "alpha=1")
    compared = run("compare", models, *chosen, "--metric", "ar.quiz")
    assert compared.startswith("0:") and "alpha=1" in compared and "alpha=1/256" in compared


def test_what_is_no_directory_of_models_or_has_no_results_is_told_in_a_sentence(
    models, tasks, tmp_path
):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no models" in evaluate(empty, tasks)
    assert "holds no models" in evaluate(tmp_path / "nowhere", tasks)
    assert "is given with --out" in evaluate(models, tasks, "--out", empty / "x")
    assert "has no sweep.json" in run("fit", empty)
    assert "no run has 'ar.blimp'" in run("fit", models, "--metric", "ar.blimp")
    change(models / BRANCHES[1], score=1, limit=7)
    assert "is of another limit than" in run("fit", models, "--metric", "ar.quiz")
    shutil.rmtree(models / BRANCHES[1] / "eval")
    assert len(read_sweep(models).runs) == 2
    (models / BRANCHES[0] / "eval" / "model" / "results.json").write_text('{"tasks": {}}')
    assert "cannot be read as results" in run("fit", models, "--metric", "ar.quiz")
    for branch in (BRANCHES[0], BRANCHES[2]):
        shutil.rmtree(models / branch / "eval")
    assert "none of its models has results" in run("fit", models, "--metric", "ar.quiz")
