"""The linear head is Llama: parity on copied weights, and configurations both ways."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dualtrain.errors import UserError, UserErrors
from dualtrain.model import (
    DualConfig,
    DualLM,
    from_llama,
    from_llama_config,
    to_llama,
    to_llama_config,
)

IDS = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))


# Not the defaults of either library: a base or an epsilon that is lost on the way shows.
@pytest.mark.parametrize(("theta", "eps"), [(160_000.0, 1e-7), (500.0, 1e-2)])
def test_a_dual_model_exported_as_llama_computes_the_same(tiny_model, theta, eps):
    model = tiny_model(head="linear", rope_theta=theta, norm_eps=eps)
    llama = to_llama(model)
    assert isinstance(llama, LlamaForCausalLM)
    with torch.no_grad():
        mine, theirs = model(IDS).logits, llama(IDS).logits
    assert (mine - theirs).abs().max() < 1e-5
    assert mine.std() > 0.1


def test_a_bf16_model_keeps_its_type_and_llama_its_exact_frequencies(tiny_model):
    model = tiny_model(head="linear").to(torch.bfloat16).eval()
    llama = to_llama(model)
    assert llama.dtype == torch.bfloat16 and not llama.training
    frequencies = llama.model.rotary_emb.inv_freq
    assert torch.equal(frequencies, LlamaForCausalLM(llama.config).model.rotary_emb.inv_freq)
    llama.lm_head.weight.data.zero_()
    assert model.lm_head.weight.abs().max() > 0


def test_rotary_base_and_epsilon_matter_to_this_comparison(tiny_model):
    reference = tiny_model(head="linear")(IDS).logits
    for change in ({"rope_theta": 500.0}, {"norm_eps": 1e-2}):
        assert (tiny_model(head="linear", **change)(IDS).logits - reference).abs().max() > 1e-3


def test_a_saved_llama_is_an_ordinary_llama(tiny_model, tmp_path):
    model = tiny_model(head="linear")
    to_llama(model).save_pretrained(tmp_path)
    llama = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (llama(IDS).logits - model(IDS).logits).abs().max() < 1e-5
    back = from_llama(llama, mask_token_id=4)
    assert torch.equal(back(IDS).logits, model(IDS).logits)


def test_parameter_names_are_llamas(tiny_model):
    model = tiny_model(head="linear")
    llama = LlamaForCausalLM(to_llama_config(model.config))
    shapes = {name: p.shape for name, p in llama.state_dict().items()}
    assert {name: p.shape for name, p in model.state_dict().items()} == shapes


def test_a_foreign_llama_becomes_a_dual_model():
    rope = (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}
        if hasattr(LlamaConfig(), "rope_parameters")
        else {"rope_theta": 700.0}
    )
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        rms_norm_eps=1e-4,
        **rope,
    )
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config)
    model = from_llama(llama, mask_token_id=5)
    assert isinstance(model, DualLM) and model.config.mask_token_id == 5
    assert (model.config.rope_theta, model.config.norm_eps) == (700.0, 1e-4)
    with torch.no_grad():
        assert (llama(IDS).logits - model(IDS).logits).abs().max() < 1e-5


def test_configurations_survive_both_conversions(tiny_config):
    config = tiny_config(head="linear", rope_theta=321.0, norm_eps=1e-3, sequence_length=77)
    again = from_llama_config(to_llama_config(config), mask_token_id=4)
    ours = ("vocab_size", "width", "layers", "heads", "mlp_width", "rope_theta", "norm_eps")
    for field in (*ours, "head", "sequence_length", "bos_token_id", "eos_token_id"):
        assert getattr(again, field) == getattr(config, field), field


def test_what_has_no_counterpart_is_refused(tiny_config):
    with pytest.raises(UserError, match="'paper' has no Llama layout"):
        to_llama_config(tiny_config(head="paper"))
    grouped = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_act="gelu",
        tie_word_embeddings=True,
    )
    with pytest.raises(UserErrors) as caught:
        from_llama_config(grouped, mask_token_id=4)
    for field in ("num_key_value_heads", "hidden_act", "tie_word_embeddings"):
        assert f"LlamaConfig.{field}" in str(caught.value)
    assert len(caught.value.errors) == 3


def test_scaled_rotary_embeddings_are_refused():
    scaling = {"rope_type": "linear", "factor": 2.0}
    if hasattr(LlamaConfig(), "rope_parameters"):
        config = LlamaConfig(rope_parameters={**scaling, "rope_theta": 1e4})
    else:
        config = LlamaConfig(rope_scaling=scaling)
    with pytest.raises(UserErrors, match="rope_type: 'linear'"):
        from_llama_config(config, mask_token_id=4)


def test_defaults_are_the_papers():
    config = DualConfig()
    assert (config.rope_theta, config.norm_eps, config.head) == (160_000.0, 1e-7, "paper")
