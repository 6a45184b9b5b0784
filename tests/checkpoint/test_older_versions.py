"""Tests of: dualtrain.checkpoint.store, resume, data.plan, with a run of an older version.

``older_run.tar.xz`` was made by commit 2646bc5, before modules moved into rooms. Of a run of 8
steps it holds the recipe, the dataset (paragraphs of LICENSE, a vocabulary of 272), the run
directory with the checkpoint of step 4, the metrics of all steps and the weights of the last.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import torch
from helpers.checkpoints import zero_momentum
from helpers.runs import records, results, train_on
from safetensors.torch import load_file

from dualtrain.recipe.load import LoadedRecipe, load_recipe

ARCHIVE = Path(__file__).with_name("older_run.tar.xz")
SAVED, LAST = "step-00000004", "step-00000008"


def test_run_of_an_older_version_goes_on(tmp_path):
    """Bit for bit where this machine computes as that of the archive did, else up to rounding."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    spoilt, anew = (load(tmp_path, name) for name in ("spoilt", "anew"))
    shutil.copytree(tmp_path / "run", tmp_path / "spoilt")
    zero_momentum(tmp_path / "spoilt" / SAVED)
    resumed = load(tmp_path, "run")
    before, expected = weights(tmp_path / "run" / SAVED), load_file(tmp_path / "ended.safetensors")
    recorded, way = results(resumed), distance(before, expected)

    assert train_on(1, tmp_path, resumed, spoilt, anew) == [0, 0, 0]

    said = [record["message"] for record in records(resumed, "event")]
    assert any("ranks and stage as before" in message for message in said), said
    found = weights(tmp_path / "run" / LAST)
    if distance(weights(tmp_path / "anew" / SAVED), before) == 0:
        assert distance(found, expected) == 0
        assert results(resumed) == recorded
    # Newton-Schulz runs in 16 bits where a CPU has them, and kernels round in ways of their own:
    # 0.002 of the way was measured between two of them, and 0.4 without the momentum.
    assert distance(found, expected) < 0.02 * way
    assert distance(weights(tmp_path / "spoilt" / LAST), expected) > 0.2 * way


def load(folder: Path, name: str) -> LoadedRecipe:
    """The archive's recipe, with paths of this machine."""
    places = [f"run_dir={folder / name}", f"data.path={folder / 'dataset'}"]
    return load_recipe(str(folder / "run" / "recipe.yaml"), places)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "weights.safetensors")


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)
