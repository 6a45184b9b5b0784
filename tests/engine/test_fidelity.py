"""Tests of: dualtrain.engine.build, gradients, optimizer_state.

DeepSpeed's updates of the real model against the paper's, and gradients against one process.

A few cells of the matrix; ``tests/experiments/parity.py`` prints all of them.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.fidelity import (
    MARKS,
    Cell,
    Trained,
    deviation,
    learning_rate,
    make_model,
    reference,
    tolerance,
    train_cells,
)
from helpers.ranks import on_ranks

from dualtrain.engine.groups import muon_scale
from dualtrain.engine.parameters import muon_parameter_names

CELLS = {
    1: [
        Cell(0, accumulation=4),
        Cell(1),
        Cell(2, accumulation=4, newton_schulz="standard", steps=5),
        Cell(3),
        Cell(1, precision="bf16", accumulation=2, steps=5),
        Cell(3, offload="parameters", steps=5),
    ],
    2: [
        Cell(0),
        Cell(1, accumulation=4),
        Cell(2),
        Cell(3, accumulation=4),
        Cell(1, newton_schulz="standard", steps=5),
        Cell(3, newton_schulz="standard", steps=5),
        Cell(1, precision="bf16", steps=5),
        Cell(2, precision="bf16", steps=5),
        Cell(3, precision="bf16", steps=5),
        Cell(1, offload="optimizer", steps=5),
        Cell(2, offload="optimizer", steps=5),
        Cell(3, offload="parameters", steps=5),
        *(Cell(stage, accumulation=2, optimizer="adamw", steps=1) for stage in range(4)),
    ],
}

Outcomes = list[tuple[Cell, Trained, Trained]]


@pytest.fixture(scope="module")
def outcomes(tiny_dataset, tmp_path_factory):
    """A function from a number of ranks to each cell, what it became and what it should have."""

    @cache
    def train(ranks: int) -> Outcomes:
        folder: Path = tmp_path_factory.mktemp(f"ranks-{ranks}")
        cells = CELLS[ranks]
        trained = on_ranks(train_cells, cells, tiny_dataset, ranks=ranks, tmp_path=folder)[0]
        expected = [reference(cell, ranks, tiny_dataset) for cell in cells]
        return list(zip(cells, trained, expected, strict=True))

    return train


@pytest.mark.parametrize("ranks", [1, 2])
def test_parameters_are_the_papers_after_1_5_and_20_steps(outcomes, ranks):
    for cell, actual, expected in outcomes(ranks):
        for mark in MARKS:
            if mark <= cell.steps:
                worst, name = deviation(actual, expected, mark)
                assert worst <= tolerance(cell, mark), (cell, mark, name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_accumulated_gradient_is_the_mean_over_all_slots(outcomes, ranks):
    """With both objectives in a step, on different ranks, and unequal supervised tokens."""
    for cell, actual, expected in outcomes(ranks):
        assert actual.gradients.keys() <= expected.gradients.keys()
        for name, gradient in actual.gradients.items():
            true = expected.gradients[name]
            # float32 sums of a few dozen numbers, in different orders; measured: 4e-7.
            assert (gradient - true).norm() <= 3e-6 * true.norm(), (cell, name)
        if cell.optimizer == "adamw":
            assert actual.gradients.keys() == expected.gradients.keys()


def test_learning_rate_and_weight_decay_of_every_group_in_the_engine(outcomes):
    names = muon_parameter_names(make_model())
    shapes = {name: tuple(p.shape) for name, p in make_model().named_parameters()}
    sizes: dict[tuple[int, ...], int] = {}
    for name in names:
        sizes[shapes[name]] = sizes.get(shapes[name], 0) + 1
    rest = sum(torch.Size(s).numel() for name, s in shapes.items() if name not in names)
    gains = sum(torch.Size(s).numel() for name, s in shapes.items() if "norm" in name)
    for ranks in (1, 2):
        for cell, trained, _ in outcomes(ranks):
            if cell.optimizer == "adamw":
                assert [uses_muon for *_, uses_muon in trained.groups] == [False, False]
                continue
            *muon, adamw, norms = trained.groups
            for (shape, number), group in zip(sizes.items(), muon, strict=True):
                elements, rate, decay, uses_muon = group
                scale = muon_scale(*shape)
                assert uses_muon
                assert rate == pytest.approx(7e-3 * scale) and decay == pytest.approx(0.1 / scale)
                # Partitions are padded by a few numbers; stage 3 shows its own only while it steps.
                share = number * shape[0] * shape[1] / (ranks if cell.stage else 1)
                assert cell.stage == 3 or share <= elements <= share + 4 * ranks
            for number, group in ((rest - gains, adamw), (gains, norms)):
                elements, rate, decay, uses_muon = group
                assert (rate, decay, uses_muon) == (7e-3, 0.1, False)
                share = number / (ranks if cell.stage else 1)
                assert cell.stage == 3 or share <= elements <= share + 4 * ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_matrix_of_muons_moves_by_an_orthogonal_update(outcomes, ranks):
    names = muon_parameter_names(make_model())
    for cell, trained, _ in outcomes(ranks):
        if cell.optimizer == "adamw":
            continue
        before, after = trained.parameters[0], trained.parameters[1]
        for name in names:
            rate = learning_rate(0)
            step = before[name] * (1 - 0.1 * rate) - after[name]
            values = torch.linalg.svdvals(step / (0.2 * rate * max(step.shape) ** 0.5))
            # What five iterations with these coefficients make of singular values that are not
            # tiny: between 0.68 and 1.21. Most of a gradient of a few tokens are tiny.
            assert values[0] < 1.25 and values[4] > 0.65, (cell, name, values)
        # And AdamW's first step goes by the gradient's sign, far from orthogonal.
        embedding = before["model.embed_tokens.weight"] * (1 - 0.1 * learning_rate(0))
        moved = (embedding - after["model.embed_tokens.weight"]).abs() / learning_rate(0)
        assert moved.max() == pytest.approx(1, abs=0.01)


def test_matrices_lie_across_the_borders_of_ranks():
    """What the cells above have to show needs matrices whose halves two ranks own."""
    names = muon_parameter_names(make_model())
    shapes = [tuple(p.shape) for name, p in make_model().named_parameters() if name in names]
    for ranks in (2, 4):
        assert any(shapes.count(shape) % ranks for shape in set(shapes))
