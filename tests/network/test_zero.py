"""Tests of: dualtrain.network.transformer, engine.parameters.

The model under DeepSpeed's ZeRO: parameters that come and go around each module.
"""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from helpers.models import add_noise
from helpers.ranks import on_ranks
from torch import Tensor

from dualtrain.engine.process import init_distributed, prepare_process
from dualtrain.network import loss
from dualtrain.network.attention import plan_attention
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM

LENGTH = 16


def deepspeed_differences(
    cases: list[tuple[int, str, bool, bool]],
) -> list[tuple[float, float, float]]:
    """Train with DeepSpeed and alone, for each (stage, head, activation checkpointing,
    loss in place).

    Returns:
        For each case how far apart the two are, at most: losses, the weighted mean of the single
        losses and the cross-entropy, parameters after two steps.
    """
    prepare_process(compile_model=False)
    init_distributed(timeout_s=600)
    import deepspeed

    rank, world = dist.get_rank(), dist.get_world_size()
    results = []
    for stage, head, recompute, in_place in cases:
        model, plain = make_model(head), make_model(head)
        model.activation_checkpointing = recompute
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            # Nothing is small enough to stay whole.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        loss_difference = single_difference = 0.0
        for step in range(2):
            plain.zero_grad()
            for slot, kind in enumerate(("causal", "full")):
                for other in range(world):
                    ids, batch = make_batch(100 * step + 10 * slot + other, kind)
                    expected = plain(ids, **batch, z_loss=1e-2)
                    (expected.loss / (2 * world)).backward()
                    if other != rank:
                        continue
                    with torch.no_grad():
                        singles = engine(ids, **batch, reduction="none").nll
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr(loss, "compiles_for", lambda _, answer=in_place: answer)
                        actual = engine(ids, **batch, z_loss=1e-2)
                    engine.backward(actual.loss)
                    engine.step()
                    mean = (singles * batch["weights"]).mean()
                    loss_difference = max(loss_difference, distance(actual.loss, expected.loss))
                    single_difference = max(single_difference, distance(mean, actual.cross_entropy))
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter -= parameter.grad
        parameters = list(model.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
            moved = max(distance(a, b) for a, b in zip(parameters, plain.parameters(), strict=True))
        results.append((loss_difference, single_difference, moved))
        engine.destroy()
        del engine
    # In this order, or the interpreter may abort when it exits.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    return results


def distance(first: Tensor, second: Tensor) -> float:
    return (first.detach() - second.detach()).abs().max().item()


def make_model(head: str) -> DualLM:
    config = DualConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=44,
        head=head,
    )
    model = add_noise(DualLM(config), 0.1, seed=3)
    model.lm_head.chunk_rows = 5
    return model


def make_batch(seed: int, kind: str) -> tuple[Tensor, dict]:
    generator = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(96, (2, 2, LENGTH), generator=generator)
    documents = torch.zeros(2, LENGTH, dtype=torch.int32)
    documents[:, 9:] = 1
    weights = (torch.rand(2, LENGTH, generator=generator) < 0.5) * 2.0
    plan = plan_attention(kind, documents, backend="sdpa", device="cpu")
    return ids, {"attention": plan, "targets": targets, "weights": weights}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_zero_stage_trains_the_same_model(tmp_path, ranks):
    cases = [(0, "paper", False, False), (2, "paper", False, True)]
    cases += [
        (3, head, recompute, head == "paper")
        for head in ("paper", "linear")
        for recompute in (False, True)
    ]
    results = on_ranks(deepspeed_differences, cases, ranks=ranks, tmp_path=tmp_path)
    for rank in results:
        for case, (losses, singles, parameters) in zip(cases, rank, strict=True):
            # float32 sums of some dozen numbers around 5, in different orders.
            assert losses < 1e-5 and singles < 1e-5, case
            assert parameters < 1e-5, case
