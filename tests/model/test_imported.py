"""Tests of: dualtrain.model.imported: the stock model when causal, and what plans make of it."""

from __future__ import annotations

import pytest
import torch
from helpers.imported import VOCABULARY, config_of, imported_model, stock_model

from dualtrain.common.errors import UserError, UserErrors
from dualtrain.engine.parameters import muon_parameter_names
from dualtrain.model.imported import ImportedLM, imported_sizes, initial_values
from dualtrain.model.imported_config import FAMILIES, check_length, longest_row, parse_config
from dualtrain.network.attention import plan_attention
from dualtrain.network.cache import KeyValueCache

IDS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
# Bounds between documents: at 9 and 17 in one row, none in the other.
DOCUMENTS = torch.zeros(2, 24, dtype=torch.int32)
DOCUMENTS[0, 9:] = 1
DOCUMENTS[0, 17:] = 2


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def stock(family):
    return stock_model(family)


@pytest.fixture(scope="module")
def model(stock):
    return imported_model(stock)


def plan(kind, documents=DOCUMENTS, **options):
    return plan_attention(kind, documents, backend="sdpa", device="cpu", **options)


@torch.no_grad()
def logits(model, ids, attention=None, **options):
    return model(ids, attention=attention, **options).logits


def test_causal_attention_is_the_stock_model_bit_for_bit(model, stock):
    expected = stock(IDS).logits
    assert torch.equal(logits(model, IDS), expected)
    assert torch.equal(logits(model, IDS, plan("causal", torch.zeros_like(IDS))), expected)
    assert expected.std() > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_the_stock_models_cross_entropy(family, tied):
    stock = stock_model(family, tie_word_embeddings=tied)
    model = imported_model(stock)
    targets = torch.roll(IDS, -1, 1)
    expected = torch.nn.functional.cross_entropy(stock(IDS).logits.flatten(0, 1), targets.flatten())
    output = model(IDS, targets=targets)
    torch.testing.assert_close(output.loss, expected)
    expected.backward()
    output.loss.backward()
    theirs = {name: p.grad for name, p in stock.named_parameters()}
    for name, parameter in model.named_parameters():
        name = name if name in theirs else name.replace("embed_out", "lm_head")
        torch.testing.assert_close(parameter.grad, theirs[name], msg=name, rtol=1e-4, atol=1e-6)


def test_packed_documents_are_as_in_rows_of_their_own(model):
    for kind in ("causal", "full"):
        whole = logits(model, IDS, plan(kind))
        for begin, end in ((0, 9), (9, 17), (17, 24)):
            alone = plan(kind, torch.zeros(1, end - begin, dtype=torch.int32))
            positions = torch.arange(begin, end)[None]
            part = logits(model, IDS[:1, begin:end], alone, positions=positions)
            torch.testing.assert_close(whole[:1, begin:end], part, rtol=0, atol=1e-6 * 24)


def dependence(model, kind, **options):
    """Whether the logits at a position of the first row depend on the input at another."""
    embedding = model.get_input_embeddings()
    given = []

    def keep(_module, _inputs, output):
        given.append(output.detach().requires_grad_())
        return given[0]

    hook = embedding.register_forward_hook(keep)
    output = model(IDS, attention=plan(kind, **options)).logits[0]
    hook.remove()
    seen = []
    for position in range(24):
        (gradient,) = torch.autograd.grad(output[position].square().sum(), given, retain_graph=True)
        seen.append(gradient[0].abs().sum(-1) > 0)
        assert not gradient[1].any()
    return torch.stack(seen)


def test_full_attention_sees_the_future_and_no_other_document(model):
    same = DOCUMENTS[0][:, None] == DOCUMENTS[0][None, :]
    assert torch.equal(dependence(model, "full"), same)
    assert torch.equal(dependence(model, "causal"), same.tril())


def test_a_prefix_sees_itself(model):
    first = torch.arange(24) < torch.tensor([[5], [0]])
    # Later positions depend on what the prefix's positions have made of each other.
    expected = (DOCUMENTS[0][:, None] == DOCUMENTS[0][None, :]).tril()
    expected[:5, :5] = True
    assert torch.equal(dependence(model, "prefix", in_prefix=first), expected)


def test_the_row_of_a_padding_token_is_trained(family):
    """Some models pad with their `</s>`, which transformers' embedding then never learns."""
    model = ImportedLM(config_of(family, pad_token_id=5, tie_word_embeddings=False))
    assert model.config.pad_token_id == 5
    model(torch.full((1, 4), 5), targets=torch.full((1, 4), 7)).loss.backward()
    assert model.get_input_embeddings().weight.grad[5].any()


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_token_by_token_is_as_one_pass(model, kind):
    cache, prompt = KeyValueCache(2, 24), 7
    begun = cache.plan_prompts([prompt, prompt], kind, prompt)
    got = [logits(model, IDS[:, :prompt], begun)[:, -1]]
    for step in range(prompt, 24):
        attention, positions = cache.plan_next()
        got.append(logits(model, IDS[:, step : step + 1], attention, positions=positions)[:, 0])
    first = (torch.arange(24) < prompt).expand(2, -1)
    options = {} if kind == "causal" else {"in_prefix": first}
    name = "causal" if kind == "causal" else "prefix"
    whole = logits(model, IDS, plan(name, torch.zeros_like(DOCUMENTS), **options))
    torch.testing.assert_close(torch.stack(got, 1), whole[:, prompt - 1 :], rtol=1e-4, atol=1e-5)


def test_recomputing_blocks_changes_nothing(model):
    targets = torch.roll(IDS, -1, 1)
    gradients = []
    model.train()
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        assert model.activation_checkpointing is recompute
        model.zero_grad()
        model(IDS, attention=plan("full"), targets=targets).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    model.activation_checkpointing = False
    model.eval().zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_blocks_are_recomputed(model):
    calls = []
    norm = model.blocks[0].get_submodule(
        "ln_1" if model.config.model_type == "gpt2" else "input_layernorm"
    )
    hook = norm.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    model.activation_checkpointing = True
    model(IDS, targets=IDS).loss.backward()
    model.activation_checkpointing = False
    model.eval().zero_grad()
    hook.remove()
    assert len(calls) == 2


def test_compiled_blocks_compute_the_same(family, monkeypatch):
    model = imported_model(stock_model(family))
    plans = [plan("causal", torch.zeros_like(DOCUMENTS)), plan("full"), plan("full")]
    expected = [logits(model, IDS, attention) for attention in plans]
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda block, **options: compile_module(block, backend=backend, fullgraph=True, **options),
    )
    # The test session turns compilation off.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(disable=False):
        model.compile_blocks()
        for attention, value in zip(plans, expected, strict=True):
            torch.testing.assert_close(logits(model, IDS, attention), value)
    torch._dynamo.reset()
    assert len(graphs) == 2  # one for each kind, shared by the blocks


def test_muon_gets_the_bodys_matrices(model):
    names = muon_parameter_names(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert all(len(shapes[name]) == 2 for name in names)
    left = {name for name, shape in shapes.items() if len(shape) == 2} - set(names)
    tables = {"embed_tokens", "wte", "wpe", "embed_in", "lm_head", "embed_out"}
    assert {name.split(".")[-2] for name in left} <= tables
    assert len(names) == 2 * len({name.split(".", 3)[3] for name in names})


def test_sizes_are_those_of_the_model(family):
    for tied in (False, True):
        config = config_of(family, tie_word_embeddings=tied)
        sizes, model = imported_sizes(config), ImportedLM(config)
        assert sizes.shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert len(sizes.vocabulary) == (1 if tied else 2)
        assert list(sizes.matrices) == muon_parameter_names(model)


def test_casting_and_materialising_keep_frequencies_and_ties(family):
    config = config_of(family, tie_word_embeddings=True)
    expected = dict(ImportedLM(config).named_buffers())
    with torch.device("meta"):
        model = ImportedLM(config)
    model.to_empty(device="cpu").to(torch.bfloat16)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert next(model.parameters()).dtype == torch.bfloat16
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, expected[name])


def test_initial_values_are_the_familys_and_depend_on_the_seed_alone(family):
    config = config_of(family)
    first, again = (dict(initial_values(config, seed=3)) for _ in range(2))
    other = dict(initial_values(config, seed=4))
    torch.manual_seed(0)
    stock = {name: p.detach() for name, p in ImportedLM(config).named_parameters()}
    assert list(first) == list(stock)
    for name, parameter in stock.items():
        assert torch.equal(first[name], again[name])
        assert first[name].dtype == torch.float32
        if parameter.ndim == 1:
            assert torch.equal(first[name], parameter)  # gains and biases
            continue
        assert not torch.equal(first[name], other[name])
        assert abs(float(first[name].std() / parameter.std()) - 1) < 0.15, name


def test_no_family_beside_the_known_ones_is_taken():
    with pytest.raises(UserError, match="'gemma2' cannot be imported.*llama, qwen2"):
        parse_config({"model_type": "gemma2"}, where="config.json")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "longest row"),
        ("llama", {"hidden_size": "wide"}, "not a configuration of llama"),
    ],
)
def test_what_would_silently_differ_is_refused(family, changes, message):
    with pytest.raises((UserError, UserErrors), match=message):
        config = config_of(family, **changes)
        if changes == {"hidden_size": "wide"}:
            ImportedLM(config)


def test_rows_are_no_longer_than_positions_and_windows():
    window = {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}
    assert longest_row(config_of("mistral", sliding_window=32)) == 32
    assert longest_row(config_of("qwen2", **window)) == 32
    assert longest_row(config_of("qwen2", **{**window, "use_sliding_window": False})) == 64
    check_length(config_of("gpt2"), 64, where="DIR")
    with pytest.raises(UserError, match="sequence_length: 65, but DIR has 64 positions"):
        check_length(config_of("gpt2"), 65, where="DIR")
    with pytest.raises(UserError, match="sliding window of 32"):
        check_length(config_of("mistral", sliding_window=32), 33, where="DIR")


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_rotary_settings_of_either_version_are_understood(family):
    base = "rotary_emb_base" if family == "gpt_neox" else "rope_theta"
    scaling = {"rope_type": "linear", "factor": 4.0}
    old = {base: 500.0, "rope_scaling": scaling}
    new = {"rope_parameters": {"rope_theta": 500.0, **scaling}}
    if family == "gpt_neox":
        old["rotary_pct"] = 0.5
        new["rope_parameters"]["partial_rotary_factor"] = 0.5
    plain = {key: value for key, value in config_of(family).to_dict().items()}
    for key in ("rope_parameters", "rope_scaling", "rope_theta", "rotary_pct", "rotary_emb_base"):
        plain.pop(key, None)
    buffers = [
        dict(ImportedLM(parse_config({**plain, **rope}, where="x")).named_buffers())
        for rope in (old, new)
    ]
    (name,) = [name for name in buffers[0] if name.endswith("rotary_emb.inv_freq")]
    assert torch.equal(buffers[0][name], buffers[1][name])
    assert not torch.equal(
        buffers[0][name], dict(ImportedLM(config_of(family)).named_buffers())[name]
    )
