"""Tests of: dualtrain.network.loss: the fused loss against the formula in plain autograd.

What a GPU compiles, logits turned into their gradient in place, runs here as it is written, and
once compiled for the CPU.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dualtrain.network import loss as loss_module
from dualtrain.network.loss import OutputLayer, select_positions

Z = 1e-2


@pytest.fixture(params=["by chunks", "in place"], scope="class")
def way(request):
    """Each of the two ways to compute the loss; of a class's scope, as hypothesis wants it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "compiles_for", lambda device: request.param == "in place")
        yield


in_both_ways = pytest.mark.usefixtures("way")


def make_layer(width=6, vocab=11, *, bias=True, dtype=torch.float64, rows=None) -> OutputLayer:
    layer = OutputLayer(width, vocab, bias=bias).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer.chunk_rows = rows
    return layer


def make_batch(count=13, width=6, vocab=11, *, dtype=torch.float64, zero_every=3):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(count, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (count,), generator=generator)
    weights = torch.rand(count, generator=generator) * 3
    weights[::zero_every] = 0
    return hidden, targets, weights


def formula(layer, hidden, targets, weights, positions, z_loss):
    """sum w CE / positions and z sum w lse^2 / positions, from all logits at once."""
    logits = F.linear(hidden, layer.weight, layer.bias)
    losses = F.cross_entropy(logits, targets, reduction="none")
    squares = logits.logsumexp(-1) ** 2
    return (weights * losses).sum() / positions, z_loss * (weights * squares).sum() / positions


def gradients(layer, hidden, loss):
    return torch.autograd.grad(loss, [hidden, *layer.parameters()])


@in_both_ways
@given(
    st.integers(0, 17),
    st.sampled_from([1, 2, 5, 16, 17, None]),
    st.booleans(),
    st.sampled_from([0.0, Z]),
    st.integers(1, 4),
)
@settings(max_examples=30, deadline=None)
def test_values_and_gradients_are_the_formulas(count, rows, bias, z_loss, zero_every):
    layer = make_layer(bias=bias, rows=rows)
    hidden, targets, weights = make_batch(count, zero_every=zero_every)
    loss, cross_entropy, z_term = layer(hidden, targets, weights, positions=20, z_loss=z_loss)
    exact = formula(layer, hidden, targets, weights.double(), 20, z_loss)
    torch.testing.assert_close(cross_entropy, exact[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(z_term, exact[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(loss, cross_entropy + z_term)
    # The weights are divided in float32, hence not 1e-12.
    for mine, theirs in zip(
        gradients(layer, hidden, 3 * loss), gradients(layer, hidden, 3 * sum(exact)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@in_both_ways
def test_gradcheck():
    layer = make_layer(rows=2)
    hidden, targets, weights = make_batch(5)

    def loss(hidden, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        arguments = (hidden, targets, weights)
        options = {"positions": 5, "z_loss": Z}
        return torch.func.functional_call(layer, parameters, arguments, options)[0]

    assert torch.autograd.gradcheck(loss, (hidden, layer.weight, layer.bias))


@in_both_ways
def test_float32_is_as_good_as_plain_autograd():
    layer, (hidden, targets, weights) = make_layer(dtype=torch.float32), make_batch(40)
    hidden = hidden.detach().float().requires_grad_()
    loss, *_ = layer(hidden, targets, weights, positions=40, z_loss=Z)
    exact = sum(formula(layer, hidden, targets, weights, 40, Z))
    for mine, theirs in zip(
        gradients(layer, hidden, loss), gradients(layer, hidden, exact), strict=True
    ):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@in_both_ways
@pytest.mark.parametrize("mode", ["bf16 module", "autocast"])
def test_bf16_keeps_float32_losses_and_the_parameters_types(mode):
    kept = torch.bfloat16 if mode == "bf16 module" else torch.float32
    layer, (hidden, targets, weights) = make_layer(dtype=kept), make_batch(64)
    hidden = hidden.detach().to(kept).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        loss, cross_entropy, z_term = layer(hidden, targets, weights, positions=64, z_loss=Z)
    assert {loss.dtype, cross_entropy.dtype, z_term.dtype} == {torch.float32}
    exact_layer = make_layer()
    with torch.no_grad():
        for mine, theirs in zip(exact_layer.parameters(), layer.parameters(), strict=True):
            mine.copy_(theirs)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = sum(formula(exact_layer, exact_hidden, targets, weights, 64, Z))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    for mine, theirs in zip(
        gradients(layer, hidden, loss), gradients(exact_layer, exact_hidden, exact), strict=True
    ):
        assert mine.dtype == kept
        assert (mine.double() - theirs).norm() < 2e-2 * theirs.norm()


@in_both_ways
def test_statistics_carry_no_gradient_and_frozen_parameters_get_none():
    layer, (hidden, targets, weights) = make_layer(), make_batch()
    loss, cross_entropy, z_term = layer(hidden, targets, weights, z_loss=Z)
    assert loss.requires_grad and not cross_entropy.requires_grad and not z_term.requires_grad
    layer.weight.requires_grad_(False)
    layer(hidden, targets, weights)[0].backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
    with torch.no_grad():
        assert not layer(hidden, targets, weights)[0].requires_grad


@in_both_ways
def test_a_second_backward_pass_is_refused_as_usual():
    layer, (hidden, targets, weights) = make_layer(), make_batch()
    loss, *_ = layer(hidden, targets, weights)
    loss.backward(retain_graph=True)
    first = layer.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(layer.weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class WidestLogits(TorchDispatchMode):
    """Remembers the most rows that any (n, vocabulary) tensor had."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocab,):
                self.rows = max(self.rows, tensor.numel() // self.vocab)
        return output


@in_both_ways
def test_full_logits_never_exist():
    layer, (hidden, targets, weights) = make_layer(rows=8), make_batch(64)
    with WidestLogits(11) as widest:
        layer(hidden, targets, weights, z_loss=Z)[0].backward()
        layer(hidden, targets)
    assert widest.rows == 8  # the matrix, transposed, has only 6
    with WidestLogits(11) as widest:
        layer(hidden)
    assert widest.rows == 64


def in_place_and_by_chunks(layer, hidden, targets, weights, autocast=False):
    """[loss, its terms, d(hidden), d(weight), d(bias)] of each way."""
    results = []
    for in_place in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss_module, "compiles_for", lambda device, answer=in_place: answer)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses = layer(hidden, targets, weights, positions=97, z_loss=Z)
        results.append([*losses, *gradients(layer, hidden, losses[0] / 3)])
    return results


@pytest.mark.parametrize("rows", [97, 40, 7])
@pytest.mark.parametrize("mode", ["fp32", "bf16 module", "autocast"])
def test_in_place_is_what_chunks_give(mode, rows):
    kept = torch.bfloat16 if mode == "bf16 module" else torch.float32
    layer = make_layer(24, 131, dtype=kept, rows=rows)
    hidden, targets, weights = make_batch(97, 24, 131)
    hidden = hidden.detach().to(kept).requires_grad_()
    # What torch.empty gives is NaN then: rows that nothing was written to would show.
    torch.use_deterministic_algorithms(True)
    try:
        mine, theirs = in_place_and_by_chunks(layer, hidden, targets, weights, mode == "autocast")
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == other.dtype
        # The exponential of a difference, or a softmax; in bf16 that decides some roundings.
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < (1e-6 if mode == "fp32" else 1e-3)


def test_in_place_tells_of_logits_that_are_not_finite():
    for bad in (torch.nan, torch.inf, -torch.inf):
        layer, (hidden, targets, weights) = make_layer(rows=8), make_batch()
        with torch.no_grad():
            hidden[4] = bad
        mine, theirs = in_place_and_by_chunks(layer, hidden, targets, weights)
        assert not mine[0].isfinite() and not theirs[0].isfinite()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_serves_every_number_of_selected_positions(compiler, monkeypatch, backend):
    """At 16 sizes of a selection dynamo would stop compiling: it does so after 8."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **rest: compile_(f, backend=backend, **rest))
    layer = make_layer(24, 131, dtype=torch.float32)
    torch._dynamo.utils.counters.clear()
    for count in (97, *range(7, 97, 7), 0):
        hidden, targets, weights = make_batch(count, 24, 131)
        hidden = hidden.detach().float().requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=True):
            mine, theirs = in_place_and_by_chunks(layer, hidden, targets, weights)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_nothing_is_compiled_where_there_is_no_compiler(monkeypatch):
    for_cuda = torch.device("cuda")
    assert not loss_module.compiles_for(torch.device("cpu"))
    for found, compiler, expected in ((1, "cc", True), (None, "cc", False), (1, "", False)):
        loss_module._has_compilers.cache_clear()
        monkeypatch.setattr(loss_module.importlib.util, "find_spec", lambda _, answer=found: answer)
        monkeypatch.setattr(loss_module.shutil, "which", lambda _: None)
        monkeypatch.setenv("CC", compiler)
        assert loss_module.compiles_for(for_cuda) is expected
    loss_module._has_compilers.cache_clear()


def test_single_losses_and_logits():
    layer, (hidden, targets, _) = make_layer(rows=3), make_batch()
    logits = layer(hidden)
    torch.testing.assert_close(logits, F.linear(hidden, layer.weight, layer.bias))
    losses = layer(hidden, targets)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    assert not losses.requires_grad


@in_both_ways
def test_a_target_may_be_anything_where_the_weight_is_zero():
    layer, (hidden, targets, weights) = make_layer(), make_batch()
    wild = torch.where(weights == 0, -100, targets)
    assert torch.equal(
        layer(hidden, wild, weights, z_loss=Z)[0], layer(hidden, targets, weights, z_loss=Z)[0]
    )


@given(st.integers(1, 6), st.integers(1, 50), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_selection_has_every_weighted_position_once_and_few_lengths(rows, length, share, seed):
    weights = (
        torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < share
    ) * 2.0
    selection = select_positions(weights)
    total = rows * length
    step = -(-total // 16)
    needed = int((weights != 0).sum())
    if selection is None:
        assert max(needed, 1) > total - step
        return
    assert len(selection) % step == 0 and 0 <= len(selection) - max(needed, 1) < step
    assert len(set(selection.tolist())) == len(selection)
    in_order = torch.argsort(weights.flatten() == 0, stable=True)
    assert torch.equal(selection, in_order[: len(selection)])
    chosen = weights.flatten()[selection]
    assert (chosen[:needed] != 0).all() and selection[:needed].diff().gt(0).all()


def test_selection_refuses_weights_that_are_not_on_the_host():
    with pytest.raises(ValueError, match="on the CPU"):
        select_positions(torch.ones(2, 2, device="meta"))
