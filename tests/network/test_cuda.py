"""Tests of: dualtrain.network.transformer, attention (on a GPU).

The whole model on a CUDA device: ``pytest -m gpu tests/network``.
"""

import pytest
import torch

from dualtrain.network import attention as attention_module
from dualtrain.network.attention import plan_attention
from dualtrain.network.loss import select_positions
from dualtrain.network.transformer import DualLM

pytestmark = pytest.mark.gpu

LENGTH = 256
BF16 = torch.bfloat16
BACKENDS = pytest.mark.parametrize("backend", ["sdpa", "varlen", "flex"])


def batch(kind: str):
    generator = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(96, (2, 2, LENGTH), generator=generator)
    documents = torch.zeros(2, LENGTH, dtype=torch.int32)
    documents[0, 100:] = 1
    weights = torch.ones(2, LENGTH)
    if kind == "full":
        weights = (torch.rand(2, LENGTH, generator=generator) < 0.5) * 2.0
    return ids, targets, weights, documents


def train_pass(model: DualLM, kind: str, backend: str, device: str, dtype: torch.dtype):
    """One slot as the training loop runs it: everything is moved without waiting."""
    ids, targets, weights, documents = batch(kind)
    plan = plan_attention(kind, documents, backend=backend, device=device, dtype=dtype)
    selection = select_positions(weights)
    place = torch.device(device)
    moved = [
        None if x is None else attention_module.to_device(x, place)
        for x in (ids, targets, weights, selection)
    ]
    out = model(
        moved[0],
        attention=plan,
        targets=moved[1],
        weights=moved[2],
        selection=moved[3],
        z_loss=1e-3,
    )
    out.loss.backward()
    return out


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["causal", "full"])
@BACKENDS
def test_every_backend_trains_the_model_the_cpu_trains(
    tiny_model, compiler, backend, kind, compiled
):
    exact, model = tiny_model(), tiny_model().to("cuda", BF16)
    if compiled:
        model.compile_blocks()
    expected = train_pass(exact, kind, "sdpa", "cpu", torch.float32)
    actual = train_pass(model, kind, backend, "cuda", BF16)
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=2e-2)
    for (name, mine), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        difference = (mine.grad.cpu().float() - theirs.grad).norm() / theirs.grad.norm()
        assert difference < 0.1, name


@BACKENDS
def test_a_slot_never_waits_for_the_device(tiny_model, compiler, backend):
    model = tiny_model().to("cuda", BF16)
    for kind in ("causal", "full"):
        train_pass(model, kind, backend, "cuda", BF16)  # compiles, allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        for kind in ("causal", "full"):
            train_pass(model, kind, backend, "cuda", BF16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_initial_weights_are_the_cpus(tiny_config):
    with torch.device("cuda"):
        model = DualLM(tiny_config(), seed=3)
    for (name, mine), theirs in zip(
        model.named_parameters(), DualLM(tiny_config(), seed=3).parameters(), strict=True
    ):
        assert mine.is_cuda and torch.equal(mine.cpu(), theirs), name
