"""Very small runs: their recipe, training it on real ranks, and reading what it wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.ranks import environment, on_ranks

from dualtrain import cli
from dualtrain.common.errors import UserError
from dualtrain.progress.metrics import read_metrics
from dualtrain.recipe.load import LoadedRecipe, load_recipe

TINY = """
name: tiny
seed: 3
alpha: 3/8
steps: 8
unique_tokens: 1500
sequence_length: 32
global_batch: 8
micro_batch: 1
data: {{path: {data}}}
model: {{layers: 2, width: 32, heads: 2, mlp_width: 48, head: paper}}
optim: {{newton_schulz: gram, lr: 2e-3}}
engine: {{deepspeed: zero1, precision: fp32, timeout_s: 600}}
eval: {{sequences: 10}}
progress: {{interval_steps: 1}}
sample: {{tokens: 3, infill: "a <mask:2> list"}}
"""


def tiny_loader(dataset: Path, folder: Path) -> Callable[..., LoadedRecipe]:
    """A function from overrides to a loaded recipe of a very small run in ``folder``."""
    file = folder / "tiny.yaml"
    file.write_text(TINY.format(data=dataset))

    def load(*overrides: str, name: str = "run") -> LoadedRecipe:
        return load_recipe(str(file), [f"run_dir={folder / name}", *overrides])

    return load


def train_on(ranks: int, tmp_path: Path, *recipes: LoadedRecipe) -> list[int | str]:
    """Train recipes one after another on real ranks, which must agree on the outcome."""
    results = on_ranks(train_all, [r.text for r in recipes], ranks=ranks, tmp_path=tmp_path)
    assert all(result == results[0] for result in results)
    return results[0]


def train_all(texts: list[str]) -> list[int | str]:
    """Train resolved recipes one after another on these ranks; exit codes, or users' errors."""
    import yaml

    from dualtrain.engine.process import init_distributed, leave_distributed, prepare_process
    from dualtrain.recipe.schema import Recipe
    from dualtrain.training.train import train

    prepare_process(compile_model=False)
    init_distributed(timeout_s=600)
    outcomes: list[int | str] = []
    for text in texts:
        try:
            outcomes.append(train(Recipe.model_validate(yaml.safe_load(text)), view="none"))
        except UserError as error:
            outcomes.append(str(error))
            # The engine must be out of reach before the process group goes.
            traceback.clear_frames(error.__traceback__)
    leave_distributed()
    return outcomes


def records(recipe: LoadedRecipe, kind: str = "train") -> list[dict]:
    found = read_metrics(recipe.recipe.directory / "metrics.jsonl")
    return [dict(record) for record in found if record["kind"] == kind]


def results(recipe: LoadedRecipe) -> list[tuple]:
    """Everything in the records that does not depend on the clock or the machine."""
    clock = ("elapsed_s", "tokens_per_second", "data_wait_s", "memory_bytes", "mfu")
    kept = records(recipe) + records(recipe, "eval")
    return [tuple((k, str(v)) for k, v in r.items() if k not in clock) for r in kept]


def slots(recipe: LoadedRecipe) -> list[list]:
    files = sorted(recipe.recipe.directory.glob("slots-*.jsonl"))
    return sorted(json.loads(line) for file in files for line in file.read_text().splitlines())


def rewind(recipe: LoadedRecipe, step: int) -> None:
    """Leave of a finished run what a kill after the checkpoint of ``step`` would have left."""
    for path in recipe.recipe.directory.glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def command(recipe: LoadedRecipe, *options: str) -> list[str]:
    file = recipe.recipe.directory.with_suffix(".yaml")
    file.write_text(recipe.text)
    return ["-m", "dualtrain", "run", str(file), "--plain", *options]


def run(arguments: list[str], launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *launcher, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
    )


def said(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["dualtrain", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().err
