"""The whole fidelity matrix, as a Markdown table: ``parity.py [--ranks 1 2 4]``.

Every cell trains the real model with DeepSpeed and compares its parameters, after 1, 5 and 20
steps, with one plain-PyTorch process that computes all slots (helpers/fidelity.py). The figure is
the largest deviation of a parameter relative to how far it has moved. Exit code 1 if a cell exceeds
its tolerance. Takes some minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import conftest  # noqa: F401  before torch: its settings
from helpers.fidelity import (
    MARKS,
    Cell,
    Trained,
    deviation,
    reference,
    tolerance,
    train_cells,
)
from helpers.ranks import on_ranks

CELLS_A_LAUNCH = 12


def matrix() -> Iterator[Cell]:
    """All cells, those of one table beside each other."""
    for accumulation, method, stage in product((1, 4), ("gram", "standard"), range(4)):
        yield Cell(stage, accumulation, newton_schulz=method)
    for accumulation, stage in product((1, 4), range(4)):
        yield Cell(stage, accumulation, optimizer="adamw")
    for accumulation, stage in product((1, 4), range(4)):
        yield Cell(stage, accumulation, precision="bf16")
    for accumulation, precision in product((1, 4), ("fp32", "bf16")):
        for stage in (1, 2, 3):
            yield Cell(stage, accumulation, precision=precision, offload="optimizer")
        yield Cell(3, accumulation, precision=precision, offload="parameters")


def compare(ranks: int, dataset: Path) -> Iterator[tuple[Cell, Trained, Trained]]:
    """Every cell with what it became and what it should have, a few cells in each launch."""
    cells, references = list(matrix()), {}
    for first in range(0, len(cells), CELLS_A_LAUNCH):
        some = cells[first : first + CELLS_A_LAUNCH]
        with tempfile.TemporaryDirectory() as folder:
            trained = on_ranks(train_cells, some, dataset, ranks=ranks, tmp_path=Path(folder))[0]
        for cell, result in zip(some, trained, strict=True):
            # The reference knows nothing of stages or offloading.
            key = (cell.accumulation, cell.newton_schulz, cell.bfloat16, cell.optimizer)
            if key not in references:
                references[key] = reference(cell, ranks, dataset)
            yield cell, result, references[key]


def row(ranks: int, cell: Cell, actual: Trained, expected: Trained) -> tuple[str, bool]:
    """A row of the table, and whether the cell is within its tolerance."""
    deviations = [deviation(actual, expected, mark)[0] for mark in MARKS]
    good = all(d <= tolerance(cell, m) for d, m in zip(deviations, MARKS, strict=True))
    update = f"Muon, {cell.newton_schulz}" if cell.optimizer == "muon" else "AdamW"
    columns = [
        cell.precision,
        update,
        cell.offload,
        str(cell.stage),
        str(ranks),
        str(cell.accumulation),
        *(f"{value:.1e}" for value in deviations),
        f"{tolerance(cell, MARKS[-1]):g}" + ("" if good else " EXCEEDED"),
    ]
    return f"| {' | '.join(columns)} |", good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    names = ["precision", "update", "offloaded", "stage", "ranks", "accumulation"]
    names += [*(f"step {mark}" for mark in MARKS), "tolerance"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        dataset = conftest.build_tiny_dataset(Path(folder))
        for ranks in arguments.ranks:
            for cell, actual, expected in compare(ranks, dataset):
                line, good = row(ranks, cell, actual, expected)
                print(line, flush=True)
                failures += not good
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
