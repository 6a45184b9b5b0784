"""Tests of: dualtrain.engine.build, config, whole_matrices: what a step leaves out at stage 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.ranks import on_ranks


def train(slots: int) -> dict[str, int]:
    """Four steps of a small bf16 model on this rank; counts what DeepSpeed calls in the last."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.muon import original_muon

    from dualtrain.engine.build import build_engine, build_optimizer
    from dualtrain.engine.config import merge_settings
    from dualtrain.engine.gradients import Gradients
    from dualtrain.engine.groups import group_parameters
    from dualtrain.engine.parameters import muon_parameter_names, parameter_shapes
    from dualtrain.engine.process import init_distributed, leave_distributed, prepare_process
    from dualtrain.network.config import DualConfig
    from dualtrain.network.transformer import DualLM
    from dualtrain.recipe.schema import OptimSection

    prepare_process(compile_model=False)
    init_distributed(timeout_s=60)
    model = DualLM(
        DualConfig(
            vocab_size=64,
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
        )
    )
    groups = group_parameters(parameter_shapes(model), muon_parameter_names(model))
    config = merge_settings(
        "zero1",
        precision="bf16",
        micro_batch=1,
        accumulation=slots,
        world_size=torch.distributed.get_world_size(),
    )
    optim = OptimSection(newton_schulz="gram")
    engine = build_engine(model, build_optimizer(model, groups, optim), config)
    gradients = Gradients(engine, clip_norm=None)
    accelerator, counts = get_accelerator(), {"synchronize": 0, "muon_update": 0}
    update = original_muon.muon_update

    def synchronize(*_: object) -> None:
        counts["synchronize"] += 1

    def counted(*arguments: object, **options: object) -> torch.Tensor:
        counts["muon_update"] += 1
        return update(*arguments, **options)

    for step in range(4):
        if step == 3:  # its timer begins in the third
            accelerator.synchronize = synchronize
            original_muon.muon_update = counted
        for slot in range(slots):
            ids = torch.full((1, 8), 5 + step + slot)
            engine.backward(engine(ids, targets=ids, weights=torch.ones(1, 8)).loss)
            if slot == slots - 1:
                gradients.prepare()
            engine.step()
    engine.destroy()
    leave_distributed()
    return counts


@pytest.mark.parametrize(("ranks", "updates"), [(1, 3), (2, 3)])
def test_a_step_never_waits_for_the_device_and_updates_matrices_by_shape(
    ranks: int, updates: int, tmp_path: Path
):
    # Queries, keys, values and outputs are one shape; gates and ups another; downs a third. On two
    # ranks a matrix that lies across the border of the partitions is updated by both.
    counts = on_ranks(train, 3, ranks=ranks, tmp_path=tmp_path)
    assert [count["synchronize"] for count in counts] == [0] * ranks
    assert all(count["muon_update"] <= updates + ranks - 1 for count in counts)
