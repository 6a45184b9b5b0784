"""Tests of: dualtrain.sweep.definition: which points there are, their names, what is refused."""

from __future__ import annotations

import pytest

from dualtrain.common.errors import UserError
from dualtrain.sweep.definition import load_sweep

BASE = """
name: base
alpha: 1
steps: 8
repetitions: 2
sequence_length: 32
global_batch: 8
micro_batch: 1
data: {path: nowhere}
"""


@pytest.fixture
def sweep(tmp_path):
    def load(section: str, *overrides: str, base: str = BASE):
        file = tmp_path / "sweep.yaml"
        file.write_text(base + section)
        return load_sweep(str(file), overrides)

    return load


def labels(found) -> list[str]:
    return [point.label for point in found.points]


def test_a_grid_is_every_combination_and_directories_are_named_by_the_values(sweep):
    found = sweep("sweep: {grid: {repetitions: [1, 4], alpha: [0, 1/8, 0.5], seed: 7}}")
    assert labels(found) == [
        f"repetitions={r},alpha={a},seed=7" for r in (1, 4) for a in ("0", "1_8", "1_2")
    ]
    assert [point.number for point in found.points] == list(range(6))
    assert found.keys == ("repetitions", "alpha", "seed")
    last = found.points[-1]
    recipe = last.loaded.recipe
    assert (recipe.repetitions, float(recipe.alpha), recipe.seed) == (4, 0.5, 7)
    assert last.values == {"repetitions": 4, "alpha": "1/2", "seed": 7}
    assert recipe.directory == last.directory == found.directory / last.label
    assert str(found.directory) == "sweeps/base"


def test_grids_and_single_points_stand_beside_each_other(sweep):
    found = sweep(
        """
sweep:
  directory: elsewhere/here
  grid:
    - {alpha: [0, 1]}
    - {alpha: 1/2, optim.lr: [1e-3, 2e-3]}
  list:
    - {alpha: 1, algorithms: [{use: input_masking}]}
    - {alpha: 1/4, optim.betas: [0.8, 0.9]}
"""
    )
    assert labels(found)[:4] == ["alpha=0", "alpha=1", "alpha=1_2,optim.lr=0.001"] + [
        "alpha=1_2,optim.lr=0.002"
    ]
    assert found.points[4].loaded.recipe.algorithms[0].use == "input_masking"
    assert found.points[5].loaded.recipe.optim.betas == (0.8, 0.9)
    assert len(set(labels(found))) == 6
    assert str(found.directory) == "elsewhere/here"
    assert found.keys == ("alpha", "optim.lr", "algorithms", "optim.betas")


def test_overrides_are_for_all_points_and_a_sweep_can_extend_a_recipe(sweep, tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    found = sweep(
        "extends: base.yaml\nname: mine\nsweep: {grid: {alpha: [0, 1]}}",
        "optim.lr=0.5",
        base="",
    )
    assert {point.loaded.recipe.optim.lr for point in found.points} == {0.5}
    assert str(found.directory) == "sweeps/mine"


def test_many_values_make_a_name_that_a_file_system_takes(sweep):
    keys = ["optim.lr", "optim.momentum", "optim.schedule.cooldown", "objective.z_loss"]
    keys += ["optim.schedule.final", "optim.weight_decay", "objective.ar_weight", "model.norm_eps"]
    points = [", ".join(f"{key}: 0.1234567{end}" for key in keys) for end in (8, 9)]
    found = sweep(f"sweep: {{list: [{{{points[0]}}}, {{{points[1]}}}]}}")
    assert len(set(labels(found))) == 2
    assert max(len(label) for label in labels(found)) <= 180


def test_values_that_look_alike_have_directories_of_their_own(sweep):
    found = sweep(
        "sweep: {grid: {data.path: [a/b, a_b, a b], optim.lr: [0.0012345678, 0.0012345679]}}"
    )
    assert len({point.directory for point in found.points}) == 6
    assert labels(found)[2] == "data.path=a_b,optim.lr=0.0012345678"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("", "has no `sweep:` section"),
        ("sweep: 3", "sweep.yaml:10: sweep: is 3"),
        ("sweep: {}", "has no points"),
        ("sweep: {grid: {}}", "sweep.grid: is empty"),
        ("sweep: {grid: {alpha: []}}", "sweep.grid.alpha: has no values"),
        ("sweep: {gird: {alpha: [0, 1]}}", "unknown key — expected one of grid, list, directory"),
        ("sweep: {grid: {run_dir: [a, b]}}", "sweep.grid.run_dir: cannot vary"),
        ("sweep: {grid: {alpah: [0, 1]}}", "alpah: unknown key"),
        ("sweep: {grid: {alpha: [0, 2]}}", "sweep.yaml:10: alpha: 2 is outside [0, 1]"),
        ("sweep: {grid: {alpha: [1/2, 0.5]}}", "{alpha: 0.5} is the same run as {alpha: 1/2} ("),
        (
            "sweep:\n  grid:\n    - {alpha: 1}\n    - {alpha: 1, optim.weight_decay: 0.1}",
            "sweep.yaml:13: sweep: {alpha: 1, optim.weight_decay: 0.1} is the same run as {alpha:",
        ),
        ("sweep: {directory: 3, grid: {alpha: [0, 1]}}", "sweep.directory: is 3"),
    ],
)
def test_what_makes_no_sense_is_refused_where_it_stands(sweep, section, message):
    with pytest.raises(UserError) as error:
        sweep(section)
    assert message in str(error.value)


def test_repetitions_with_another_budget_are_refused(sweep):
    base = BASE.replace("steps: 8", "unique_tokens: 2560")
    with pytest.raises(UserError, match="different training tokens: 2,560 at 1, 10,240 at 4"):
        sweep("sweep: {grid: {repetitions: [1, 4], alpha: [0, 1]}}", base=base)
    # Whichever of the two has less, and also where each has budgets of its own.
    for steps in ("4, 8", "8, 4"):
        first, second = steps.split(", ")
        points = f"{{repetitions: 1, steps: {first}}}, {{repetitions: 4, steps: {second}}}"
        with pytest.raises(UserError, match="differ in repetitions have different training"):
            sweep(f"sweep: {{list: [{points}]}}")
    with pytest.raises(UserError, match="1,024 or 2,048 at 1, 2,048 at 4"):
        sweep("sweep: {grid: [{repetitions: 1, steps: [4, 8]}, {repetitions: 4}]}")
    # Fewer steps with everything else are a matter of the user's.
    found = sweep("sweep: {grid: {steps: [4, 8], repetitions: [1, 4]}}")
    assert len(found.points) == 4


def test_every_wrong_point_is_reported_once(sweep):
    with pytest.raises(UserError) as error:
        sweep("sweep: {grid: {alpha: [0, 1], optim.lr: [-1, fast]}}")
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and all("optim.lr" in line for line in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alpha=1", "command line: alpha: every point of the sweep sets it itself"),
        ("run_dir=here", "the sweep names the directories of its points (--dir says where)"),
    ],
)
def test_overrides_that_every_point_would_undo_are_refused(sweep, override, message):
    with pytest.raises(UserError) as error:
        sweep("sweep: {grid: {alpha: [0, 1]}, list: [{alpha: 1/2, optim.lr: 0.1}]}", override)
    assert message in str(error.value)


def test_overrides_of_what_only_some_points_set_are_for_the_others(sweep):
    section = "sweep: {grid: {alpha: [0, 1]}, list: [{alpha: 1/2, optim.lr: 0.1}]}"
    found = sweep(section, "optim.lr=0.5")
    assert [point.loaded.recipe.optim.lr for point in found.points] == [0.5, 0.5, 0.1]
