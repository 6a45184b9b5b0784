"""Continue runs on other ranks, at other ZeRO stages, with offload, and print how far they part.

    PYTHONPATH=tests python tests/experiments/resume_table.py [--precision fp32|bf16]

Runs of 8 steps are saved after 4 by every combination of ds_config and ranks, and each is continued
by every other one (in bf16, where a stage decides what is rounded, only by its own ds_config). A
cell is the largest deviation over all parameters at the end, in units of the distance that the
parameter moved since the checkpoint: ``0`` is bit for bit, ``data`` would be other training data.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from helpers.ranks import on_ranks
from helpers.runs import rewind, slots, tiny_loader, train_all
from safetensors.torch import load_file

from dualtrain.recipe.load import LoadedRecipe

SETTINGS = (
    "steps=8",
    "checkpoint.interval_steps=4",
    "progress.interval_steps=3",
    "sample={tokens: 0, infill: ''}",
    "algorithms=[{use: helpers.algorithms:Recorder}]",
)


class Place(NamedTuple):
    """What a run is continued by."""

    ds_config: str
    ranks: int


PLACES = (
    *(Place(f"zero{stage}", ranks) for ranks in (1, 2, 4) for stage in range(4)),
    Place("zero2-offload", 2),
    Place("zero3-offload", 2),
)


class Table:
    """Trains and compares.

    Args:
        folder: For the runs.
        dataset: Of the tiny runs.
        precision: The recipe's.
    """

    def __init__(self, folder: Path, dataset: Path, precision: str) -> None:
        self._folder, self._precision = folder, precision
        self._load = tiny_loader(dataset, folder)

    def fill(self) -> dict[tuple[Place, Place], str]:
        """All cells, by who saved and who continued."""
        whole = {place: self._recipe(place, f"{place.ds_config}-{place.ranks}") for place in PLACES}
        self._train([(place.ranks, recipe) for place, recipe in whole.items()])
        moved = {
            (old, new): self._copy(saved, new)
            for old, saved in whole.items()
            for new in PLACES
            if self._is_wanted(old, new)
        }
        self._train([(new.ranks, recipe) for (_, new), recipe in moved.items()])
        return {pair: _deviation(recipe, whole[pair[0]]) for pair, recipe in moved.items()}

    def _is_wanted(self, old: Place, new: Place) -> bool:
        return self._precision == "fp32" or old.ds_config == new.ds_config

    def _recipe(self, place: Place, name: str) -> LoadedRecipe:
        engine = (f"engine.deepspeed={place.ds_config}", f"engine.precision={self._precision}")
        return self._load(*SETTINGS, *engine, name=name)

    def _copy(self, saved: LoadedRecipe, new: Place) -> LoadedRecipe:
        recipe = self._recipe(new, f"{saved.recipe.directory.name}-to-{new.ds_config}-{new.ranks}")
        shutil.copytree(saved.recipe.directory, recipe.recipe.directory)
        rewind(recipe, 4)
        for file in recipe.recipe.directory.glob("slots-*"):
            file.unlink()
        return recipe

    def _train(self, recipes: list[tuple[int, LoadedRecipe]]) -> None:
        """Train all, those of the same number of ranks in the same processes."""
        by_ranks: dict[int, list[str]] = defaultdict(list)
        for ranks, recipe in recipes:
            by_ranks[ranks].append(recipe.text)
        for ranks, texts in by_ranks.items():
            outcomes = on_ranks(train_all, texts, ranks=ranks, tmp_path=self._folder)
            if any(outcome != [0] * len(texts) for outcome in outcomes):
                raise SystemExit(f"on {ranks} ranks: {outcomes}")
            print(f"{len(texts)} runs on {ranks} ranks", file=sys.stderr, flush=True)


def _deviation(recipe: LoadedRecipe, saved: LoadedRecipe) -> str:
    if slots(recipe) != [slot for slot in slots(saved) if slot[0] >= 4]:
        return "data"
    before, expected, found = (
        load_file(path / "weights.safetensors")
        for path in (
            saved.recipe.directory / "step-00000004",
            saved.recipe.directory / "step-00000008",
            recipe.recipe.directory / "step-00000008",
        )
    )
    largest = max(
        float((found[name] - expected[name]).norm() / (expected[name] - before[name]).norm())
        for name in expected
    )
    return f"{largest:.0e}" if largest else "0"


def show(cells: dict[tuple[Place, Place], str]) -> str:
    """The cells as Markdown: a row for each place that saved."""
    lines = [
        "| saved by | " + " | ".join(f"{new.ds_config} x{new.ranks}" for new in PLACES) + " |",
        "|---" * (len(PLACES) + 1) + "|",
    ]
    for old in PLACES:
        row = " | ".join(cells.get((old, new), "") for new in PLACES)
        lines.append(f"| {old.ds_config} x{old.ranks} | {row} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    precision = parser.parse_args().precision
    from conftest import build_tiny_dataset

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        dataset = build_tiny_dataset(Path(folder) / "data")
        print(show(Table(Path(folder), dataset, precision).fill()))


if __name__ == "__main__":
    main()
