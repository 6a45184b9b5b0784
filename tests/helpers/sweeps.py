"""Sweeps on disk without training: what `dualtrain fit` and the tables read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from dualtrain.sweep.definition import Point, load_sweep
from dualtrain.sweep.directory import Outcome, prepare, write_outcome, write_recipe

FILE = """
name: made
alpha: 1
steps: 40
repetitions: 1
sequence_length: 32
global_batch: 8
micro_batch: 1
data: {path: nowhere}
sweep:
  grid: {repetitions: [4, 16, 64], alpha: [0, 1/8, 1/4, 1/2, 3/4, 1], seed: [0, 1, 2]}
"""


def loss(point: Point) -> float:
    """A loss whose best alpha is 4 / R, with a little of the seed."""
    recipe = point.loaded.recipe
    alpha, middle = float(recipe.alpha), min(1.0, 4 / recipe.repetitions)
    axis = [np.log2((a + 0.06) / (1 - a + 0.06)) for a in (alpha, middle)]
    return 4 + 0.05 * (axis[0] - axis[1]) ** 2 + 0.02 * recipe.seed


def make_sweep(
    folder: Path,
    *,
    text: str = FILE,
    value: Callable[[Point], float | None] = loss,
    leave_out: Callable[[Point], bool] = lambda point: False,
) -> Path:
    """A sweep whose points have ended with the losses that a function gives."""
    file = folder / "sweep.yaml"
    file.write_text(text)
    sweep = load_sweep(str(file), directory=folder / "sweep")
    prepare(sweep)
    for point in sweep.points:
        write_recipe(point)
        if not leave_out(point):
            finish(point, value(point))
    return sweep.directory


def finish(point: Point, nll: float | None) -> None:
    """Write what a run that ended leaves."""
    recipe = yaml.safe_load(point.loaded.text)
    (point.directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    steps, records = recipe["steps"], []
    for step in (steps // 2, steps):
        near = None if nll is None else nll + 0.5 * (step < steps)
        tokens = step * 256
        records += [
            {"kind": "train", "step": step, "steps": steps, "tokens": tokens, "epoch": 1.0}
            | {"ar_loss": 3.0, "ar_passes": 2.0, "tokens_per_second": 100.0, "elapsed_s": 1.0},
            {"kind": "eval", "step": step, "ar_nll": near, "diffusion_nll": 5.0}
            | {"prefix_nll": 4.5, "ar_nll_same_tokens": 4.6, "elapsed_s": 2.0},
        ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (point.directory / "metrics.jsonl").write_text(lines)
    write_outcome(point.directory, Outcome("finished", 0))
