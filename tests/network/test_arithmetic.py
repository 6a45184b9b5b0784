"""Tests of: dualtrain.network.arithmetic.

Closed forms against the model itself and the paper's numbers.
"""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dualtrain.network.arithmetic import flops_per_token, model_sizes
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM


def on_meta(config: DualConfig) -> DualLM:
    with torch.device("meta"):
        return DualLM(config)


def test_the_papers_model_has_exactly_the_papers_parameters():
    model = on_meta(DualConfig())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    vocabulary = sizes["model.embed_tokens.weight"] + sizes["lm_head.weight"]
    assert sum(sizes.values()) == 468_700_160
    assert sum(sizes.values()) - vocabulary == 363_842_560


@pytest.mark.parametrize("head", ["paper", "linear"])
def test_closed_form_counts_what_the_model_has(head):
    for config in (
        DualConfig(head=head),
        DualConfig(
            vocab_size=320,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=100,
            head=head,
        ),
    ):
        model = on_meta(config)
        sizes = model_sizes(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        assert sizes.parameters == total
        vocabulary = 2 * config.vocab_size * config.hidden_size
        assert sizes.elements(sizes.vocabulary) == vocabulary


def test_flops_of_the_papers_model():
    # Measured figures of the design: 2,799 causal; 2,941 with the head on half the positions.
    config = model_sizes(DualConfig())
    assert flops_per_token(config, 2048, "causal") / 1e6 == pytest.approx(2799, abs=1)
    assert flops_per_token(config, 2048, "full") / 1e6 == pytest.approx(2941, abs=1)
    assert flops_per_token(config, 2048, "full", 1.0) > flops_per_token(config, 2048, "full", 0.5)


@pytest.mark.parametrize("head", ["paper", "linear"])
def test_flops_agree_with_torchs_own_counter(head, tiny_model):
    model, length = tiny_model(head=head), 32
    config, ids = model_sizes(model.config), torch.zeros(1, length, dtype=torch.int64)
    # The fused kernels are not counted on a CPU; this one multiplies matrices.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(ids)
    # It multiplies all pairs, causal or not; and the forward pass is a third of a training step.
    assert flops_per_token(config, length, "full", 1.0) * length / 3 == counter.get_total_flops()
    half_the_pairs = config.num_hidden_layers * 4 * config.hidden_size * (length / 2)
    causal = flops_per_token(config, length, "causal")
    assert causal == flops_per_token(config, length, "full", 1.0) - 3 * half_the_pairs


def test_counting_needs_no_torch():
    code = "import sys, dualtrain.network.arithmetic; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
