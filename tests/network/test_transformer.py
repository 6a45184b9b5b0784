"""Tests of: dualtrain.network.transformer, config, output.

The whole model: what it computes, what it must not see, how it is saved and run.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.models import save_model

from dualtrain.common.errors import UserError
from dualtrain.engine.parameters import muon_parameter_names
from dualtrain.model.build import read_exported
from dualtrain.network.attention import plan_attention
from dualtrain.network.config import DualConfig
from dualtrain.network.loss import select_positions
from dualtrain.network.transformer import (
    DualLM,
    RMSNorm,
    SwiGLU,
    rotary_tables,
    rotate,
)

BF16 = torch.bfloat16
LENGTH = 24
DOCUMENTS = torch.tensor([[0] * 10 + [1] * 14, [0] * 5 + [1] * 9 + [2] * 10], dtype=torch.int32)
IDS = torch.randint(96, (2, LENGTH), generator=torch.Generator().manual_seed(4))
TARGETS = torch.randint(96, (2, LENGTH), generator=torch.Generator().manual_seed(5))
WEIGHTS = torch.zeros(2, LENGTH).index_fill(1, torch.tensor([0, 3, 4, 9, 10, 17, 22]), 2.5)
WEIGHTS[1, [1, 23]] = 0.5  # 16 in all, of 48: not a multiple of the selection's step
HEADS = pytest.mark.parametrize("head", ["paper", "linear"])


def plan(kind: str, ids: torch.Tensor = DOCUMENTS, dtype=torch.float32, prefix=None):
    in_prefix = (
        None if prefix is None else torch.arange(ids.shape[1]) < torch.tensor(prefix)[:, None]
    )
    return plan_attention(kind, ids, backend="sdpa", device="cpu", dtype=dtype, in_prefix=in_prefix)


def changed_rows(model: DualLM, position: int, **attention) -> torch.Tensor:
    """(T,) bool: outputs of row 1 that change when the token at a position of row 1 does."""
    other = IDS.clone()
    other[1, position] = (other[1, position] + 1) % 96
    before = model(IDS, attention=plan(**attention)).logits
    after = model(other, attention=plan(**attention)).logits
    assert torch.equal(before[0], after[0])
    return (before[1] != after[1]).any(-1)


@pytest.mark.parametrize("position", [0, 7, 13, 14, 23])
@pytest.mark.parametrize(
    ("kind", "prefix"), [("causal", None), ("full", None), ("prefix", [0, 18])]
)
def test_a_token_reaches_exactly_what_may_see_it(tiny_model, kind, prefix, position):
    changed = changed_rows(tiny_model(), position, kind=kind, prefix=prefix)
    row = DOCUMENTS[1].tolist()
    for query in range(LENGTH):
        same = row[query] == row[position]
        sees = kind == "full" or position <= query or (kind == "prefix" and position < prefix[1])
        assert bool(changed[query]) == (same and sees), query


def naive_forward(model: DualLM, ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """(B, T, V) logits in float64, from the parameters and the description in the paper."""
    state = {name: p.detach().double() for name, p in model.named_parameters()}
    config = model.config
    size = config.hidden_size // config.num_attention_heads

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * state[name]

    def turn(x):
        pair = torch.arange(size // 2, dtype=torch.float64)
        angle = torch.arange(x.shape[1])[:, None, None] * config.rope_theta ** (-2 * pair / size)
        a, b = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    x = state["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (
            (h @ state[f"{at}.self_attn.{n}_proj.weight"].T).unflatten(
                -1, (config.num_attention_heads, size)
            )
            for n in "qkv"
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", turn(q), turn(k)) / size**0.5
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = x + mixed @ state[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = (h @ state[f"{at}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ state[f"{at}.mlp.down_proj.weight"].T
    x = norm(x, "model.norm.weight")
    if config.head == "linear":
        return x @ state["lm_head.weight"].T
    x = x @ state["head_projection.weight"].T
    x = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x @ state["lm_head.weight"].T + state["lm_head.bias"]


@HEADS
@pytest.mark.parametrize("kind", ["causal", "full"])
def test_the_model_is_the_one_described(tiny_model, head, kind):
    model = tiny_model(head=head)
    seen = DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :]
    if kind == "causal":
        seen = seen & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    logits = model(IDS, attention=plan(kind)).logits
    torch.testing.assert_close(
        logits.double(), naive_forward(model, IDS, seen), rtol=1e-4, atol=1e-4
    )


@HEADS
def test_loss_statistics_and_single_losses_follow_from_the_logits(tiny_model, head):
    model = tiny_model(head=head)
    # The selection is filled up with positions that have no weight: they must not show.
    assert WEIGHTS.count_nonzero() < len(select_positions(WEIGHTS)) < WEIGHTS.numel()
    attention = plan("full")
    logits = model(IDS, attention=attention).logits
    losses = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="none").view(2, -1)
    out = model(IDS, attention=attention, targets=TARGETS, weights=WEIGHTS, z_loss=1e-2)
    torch.testing.assert_close(out.cross_entropy, (WEIGHTS * losses).mean())
    torch.testing.assert_close(out.z_loss, 1e-2 * (WEIGHTS * logits.logsumexp(-1) ** 2).mean())
    torch.testing.assert_close(out.loss, out.cross_entropy + out.z_loss)
    assert out.logits is None and out.nll is None
    unweighted = model(IDS, attention=attention, targets=TARGETS)
    torch.testing.assert_close(unweighted.loss, losses.mean())
    none = model(IDS, attention=attention, targets=TARGETS, weights=WEIGHTS, reduction="none")
    torch.testing.assert_close(none.nll, torch.where(WEIGHTS == 0, 0, losses))
    whole = model(IDS, attention=attention, targets=TARGETS, reduction="none").nll
    torch.testing.assert_close(whole, losses)
    assert whole.dtype == torch.float32 and not whole.requires_grad


def test_selecting_positions_changes_neither_loss_nor_gradients(tiny_model):
    everything = torch.arange(2 * LENGTH)
    runs = []
    for selection in (everything, select_positions(WEIGHTS), None):
        model = tiny_model()
        out = model(
            IDS,
            attention=plan("full"),
            targets=TARGETS,
            weights=WEIGHTS,
            z_loss=1e-3,
            selection=selection,
        )
        out.loss.backward()
        runs.append([out.loss.detach(), *(p.grad for p in model.parameters())])
    for run in runs[1:]:
        for mine, theirs in zip(run, runs[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_plain_autograd(tiny_model):
    model, plain = tiny_model(), tiny_model()
    model.lm_head.chunk_rows = 5
    out = model(IDS, attention=plan("causal"), targets=TARGETS, weights=WEIGHTS, z_loss=1e-2)
    out.loss.backward()
    logits = plain(IDS, attention=plan("causal")).logits.flatten(0, 1)
    losses = F.cross_entropy(logits, TARGETS.flatten(), reduction="none")
    (WEIGHTS.flatten() * (losses + 1e-2 * logits.logsumexp(-1) ** 2)).mean().backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_logits_of_chosen_positions(tiny_model):
    model, chosen = tiny_model(), torch.tensor([3, 30, 17])
    whole = model(IDS, attention=plan("full")).logits
    some = model(IDS, attention=plan("full"), selection=chosen).logits
    torch.testing.assert_close(some, whole.flatten(0, 1)[chosen])


def test_without_a_plan_a_row_is_one_document_read_causally(tiny_model):
    model = tiny_model()
    expected = model(IDS, attention=plan("causal", torch.zeros_like(DOCUMENTS))).logits
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("mode", ["bf16 module", "autocast"])
@pytest.mark.parametrize("kind", ["causal", "full"])
def test_bf16_stays_close_to_fp32(tiny_model, mode, kind):
    exact, half = tiny_model(), tiny_model()
    if mode == "bf16 module":
        half.to(BF16)
    arguments = {"targets": TARGETS, "weights": WEIGHTS, "z_loss": 1e-3}
    expected = exact(IDS, attention=plan(kind), **arguments)
    with torch.autocast("cpu", BF16, enabled=mode == "autocast"):
        actual = half(IDS, attention=plan(kind, dtype=BF16), **arguments)
        logits = half(IDS, attention=plan(kind, dtype=BF16)).logits
    assert actual.loss.dtype == torch.float32 and logits.dtype == BF16
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=2e-2)
    expected.loss.backward()
    actual.loss.backward()
    for (name, mine), theirs in zip(half.named_parameters(), exact.parameters(), strict=True):
        assert mine.grad.dtype == mine.dtype
        difference = (mine.grad.float() - theirs.grad).norm() / theirs.grad.norm()
        assert difference < 0.1, name


def test_norm_and_rotary_compute_in_float32_on_bf16(tiny_config):
    x = torch.randn(4, 6, 2, 16, generator=torch.Generator().manual_seed(7)).to(BF16)
    norm = RMSNorm(16, 1e-7).to(BF16)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 16))
    mean = x.double().square().mean(-1, keepdim=True)
    exact = x.double() / (mean + 1e-7).sqrt() * norm.weight.double()
    # One rounding, at the very end: as near to the exact value as bf16 can be.
    assert (norm(x).double() - exact).abs().max() <= exact.abs().max() * 2**-8
    assert (norm(x) == exact.to(BF16)).double().mean() > 0.99
    table = rotary_tables(tiny_config(), torch.arange(6))
    assert table[0].dtype == torch.float32
    assert torch.equal(rotate(x, table), rotate(x.float(), table).to(BF16))
    # No buffer that a cast would round and the meta device would lose.
    assert not list(DualLM(tiny_config()).buffers())


def test_rotary_positions_count_through_documents(tiny_model):
    # The second document's outputs depend on where it stands only through relative positions.
    model = tiny_model()
    whole = model(IDS, attention=plan("full")).logits[0, 10:]
    alone = model(
        IDS[:1, 10:], attention=plan("full", torch.zeros(1, 14, dtype=torch.int32))
    ).logits
    torch.testing.assert_close(whole, alone[0], rtol=1e-4, atol=1e-4)


def test_checkpointing_changes_memory_only(tiny_model):
    runs = []
    for recompute in (False, True):
        model = tiny_model()
        model.activation_checkpointing = recompute
        calls = []
        for block in model.model.layers:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss = model(IDS, attention=plan("full"), targets=TARGETS, weights=WEIGHTS).loss
        loss.backward()
        runs.append((len(calls), {name: p.grad for name, p in model.named_parameters()}))
    assert [count for count, _ in runs] == [2, 4]
    assert runs[0][1].keys() == runs[1][1].keys()
    for name, gradient in runs[0][1].items():
        assert torch.equal(gradient, runs[1][1][name]), name


def test_compiling_in_place_keeps_names_and_results(tiny_model):
    model, plain = tiny_model(), tiny_model()
    model.compile_blocks()
    assert all(block._compiled_call_impl is not None for block in model.model.layers)
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)


COMPILE_AND_COUNT = """
import torch
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
model = DualLM(DualConfig(vocab_size=96, intermediate_size=44, **sizes))
model.compile_blocks()
ids = torch.randint(96, (2, 16))
model(ids, targets=ids).loss.backward()
counts = torch._dynamo.utils.counters["inductor"]
print(counts["fxgraph_cache_miss"], counts["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_has_compiled(tmp_path):
    """As the runs of a sweep: in torch's own cache, a directory of the user, nothing being set."""
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("TORCHDYNAMO", "TORCHINDUCTOR"))
    }
    env |= {"TMPDIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", COMPILE_AND_COUNT],
            env=env,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.split()
        for _ in range(2)
    )
    assert int(first[0]) > 0 and first[1] == "0"
    assert second == ["0", first[0]]


def test_a_packed_mlp_is_the_same_mlp(tiny_model):
    for width in (44, 64, 3, 70):
        mlp = tiny_model(intermediate_size=width).model.layers[0].mlp.double()
        hidden = torch.randn(3, 7, 32, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(3, 7, 32, dtype=torch.float64)
        inputs = [hidden, *mlp.parameters()]
        outputs = [mlp(hidden), mlp.packed(hidden)]
        gradients = [torch.autograd.grad(output, inputs, upstream) for output in outputs]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*gradients)


def test_mlps_are_packed_where_that_saves_copies(tiny_model):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    odd, even = (tiny_model(intermediate_size=w).model.layers[0].mlp for w in (44, 48))
    assert odd.packs(cuda, BF16) and not even.packs(cuda, BF16)
    assert not odd.packs(cpu, BF16) and not odd.packs(cuda, torch.float32)
    odd.may_pack = False
    assert not odd.packs(cuda, BF16)


@pytest.mark.parametrize("mode", ["fp32", "bf16 module", "autocast"])
def test_compiled_blocks_pack_their_mlps(tiny_model, compiler, monkeypatch, mode):
    """As on a GPU; what they compute is what uncompiled ones do, which never pack."""
    plain, asked = tiny_model(), []
    plain = plain.to(BF16) if mode == "bf16 module" else plain
    model = copy.deepcopy(plain)
    monkeypatch.setattr(SwiGLU, "packs", lambda self, device, dtype: asked.append(dtype) or True)
    compile_ = torch.nn.Module.compile
    for block in model.model.layers:
        compile_(block, backend="eager", fullgraph=True, dynamic=False)
    rows = {"targets": TARGETS, "weights": WEIGHTS, "attention": plan("causal", dtype=BF16)}
    if mode == "fp32":
        rows["attention"] = plan("causal")
    losses = []
    for each in (model, plain):
        with torch.autocast("cpu", BF16, enabled=mode == "autocast"):
            losses.append(each(IDS, **rows).loss)
        losses[-1].backward()
    assert set(asked) == {torch.float32 if mode == "fp32" else BF16}
    tolerance = 1e-5 if mode == "fp32" else 2e-2
    torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() <= tolerance * theirs.grad.norm(), name


def test_muon_has_the_bodys_matrices_and_the_heads_projection(tiny_model):
    expected = {
        f"model.layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    }
    assert set(muon_parameter_names(tiny_model(head="linear"))) == expected
    names = muon_parameter_names(tiny_model(head="paper"))
    assert set(names) == expected | {"head_projection.weight"}
    # DeepSpeed chooses by name where it chooses itself; the two must agree.
    rest = set(dict(tiny_model().named_parameters())) - set(names)
    matrices = {name for name in rest if name.endswith("weight") and "norm" not in name}
    assert matrices == {"model.embed_tokens.weight", "lm_head.weight"}


@HEADS
def test_saved_models_come_back(tiny_model, head, tmp_path):
    model = tiny_model(head=head, rope_theta=1234.0, mask_token_id=7)
    save_model(model, tmp_path)
    again = read_exported(tmp_path)
    assert again.config == model.config and again.config.head == head
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_configurations_of_earlier_checkpoints_are_read(tiny_config):
    """They had the recipe's names, among what transformers adds, and left out the defaults."""
    former = {"model_type": "dualtrain", "transformers_version": "4.57.1", "vocab_size": 96}
    former |= {"width": 32, "layers": 2, "heads": 2, "mlp_width": 44, "norm_eps": 1e-5}
    changes = {"rms_norm_eps": 1e-5, "max_position_embeddings": 64}
    assert DualConfig.of({**former, "sequence_length": 64}) == tiny_config(**changes)


def test_models_can_be_copied(tiny_model):
    model = tiny_model()
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)


def test_impossible_sizes_are_the_users_mistake():
    with pytest.raises(UserError, match=r"model.heads: 3 heads do not divide width 32"):
        DualConfig(hidden_size=32, num_attention_heads=3)
    with pytest.raises(UserError, match=r"model.head: 'cubic' — expected paper or linear"):
        DualConfig(head="cubic")
