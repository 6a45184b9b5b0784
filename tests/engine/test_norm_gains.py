"""Norm gains stay fp32 in bf16 runs: in every forward pass, at every ZeRO stage."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers.norm_gain_workers import HALF, Cell, Trained, tokens, train_cells
from helpers.ranks import on_ranks
from torch import Tensor

from dualtrain.engine.config import bfloat16_mode

CELLS = (
    Cell(0),
    Cell(1, moved_to=3),
    Cell(2),
    Cell(3, moved_to=1),
    Cell(3, persistence=10**6, recompute=True),
    Cell(1, family="qwen3", offload="optimizer"),
    Cell(3, family="gpt2", offload="parameters"),
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[tuple[Cell, Trained]]:
    """Each cell on two ranks, and what both saw of it."""
    folder = tmp_path_factory.mktemp("norm-gains")
    ranks = on_ranks(train_cells, CELLS, folder, ranks=2, tmp_path=folder)
    return [(cell, found) for rank in ranks for cell, found in zip(CELLS, rank, strict=True)]


def is_of_norm(name: str) -> bool:
    return "norm" in name or ".ln_" in name


def test_the_forward_pass_uses_the_masters_of_the_gains(outcomes):
    for cell, found in outcomes:
        assert found.used.keys() == {name for name in found.final if is_of_norm(name)}
        assert len(found.used) == {"dual": 5, "qwen3": 9, "gpt2": 10}[cell.family]
        for name, value in found.used.items():
            assert torch.equal(value, found.final[name]), (cell, name)
            assert not torch.equal(value, found.start[name]), (cell, name)
            # The test could fail: bf16 holds none of them.
            rounded = value.bfloat16().float()
            assert (value != rounded).float().mean() > 0.9, (cell, name)


def test_matrices_are_bf16_at_stages_1_and_3(outcomes):
    for cell, found in outcomes:
        for name, dtype in found.types.items():
            is_cast = cell.stage in (1, 3) and not is_of_norm(name)
            assert dtype == (torch.bfloat16 if is_cast else torch.float32), (cell, name)


def test_an_engine_starts_from_the_gains_of_its_model(outcomes):
    for cell, found in outcomes:
        for name, parameter in cell.make_model().named_parameters():
            exact = is_of_norm(name) or cell.stage in (0, 2)
            expected = parameter if exact else parameter.bfloat16().float()
            assert torch.equal(found.start[name], expected), (cell, name)


def test_losses_are_those_of_fp32_gains_beside_bf16_matrices(outcomes):
    for cell, found in outcomes:
        # The same operations in the same order, so bit for bit.
        assert torch.equal(found.loss, reference_loss(cell, found)), cell
        rounded = reference_loss(cell, found, gains=torch.bfloat16)
        assert not torch.equal(found.loss, rounded), cell


def reference_loss(cell: Cell, found: Trained, *, gains: torch.dtype = torch.float32) -> Tensor:
    """The loss of a plain model with the masters of the last step, its gains rounded or not."""
    model = cell.make_model()
    mode = bfloat16_mode("bf16", cell.stage)
    ids = tokens(1000)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found.final[name])
            if is_of_norm(name):
                parameter.copy_(parameter.to(gains))
            elif mode == "weights":
                parameter.data = parameter.bfloat16()
        casting = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext()
        with casting:
            return model(ids[:, :-1], targets=ids[:, 1:]).loss


def test_resuming_is_bit_for_bit(outcomes):
    for cell, found in outcomes:
        assert found.resumed_losses == found.losses[HALF:], cell
        for name, value in found.final.items():
            assert torch.equal(value, found.resumed[name]), (cell, name)


def test_another_stage_takes_the_gains_as_they_were(outcomes):
    moved = [(cell, found) for cell, found in outcomes if found.moved is not None]
    assert len(moved) == 2 * 2
    for cell, found in moved:
        masters, used = found.moved
        for name, value in found.saved.items():
            assert torch.equal(masters[name], value), (cell, name)
            assert name not in used or torch.equal(used[name], value), (cell, name)
        assert len(used) == len(found.used)
