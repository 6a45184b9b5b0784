"""Tests of: dualtrain.training.assemble, engine.config, engine.parameters.

Whole runs with the shipped offloading ds_configs and with models that are partitioned early.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import records, tiny_loader, train_on

from dualtrain.data.corpus import read_corpus
from dualtrain.derived.derive import derive
from dualtrain.engine.groups import list_groups
from dualtrain.recipe.load import LoadedRecipe

SHIFT = "algorithms=[{use: helpers.algorithms:Shift}]"
WEIGHTS = "checkpoint.resume=weights:RUN/step-00000003"
RUNS = {
    "plain": ("engine.deepspeed=zero0",),
    "offload-2": ("engine.deepspeed=zero2-offload",),
    "offload-3": ("engine.deepspeed=zero3-offload",),
    "shifted": ("engine.deepspeed=zero1", SHIFT),
    "shifted-3": ("engine.deepspeed=zero3", SHIFT),
    "weights": ("engine.deepspeed=zero1", WEIGHTS),
    "weights-3": ("engine.deepspeed=zero3", WEIGHTS),
}


@pytest.fixture(scope="module")
def runs(tiny_dataset, tmp_path_factory) -> dict[str, LoadedRecipe]:
    """All the runs, trained on 2 ranks."""
    folder: Path = tmp_path_factory.mktemp("runs")
    load = tiny_loader(tiny_dataset, folder)
    plain = str(folder / "plain")
    recipes = {
        name: load("steps=3", *(change.replace("RUN", plain) for change in changes), name=name)
        for name, changes in RUNS.items()
    }
    assert train_on(2, folder, *recipes.values()) == [0] * len(RUNS)
    return recipes


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("offload-2", "plain"),
        ("offload-3", "plain"),
        ("shifted-3", "shifted"),
        ("weights-3", "weights"),
    ],
)
def test_losses_are_those_of_the_plain_way(runs, name, like):
    for mine, theirs in zip(records(runs[name]), records(runs[like]), strict=True):
        # 5 digits: the order of float32 additions, then Newton-Schulz, 3 times.
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-5)


def test_what_was_changed_or_loaded_before_the_engine_counts(runs):
    def first(name: str) -> float:
        return records(runs[name])[0]["loss"]

    assert first("shifted-3") != pytest.approx(first("plain"), rel=1e-4)
    assert first("weights-3") < 0.99 * first("plain")


def test_a_run_lists_the_groups_that_the_dry_run_shows(runs):
    for name in ("plain", "offload-3"):
        recipe = runs[name].recipe
        cost = derive(recipe, corpus=read_corpus(recipe), world_size=2).cost
        assert cost is not None
        written = (recipe.directory / "logs" / "parameters.txt").read_text().splitlines()
        assert written == list(list_groups(cost.groups, recipe.optim))
        assert written[0] == (
            "muon 32x32: 9 matrices, 9,216 parameters; "
            "lr 0.002263 (1.131 x optim.lr), weight decay 0.08839"
        )
        assert written[1] == "  model.layers.0.self_attn.q_proj.weight"
