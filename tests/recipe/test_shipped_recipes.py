"""Tests of: recipes/: each is valid, says what it is, and means what its name says."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from dualtrain.data.corpus import CorpusFacts
from dualtrain.derived.derive import derive
from dualtrain.recipe import shipped
from dualtrain.recipe.load import load_recipe
from dualtrain.recipe.shipped import shipped_recipes
from dualtrain.sweep.definition import load_sweep

SWEEPS = {
    "replication/cpu": (189, 524_288, 469_568),
    "replication/gpu": (54, 8_388_608, 34_357_760),
}
NAMES = [name for name in shipped.recipe_names() if name not in SWEEPS]
PAPER = {
    "paper/470m": (Fraction(63, 64), 1),
    "paper/470m-ar": (1, 1),
    "paper/470m-diffusion": (0, 1),
    "paper/470m-released-code": (Fraction(63, 64), 1),
    "paper/470m-r32": (Fraction(3, 4), 32),
    "paper/470m-r32-ar": (1, 32),
    "paper/470m-r32-diffusion": (0, 32),
    "paper/470m-r128": (Fraction(1, 8), 128),
    "paper/470m-r128-ar": (1, 128),
    "paper/470m-r128-diffusion": (0, 128),
}
ABLATIONS = {
    "ablations/adamw": {"name", "optim.name", "optim.lr", "optim.schedule.warmup_steps"},
    "ablations/cosine": {"name", "optim.schedule.name"},
    "ablations/weighted-sum": {"name", "objective.mixing"},
    "ablations/span-masking": {"name", "objective.corruption"},
    "ablations/in-place": {"name", "objective.target"},
    "ablations/alpha-curriculum": {"name", "alpha"},
}
# About as many words and tokens as the challenge's texts have, and milestones.
BABYLM = {
    "babylm/strict-small": (CorpusFacts(13 * 10**6, 10**6, 16384, words=9_970_000), 19),
    "babylm/strict": (CorpusFacts(130 * 10**6, 10**7, 16384, words=99_700_000), 28),
}
# The slowrun's text has as many tokens as its rules say.
SLOWRUN = {"slowrun": (CorpusFacts(10**8, 150_000, 50260), 0)}
# Configurations of what they import, which are not shipped, and their parameters, as published.
IMPORTED = {
    "imported/pythia-160m": (
        {
            "model_type": "gpt_neox",
            "hidden_size": 768,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 2048,
            "vocab_size": 50304,
        },
        162_322_944,
    )
}


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("corruption", "alpha"):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def differences(one: str, other: str) -> set[str]:
    first, second = (flat(load_recipe(n).recipe.model_dump(mode="json")) for n in (one, other))
    return {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}


def test_the_recipes_of_the_issue_are_there():
    assert set(NAMES) == {"quickstart", *PAPER, *ABLATIONS, *IMPORTED, *BABYLM, *SLOWRUN}
    assert NAMES[0] == "quickstart"


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_derives_without_warnings(name, tmp_path):
    overrides, parameters = [], None
    corpus, milestones = (BABYLM | SLOWRUN).get(name, (None, 0))
    if name in IMPORTED:
        config, parameters = IMPORTED[name]
        (tmp_path / "config.json").write_text(json.dumps(config))
        overrides = [f"model.hf={tmp_path}"]
    derived = derive(load_recipe(name, overrides).recipe, corpus=corpus)
    assert derived.warnings == ()
    assert len(derived.words) == milestones
    assert derived.cost is not None
    assert parameters in (None, derived.cost.parameters)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_has_the_name_of_its_recipe(name):
    expected = name.replace("/", "-").replace("ablations", "ablation")
    assert load_recipe(name).recipe.name == expected


def test_every_recipe_begins_with_a_summary():
    summaries = dict(shipped_recipes())
    assert list(summaries) == shipped.recipe_names()
    assert len(set(summaries.values())) == len(summaries)
    for summary in summaries.values():
        assert summary.endswith(".") and summary[0].isupper()


@pytest.mark.parametrize("name", SWEEPS)
def test_every_point_of_a_sweep_has_the_same_budget(name):
    sweep = load_sweep(name)
    points, tokens, parameters = SWEEPS[name]
    assert len(sweep.points) == points
    assert str(sweep.directory) == f"sweeps/{name.replace('/', '-')}"
    derived = [derive(point.loaded.recipe, corpus=None) for point in sweep.points[::7]]
    assert {d.total_tokens for d in derived} == {tokens}
    assert {d.cost.parameters for d in derived} == {parameters}
    repetitions = {point.values["repetitions"] for point in sweep.points}
    assert repetitions == {1, 4, 16, 32, 64, 128}
    for number in repetitions:
        here = {p.values["alpha"] for p in sweep.points if p.values["repetitions"] == number}
        assert {0, 1} < here  # the single objectives, and mixtures between


@pytest.mark.parametrize("name", [*NAMES, *SWEEPS])
def test_every_field_shown_has_a_comment(name):
    text = (shipped.shipped_directory("recipes") / f"{name}.yaml").read_text()
    text = text.partition("\nsweep:\n")[0]
    head = True
    for line in text.splitlines():
        if head and (line.startswith(("#", "extends:", "name:")) or not line):
            continue
        head = False
        if line.strip() and not line.rstrip().endswith(":") and not line.startswith("#"):
            assert " # " in line, line
        assert len(line) <= 100


@pytest.mark.parametrize("name", [n for n in PAPER if n != "paper/470m"])
def test_paper_recipes_show_only_their_difference(name):
    allowed = {"name", "alpha", "repetitions", "objective.ar_weight", "data.append_eos"}
    assert differences(name, "paper/470m") <= allowed
    text = (shipped.shipped_directory("recipes") / f"{name}.yaml").read_text()
    allowed = {"extends", "name", "alpha", "repetitions", "data", "objective"}
    assert set(yaml.safe_load(text)) <= allowed


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_have_their_alpha_and_repetitions(name):
    recipe = load_recipe(name).recipe
    assert (recipe.alpha, recipe.repetitions) == PAPER[name]
    assert recipe.objective.ar_weight == (2 if name.endswith("released-code") else 1)
    derived = derive(recipe, corpus=None)
    assert derived.total_tokens == 34_359_738_368
    assert derived.unique_tokens * PAPER[name][1] == derived.total_tokens


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_differ_from_the_quickstart_in_their_subject_only(name):
    assert differences(name, "quickstart") == ABLATIONS[name]


def test_an_installed_wheel_has_its_own_copy(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "dualtrain"
    for kind, file in (("recipes", "paper/mine.yaml"), ("ds_configs", "zero9.json")):
        path = package / "_shipped" / kind / file
        path.parent.mkdir(parents=True)
        path.write_text("# Mine.\n")
    # What happens to lie beside the package there is not ours.
    (tmp_path / "site-packages" / "recipes").mkdir()
    monkeypatch.setattr(shipped, "PACKAGE", package)
    assert shipped.recipe_names() == ["paper/mine"]
    assert shipped.ds_config_names() == ["zero9"]
    assert shipped.find_recipe("paper/mine").is_file()
    assert shipped.shipped_recipes() == [("paper/mine", "Mine.")]


def test_the_checkout_is_used_otherwise(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.setattr(shipped, "PACKAGE", root / "dualtrain")
    assert shipped.shipped_directory("recipes") == root / "recipes"


def test_what_is_installed_is_what_the_checkout_has():
    root = Path(__file__).parents[2]
    for name in shipped.recipe_names():
        mine = root / "recipes" / f"{name}.yaml"
        assert shipped.find_recipe(name).read_text() == mine.read_text()
