"""Tests of: dualtrain.network.initialize.

Initial weights: the paper's distributions, and what they depend on.
"""

import math

import pytest
import torch

from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM

# The standard deviation of a unit normal distribution cut at +-2.
CUT = math.sqrt(1 - 2 * 2 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


@pytest.fixture(scope="module")
def model() -> DualLM:
    return DualLM(
        DualConfig(
            vocab_size=640,
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=300,
        ),
        seed=5,
    )


def expected_std(name: str, config: DualConfig) -> float:
    """The paper's table, written out."""
    body = math.sqrt(2 / (5 * config.hidden_size))
    if "embed_tokens" in name or "lm_head" in name:
        return math.sqrt(2 / (config.hidden_size + config.vocab_size))
    if "gate_proj" in name or "up_proj" in name:
        layer = int(name.split(".")[2])
        return body * math.sqrt(1 / (2 * (layer + 1)))
    return body


def test_every_parameter_has_its_distribution(model):
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if "norm" in name:
            assert (values == 1).all(), name
        elif name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
            assert (values == 0).all(), name
        else:
            std = expected_std(name, model.config)
            count = values.numel()
            assert values.abs().max() <= 2 * std * (1 + 1e-5), name
            assert values.abs().max() > 1.9 * std, name
            assert values.mean().abs() < 5 * std / math.sqrt(count), name
            assert values.std().item() == pytest.approx(std * CUT, rel=5 / math.sqrt(count)), name


def test_the_shape_is_a_truncated_normal_not_just_its_moments(model):
    # Share within half a standard deviation: a clipped or uniform draw would differ.
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    std = expected_std("q_proj", model.config)
    share = (weight.abs() < 0.5 * std).float().mean().item()
    exact = math.erf(0.5 / math.sqrt(2)) / math.erf(2 / math.sqrt(2))
    assert share == pytest.approx(exact, abs=4 * math.sqrt(exact / weight.numel()))


def test_seed_decides_everything_and_the_global_generator_nothing():
    config = DualConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    torch.manual_seed(1)
    first = DualLM(config, seed=7)
    state = torch.get_rng_state()
    second = DualLM(config, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    other = DualLM(config, seed=8)
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.ndim == 1 or (a == 0).all() or not torch.equal(a, c), name


def test_no_two_parameters_share_their_numbers(model):
    seen = [
        parameter.detach()[:16, :16] / expected_std(name, model.config)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and parameter.abs().max() > 0
    ]
    for index, first in enumerate(seen):
        assert all((first - second).abs().max() > 0.1 for second in seen[:index])


def test_a_model_from_the_meta_device_gets_the_same_weights(model):
    with torch.device("meta"):
        late = DualLM(model.config)
    late.to_empty(device="cpu")
    for parameter in late.parameters():
        parameter.data.fill_(math.nan)
    late.initialize(5)
    for (name, a), b in zip(model.named_parameters(), late.parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, late(ids).logits)


def test_a_large_matrix_drawn_in_blocks_is_one_stream(monkeypatch):
    from dualtrain.network import initialize

    whole = initialize.truncated_normal(torch.Size([40, 30]), 1.0, 0, "x")
    monkeypatch.setattr(initialize, "_BLOCK", 128)
    assert torch.equal(initialize.truncated_normal(torch.Size([40, 30]), 1.0, 0, "x"), whole)
