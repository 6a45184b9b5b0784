"""Tests of: dualtrain.network.cache.

The key-value cache against whole rows, and losses of several targets at a place.
"""

import pytest
import torch
from helpers.models import add_noise

from dualtrain.network.attention import plan_attention
from dualtrain.network.cache import KeyValueCache
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM


@pytest.fixture(scope="module")
def model():
    config = DualConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        head="paper",
    )
    return add_noise(DualLM(config, seed=1).eval(), 0.1)


def alone(model, prompt, branch, kind):
    """Logits of the branch's tokens in a row of their own."""
    ids = torch.tensor([[*prompt, *branch]])
    first = torch.arange(ids.shape[1])[None] < len(prompt) if kind == "prefix" else None
    plan = plan_attention(
        kind, torch.zeros_like(ids), backend="sdpa", device="cpu", in_prefix=first
    )
    return model(ids, attention=plan).logits[0, len(prompt) - 1 :]


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_token_by_token_is_as_one_pass(model, kind):
    prompts, rest = [[1, 5, 6, 7, 8], [1, 9]], [[10, 11, 12], [13, 14, 15]]
    cache = KeyValueCache(2, 8)
    ids = torch.tensor([row + [0] * (5 - len(row)) for row in prompts])
    with torch.no_grad():
        plan = cache.plan_prompts([5, 2], kind, 5)
        first = model(ids, attention=plan).logits
        got = [[first[row, len(prompts[row]) - 1]] for row in range(2)]
        for step in range(3):
            plan, positions = cache.plan_next()
            ids = torch.tensor([[rest[0][step]], [rest[1][step]]])
            logits = model(ids, attention=plan, positions=positions).logits
            for row in range(2):
                got[row].append(logits[row, 0])
        for row in range(2):
            name = "causal" if kind == "causal" else "prefix"
            expected = alone(model, prompts[row], rest[row], name)
            torch.testing.assert_close(torch.stack(got[row]), expected)
    with pytest.raises(ValueError, match="room for 8 tokens"):
        cache.plan_next()


def test_losses_of_single_targets(model):
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        logits = model(ids).logits[0]
        best = int(logits[2].argmax())
        selection = torch.tensor([2, 2, 0])
        targets = torch.tensor([best, (best + 1) % 64, 5])
        output = model(ids, selection=selection, targets=targets)
    expected = -logits[selection].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(output.nll, expected)
    assert output.is_top[:2].tolist() == [True, False]
    with pytest.raises(ValueError, match="selection"):
        model(ids, targets=targets)
