"""Parameter groups by value, and DeepSpeed's updates against the paper's in plain PyTorch."""

import math

import pytest
import torch
from helpers.engine_workers import (
    LEARNING_RATES,
    MUON,
    partitioned_models,
    slot_tokens,
    tiny_model,
    train_cases,
)
from helpers.ranks import PaperOptimizer, on_ranks

from dualtrain.common.errors import UserError
from dualtrain.derived.cost import optimizer_groups
from dualtrain.engine.build import build_optimizer
from dualtrain.engine.groups import group_parameters, muon_scale
from dualtrain.engine.parameters import muon_parameter_names, parameter_shapes
from dualtrain.engine.process import check_precision
from dualtrain.network.arithmetic import model_sizes
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM
from dualtrain.recipe.load import load_recipe
from dualtrain.recipe.schema import OptimSection

SLOTS = 4


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
    sizes = model_sizes(recipe.model, 16_384)
    with torch.device("meta"):
        model = DualLM(
            DualConfig(
                vocab_size=sizes.vocab_size,
                width=sizes.width,
                layers=sizes.layers,
                mlp_width=sizes.mlp_width,
                head=head,
            )
        )
    muon = muon_parameter_names(model)
    assert list(optimizer_groups(recipe, sizes)) == group_parameters(parameter_shapes(model), muon)
    adamw = load_recipe("paper/470m", ["optim.name=adamw"]).recipe
    assert [group.label for group in optimizer_groups(adamw, sizes)] == ["adamw"]
