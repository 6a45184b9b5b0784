"""Tests of: dualtrain.training.dataset, start (the dry run).

Which dataset a run takes, and that a dry run refuses what the run would.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import run
from typer.testing import CliRunner

from dualtrain.cli import app
from dualtrain.common.errors import UserError
from dualtrain.recipe.load import load_recipe
from dualtrain.training.dataset import with_dataset_there

SMALL = [
    "steps=2",
    "sequence_length=16",
    "model={layers: 1, width: 16, heads: 2, mlp_width: 24}",
    "eval={interval_steps: 0, sequences: 4}",
    "sample={tokens: 0, infill: ''}",
]


def refusal(recipe: str, *overrides: str, dry_run: bool) -> str:
    """What a command says that ends before any rank starts."""
    option = "--dry-run" if dry_run else "--plain"
    result = CliRunner().invoke(app, ["run", recipe, option, *SMALL, *overrides])
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_dataset_of_ones_own_in_a_recipe_that_makes_another(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    overrides = [*SMALL, f"data.path={tiny_dataset}", f"run_dir={tmp_path / 'run'}"]
    loaded = with_dataset_there(load_recipe("quickstart", overrides))
    assert loaded.recipe.data.build is None and "build: null" in loaded.text
    dry = CliRunner().invoke(app, ["run", "quickstart", "--dry-run", *overrides])
    assert dry.exit_code == 0 and "data.path holds another dataset" in dry.output
    done = run(["-m", "dualtrain", "run", "quickstart", "--plain", *overrides])
    assert done.returncode == 0, done.stderr
    assert "data.build of the recipe is left out" in done.stderr
    assert "build: null" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_settings_for_what_is_there_are_compared(tiny_dataset: Path, tmp_path: Path) -> None:
    """By hand, or in a recipe that names the place: then what is there may be stale."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: quickstart\ndata: {{path: {tiny_dataset}}}\n")
    by_hand = (f"data.path={tiny_dataset}", "data.build.vocab_size=300")
    for name, overrides in ((str(recipe), ()), ("quickstart", by_hand)):
        said = [
            refusal(name, *overrides, f"run_dir={tmp_path / 'run'}", dry_run=dry)
            for dry in (True, False)
        ]
        assert said[0] == said[1]
        assert "holds a dataset made differently: source is" in said[0]
        assert "data.build=null" in said[0]


def test_dry_run_refuses_what_the_run_would_before_it_makes_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    (tmp_path / "a.txt").write_text("text")
    cases = {
        "no such file": ["data.build.source=nowhere.jsonl"],
        "has no effect": [f"data.build.source={tmp_path}/a.txt", "data.build.text_field=body"],
        "has no dataset.json": [f"data.path={tmp_path}/other"],
        "tokenizer": ["data.build.tokenizer=nowhere.json"],
    }
    for message, overrides in cases.items():
        place = [f"data.path={tmp_path}/data", f"run_dir={tmp_path / 'run'}"]
        said = [refusal("quickstart", *place, *overrides, dry_run=dry) for dry in (True, False)]
        assert said[0] == said[1] and message in said[0]
    assert not (tmp_path / "data").exists()


def test_empty_directory_is_a_place_for_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    overrides = [*SMALL, f"data.path={tmp_path / 'data'}"]
    dry = CliRunner().invoke(app, ["run", "quickstart", "--dry-run", *overrides])
    assert dry.exit_code == 0, dry.output
    with pytest.raises(UserError, match="is not a dataset"):
        app(
            ["run", "quickstart", "--dry-run", *overrides, "data.build=null"],
            standalone_mode=False,
        )
