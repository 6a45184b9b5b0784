"""Tests of: dualtrain.engine.build, groups, optimizer_state, parameters, process.

Parameter groups by value, and DeepSpeed's updates against the paper's in plain PyTorch.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.models import MUON, slot_tokens, tiny_model
from helpers.paper_optimizer import PaperOptimizer
from helpers.ranks import on_ranks
from safetensors.torch import save_file
from torch import nn

from dualtrain.checkpoint.store import load_weights
from dualtrain.common.errors import UserError
from dualtrain.derived.cost import optimizer_groups
from dualtrain.engine.build import (
    build_engine,
    build_optimizer,
    set_learning_rate,
)
from dualtrain.engine.config import merge_settings
from dualtrain.engine.groups import group_parameters, muon_scale
from dualtrain.engine.optimizer_state import _state_tensor
from dualtrain.engine.parameters import muon_parameter_names, parameter_shapes, whole_parameters
from dualtrain.engine.process import (
    check_precision,
    init_distributed,
    leave_distributed,
    prepare_process,
)
from dualtrain.model.build import build_model
from dualtrain.network.arithmetic import model_sizes
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM
from dualtrain.recipe.load import load_recipe
from dualtrain.recipe.schema import ModelSection, OptimSection

SLOTS = 4
LEARNING_RATES = (7e-3, 7e-3, 5e-3, 2e-3, 1e-3)


def reference(name: str) -> dict[str, torch.Tensor]:
    """The tiny model's parameters after all steps, on one process, from the mean over all slots."""
    model = tiny_model()
    parameters = dict(model.named_parameters())
    optimizer = PaperOptimizer(parameters, MUON if name == "muon" else ())
    for step, learning_rate in enumerate(LEARNING_RATES):
        model.zero_grad()
        for slot in range(SLOTS):
            (model(slot_tokens(step, slot)) / SLOTS).backward()
        gradients = {key: p.grad for key, p in parameters.items() if p.grad is not None}
        optimizer.step(gradients, learning_rate)
    return {key: value.detach() for key, value in parameters.items()}


def train_cases(cases: list[tuple[int, str, str]], slots: int) -> list[dict[str, torch.Tensor]]:
    """Train the tiny model once for each (stage, precision, optimizer); return final parameters."""
    from deepspeed.utils import safe_get_full_fp32_param

    prepare_process(compile_model=False)
    init_distributed(timeout_s=600)
    rank, world = dist.get_rank(), dist.get_world_size()
    results = []
    for stage, precision, name in cases:
        model = tiny_model()
        shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
        groups = group_parameters(shapes, MUON if name == "muon" else ())
        optim = OptimSection(name=name, newton_schulz="gram")
        config = ds_config(stage, precision, slots=slots, world=world)
        engine = build_engine(model, build_optimizer(model, groups, optim), config)
        for step, learning_rate in enumerate(LEARNING_RATES):
            set_learning_rate(engine, learning_rate)
            for slot in range(rank, slots, world):
                engine.backward(engine(slot_tokens(step, slot)))
                engine.step()
        final = {}
        for key, parameter in engine.module.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            final[key] = (parameter if full is None else full).detach().float().clone()
        results.append(final)
        engine.destroy()
        del engine
    leave_distributed()
    return results


def ds_config(stage: int, precision: str, *, slots: int, world: int) -> dict[str, object]:
    return merge_settings(
        f"zero{stage}",
        precision=precision,
        micro_batch=1,
        accumulation=slots // world,
        world_size=world,
    )


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_updates_are_the_papers_at_every_stage(ranks, tmp_path):
    cases = [(stage, "fp32", name) for stage in range(4) for name in ("muon", "adamw")]
    cases += [(stage, "bf16", "muon") for stage in (1, 3, 0, 2)]
    results = on_ranks(train_cases, cases, SLOTS, ranks=ranks, tmp_path=tmp_path)
    expected = {name: reference(name) for name in ("muon", "adamw")}
    start = dict(tiny_model().named_parameters())
    for result in results:
        for (stage, precision, name), final in zip(cases, result, strict=True):
            for key, value in expected[name].items():
                moved = (value - start[key].detach()).norm()
                difference = (final[key] - value).norm()
                # fp32: the order of additions, through 5 Newton-Schulz iterations and 5 updates.
                # bf16: gradients have 8 bits, and Adam's first steps divide them by themselves.
                tolerance = 1e-4 if precision == "fp32" else 0.2
                assert difference <= tolerance * moved, (stage, precision, name, key)


def partitioned_models(precisions: list[str], folder: str) -> list[dict[str, object]]:
    """Build the same model whole and partitioned from the start, and train both a little.

    Returns:
        For each precision, by name: `values` (whole, partitioned), `groups` (likewise), `trained`
        (likewise), `loaded` (what was loaded, partitioned) and the `largest` number of elements
        that a parameter had in memory while the model was partitioned.
    """
    prepare_process(compile_model=False)
    init_distributed(timeout_s=600)
    rank, world = dist.get_rank(), dist.get_world_size()
    results = [_whole_and_partitioned(p, Path(folder), rank, world) for p in precisions]
    leave_distributed()
    return results


def _whole_and_partitioned(precision: str, folder: Path, rank: int, world: int) -> dict:
    info = SimpleNamespace(vocab_size=60, bos_id=0, eos_id=1, pad_id=2, mask_id=3)
    recipe = SimpleNamespace(
        model=ModelSection(layers=3, width=12, heads=2, mlp_width=20, head="paper"),
        seed=5,
        sequence_length=8,
    )
    config = ds_config(3, precision, slots=2 * world, world=world)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    models = [build_model(recipe, info), build_model(recipe, info, config)]
    result = {"largest": max(parameter.numel() for parameter in models[1].parameters())}
    result["values"] = [whole_values(model) for model in models]
    result["groups"] = [
        group_parameters(parameter_shapes(model), muon_parameter_names(model)) for model in models
    ]
    result["trained"] = [
        _train_dual(model, groups, config, rank)
        for model, groups in zip(models, result["groups"], strict=True)
    ]
    changed = {name: value.float() + 0.3 for name, value in result["values"][0].items()}
    if rank == 0:
        save_file(changed, folder / "weights.safetensors")
    dist.barrier()
    again = build_model(recipe, info, config)
    load_weights(folder, again)
    result["loaded"] = [changed, whole_values(again)]
    return result


def whole_values(model: nn.Module) -> dict[str, torch.Tensor]:
    with whole_parameters(model.parameters()):
        return {name: value.detach().clone() for name, value in model.named_parameters()}


def _train_dual(model: nn.Module, groups: list, config: dict, rank: int) -> dict:
    """Two steps of two slots on numbers that are no text."""
    from deepspeed.utils import safe_get_full_fp32_param

    engine = build_engine(model, build_optimizer(model, groups, OptimSection()), config)
    assert not any(block.mlp.may_pack for block in model.model.layers)  # stage 3
    generator = torch.Generator().manual_seed(rank)
    for _ in range(4):
        tokens = torch.randint(60, (1, 9), generator=generator)
        engine.backward(engine(tokens[:, :-1], targets=tokens[:, 1:]).loss)
        engine.step()
    final = {
        name: safe_get_full_fp32_param(parameter).clone()
        for name, parameter in engine.module.named_parameters()
    }
    engine.destroy()
    return final


def test_model_built_partitioned_is_the_same_model(tmp_path):
    """At stage 3 no rank ever holds the whole model, and nothing else is different."""
    precisions = ["fp32", "bf16"]
    results = on_ranks(partitioned_models, precisions, str(tmp_path), ranks=2, tmp_path=tmp_path)
    cells = [(p, cell) for rank in results for p, cell in zip(precisions, rank, strict=True)]
    for precision, result in cells:
        assert result["largest"] == 0
        whole, partitioned = result["groups"]
        assert whole == partitioned
        assert sum(len(group.names) for group in whole if group.uses_muon) == 3 * 7 + 1
        for kind in ("values", "trained", "loaded"):
            whole, partitioned = result[kind]
            assert whole.keys() == partitioned.keys()
            for name, value in whole.items():
                # A partitioned model in bf16 is so from the start, a whole one from the engine on.
                assert torch.equal(value.to(partitioned[name].dtype), partitioned[name]), name
                if kind != "trained":
                    kept = precision == "fp32" or "norm" in name
                    assert (partitioned[name].dtype == torch.float32) is kept, name
        start, trained = result["values"][0], result["trained"][0]
        assert all(not torch.equal(start[name], value) for name, value in trained.items())


@pytest.mark.parametrize(("rows", "cols"), [(5, 12), (20, 5), (20, 20)])
def test_scale_turns_deepspeeds_factor_into_the_papers(rows, cols):
    deepspeeds = math.sqrt(max(1, rows / cols))
    assert muon_scale(rows, cols) * deepspeeds == pytest.approx(0.2 * math.sqrt(max(rows, cols)))


def test_groups_by_value():
    model = tiny_model()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    groups = group_parameters(shapes, MUON)
    assert [(g.label, g.names) for g in groups] == [
        ("muon 5x12", ("wide.weight",)),
        ("muon 20x5", ("tall.weight",)),
        ("muon 20x20", ("square.weight",)),
        ("adamw", ("embedding.weight", "norm.weight", "norm.bias", "out.weight", "out.bias")),
    ]
    optim = OptimSection(lr=0.01, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.99), eps=1e-9)
    options = build_optimizer(model, groups, optim).param_groups
    for group, chosen in zip(groups, options, strict=True):
        assert chosen["lr"] == pytest.approx(0.01 * group.lr_scale)
        # lr * weight_decay, what a parameter shrinks by, is that of the recipe in every group.
        assert chosen["lr"] * chosen["weight_decay"] == pytest.approx(0.001)
        assert chosen["use_muon"] == group.uses_muon
        assert all(parameter.use_muon == group.uses_muon for parameter in chosen["params"])
    assert options[0]["momentum"] == 0.9 and options[0]["ns_method"] == "standard"
    assert options[-1]["betas"] == (0.8, 0.99) and options[-1]["eps"] == 1e-9


def test_bf16_is_refused_by_a_gpu_that_would_emulate_it(monkeypatch):
    asked = []
    supported = lambda including_emulation: asked.append(including_emulation)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(UserError, match="bf16 is not supported by Tesla V100.*engine.precision"):
        check_precision("bf16", torch.device("cuda", 0))
    assert asked == [False]
    check_precision("fp32", torch.device("cuda", 0))
    check_precision("bf16", torch.device("cpu"))


@pytest.mark.parametrize("head", ["paper", "linear"])
def test_groups_of_the_dry_run_are_the_models(head):
    recipe = load_recipe("paper/470m", [f"model.head={head}"]).recipe
    config = DualConfig.of_recipe(recipe.model, 16_384)
    sizes = model_sizes(config)
    with torch.device("meta"):
        model = DualLM(config)
    muon = muon_parameter_names(model)
    assert list(optimizer_groups(recipe, sizes)) == group_parameters(parameter_shapes(model), muon)
    adamw = load_recipe("paper/470m", ["optim.name=adamw"]).recipe
    assert [group.label for group in optimizer_groups(adamw, sizes)] == ["adamw"]


@pytest.mark.parametrize(("fused", "device"), [(None, "cpu"), (True, "meta")])
def test_count_of_a_resumed_adamw_lies_where_its_kernel_reads_it(fused, device):
    """The fused one, which a GPU has, takes it from the parameter's device."""
    optimizer: Any = torch.optim.AdamW([nn.Parameter(torch.empty(3, device="meta"))])
    optimizer.param_groups[0]["fused"] = fused
    engine: Any = SimpleNamespace(
        optimizer=optimizer, zero_optimization_partition_weights=lambda: False
    )
    for key in ("exp_avg", "exp_avg_sq"):
        assert _state_tensor(engine, 0, key, updates=7).device.type == "meta"
    (state,) = optimizer.state.values()
    assert state["step"].device.type == device
