"""Tests of: dualtrain.common.cpu, and what follows from it in engine.build and derived.dry_run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualtrain.common.cpu import has_bfloat16
from dualtrain.derived.dry_run import machine_rows
from dualtrain.engine.build import build_optimizer
from dualtrain.engine.groups import group_parameters
from dualtrain.engine.parameters import muon_parameter_names, parameter_shapes
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM
from dualtrain.recipe.load import load_recipe
from dualtrain.recipe.schema import OptimSection

CORES = {
    "flags\t\t: fpu avx2 avx512_bf16 ssse3": True,
    "flags : amx_bf16\n\nflags : amx_bf16": True,
    "Features : fp asimd bf16": True,
    "flags : fpu avx2 avx512f": False,
    "flags : amx_bf16\nflags : avx2": False,
    "model name : x": True,
}


@pytest.mark.parametrize("text", CORES)
def test_flags_tell_whether_bf16_is_computed(text: str, tmp_path: Path):
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert has_bfloat16(file) is CORES[text]
    assert has_bfloat16(tmp_path / "none")


@pytest.mark.parametrize(("has", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_newton_schulz_is_fp32_where_bf16_is_emulated(has: bool, dtype, monkeypatch):
    from deepspeed.runtime.zero.muon import original_muon

    monkeypatch.setattr(original_muon, "ns_compute_dtype", original_muon.ns_compute_dtype)
    monkeypatch.setattr("dualtrain.engine.build.has_bfloat16", lambda: has)
    model = DualLM(DualConfig(64, 12, 1, 2, 20))
    groups = group_parameters(parameter_shapes(model), muon_parameter_names(model))
    build_optimizer(model, groups, OptimSection())
    assert original_muon.ns_compute_dtype("standard") is dtype


def test_the_dry_run_says_what_the_cpu_means(monkeypatch):
    recipe = load_recipe("quickstart", ["engine.precision=bf16"]).recipe
    monkeypatch.setattr("dualtrain.derived.dry_run.has_gpu", lambda: False)
    monkeypatch.setattr("dualtrain.derived.dry_run.has_bfloat16", lambda: False)
    said = {name: (value, reason) for name, value, reason in machine_rows(recipe, 400)}
    assert said["Newton-Schulz"][0] == "fp32"
    assert "less than half as fast" in said["engine.precision"][1]
    assert "model.compile=true" in said["model.compile"][1]
    monkeypatch.setattr("dualtrain.derived.dry_run.has_bfloat16", lambda: True)
    assert list(machine_rows(recipe, 100)) == []
    monkeypatch.setattr("dualtrain.derived.dry_run.has_gpu", lambda: True)
    monkeypatch.setattr("dualtrain.derived.dry_run.has_bfloat16", lambda: False)
    assert list(machine_rows(recipe, 400)) == []
