"""From and to transformers' ``LlamaForCausalLM``, for models with the linear head.

The parameters have the same names and meanings, so a state dict needs no conversion: only the
configuration does. transformers 5 moved the rotary base from ``rope_theta`` to a dictionary; both
are read and written here.
"""

from __future__ import annotations

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dualtrain.errors import UserError, UserErrors
from dualtrain.model.config import DualConfig
from dualtrain.model.transformer import DualLM


def to_llama_config(config: DualConfig) -> LlamaConfig:
    """Describe the same model in Llama's terms.

    Raises:
        UserError: The model has the paper's head, which Llama has not.
    """
    if config.head != "linear":
        raise UserError(
            "model.head",
            f"{config.head!r} has no Llama layout",
            "linear, for a model that is to be exported as Llama",
        )
    if hasattr(LlamaConfig(), "rope_parameters"):
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    else:
        rope = {"rope_theta": config.rope_theta}
    return LlamaConfig.from_dict(
        {
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "intermediate_size": config.mlp_width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.heads,
            "max_position_embeddings": config.sequence_length,
            "rms_norm_eps": config.norm_eps,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "tie_word_embeddings": False,
            "architectures": ["LlamaForCausalLM"],
            **rope,
        }
    )


def from_llama_config(llama: LlamaConfig, *, mask_token_id: int) -> DualConfig:
    """Describe a Llama in our terms.

    Args:
        llama: Full multi-head attention, untied, without biases and without rotary scaling.
        mask_token_id: The token that is to stand for a masked one.

    Raises:
        UserError: Everything about this Llama that a ``DualLM`` cannot express.
    """
    rope = getattr(llama, "rope_parameters", None) or {
        "rope_theta": getattr(llama, "rope_theta", None),
        **(getattr(llama, "rope_scaling", None) or {}),
    }
    wanted = {
        "num_key_value_heads": llama.num_attention_heads,
        "head_dim": llama.hidden_size // llama.num_attention_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    wrong = [
        UserError(f"LlamaConfig.{key}", repr(getattr(llama, key)), repr(value))
        for key, value in wanted.items()
        if getattr(llama, key) != value
    ]
    if rope.get("rope_type", "default") != "default":
        wrong.append(UserError("LlamaConfig.rope_type", repr(rope["rope_type"]), "'default'"))
    if wrong:
        raise UserErrors(wrong)
    return DualConfig(
        vocab_size=llama.vocab_size,
        width=llama.hidden_size,
        layers=llama.num_hidden_layers,
        heads=llama.num_attention_heads,
        mlp_width=llama.intermediate_size,
        rope_theta=rope["rope_theta"],
        norm_eps=llama.rms_norm_eps,
        head="linear",
        sequence_length=llama.max_position_embeddings,
        bos_token_id=llama.bos_token_id,
        eos_token_id=llama.eos_token_id,
        pad_token_id=llama.pad_token_id,
        mask_token_id=mask_token_id,
    )


def to_llama(model: DualLM) -> LlamaForCausalLM:
    """Copy a model with the linear head into a ``LlamaForCausalLM`` on the same device.

    Raises:
        UserError: The model has the paper's head.
    """
    llama = LlamaForCausalLM(to_llama_config(model.config))
    _copy_weights(model, llama)
    return llama


def from_llama(llama: LlamaForCausalLM, *, mask_token_id: int) -> DualLM:
    """Copy a ``LlamaForCausalLM`` into a ``DualLM`` on the same device.

    Raises:
        UserError: It has something that a ``DualLM`` cannot express.
    """
    model = DualLM(from_llama_config(llama.config, mask_token_id=mask_token_id))
    _copy_weights(llama, model)
    return model


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give one model copies of the other's parameters, with their type, on their device."""
    state = {name: value.clone() for name, value in source.state_dict().items()}
    # Llama's rotary frequencies are a buffer: they must follow to the device, but not to bf16.
    target.to(device=next(iter(state.values())).device)
    target.load_state_dict(state, assign=True)
    target.train(source.training)
