"""The ``config.json`` of an exported model, in the names that transformers and others look for.

The linear head is described as a Llama, for whoever serves one; the code beside the weights reads
the same file when transformers is asked to trust it, and adds the modes that Llama has not. The
paper's head exists in that code only. An imported model remains what it was.

Whichever version of transformers writes a file, 4 and 5 read it alike: 4 would otherwise take its
own defaults for rotary settings that 5 has renamed, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from dualtrain.common.errors import UserError
from dualtrain.model.handle import Target
from dualtrain.network.config import DualConfig

CODE = "modeling_dualtrain"
"""The file of Python code in an exported model."""

_TARGET = "diffusion_target"
_APPEND_EOS = "append_eos"
_DOCUMENT_MASK = "document_mask"
_HEAD = "head"
# The old name: transformers before 4.56 knows no other, and newer ones know both.
DTYPE = "torch_dtype"
"""What an export's ``config.json`` calls the type of its weights."""

_CLASSES = {
    "AutoConfig": "DualTrainConfig",
    "AutoModel": "DualTrainModel",
    "AutoModelForCausalLM": "DualTrainForCausalLM",
    "AutoModelForMaskedLM": "DualTrainForMaskedLM",
    "AutoModelForSequenceClassification": "DualTrainForSequenceClassification",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


def exported_config(
    config: DualConfig, *, target: Target, append_eos: bool, document_mask: bool = True
) -> dict[str, Any]:
    """Describe a model for transformers 4 and 5 alike.

    Args:
        target: What its diffusion objective predicts at i: token i+1, or i.
        append_eos: Whether the texts of its training ended with ``</s>``.
        document_mask: Whether attention ended at the borders of documents.
    """
    values = asdict(config) | _training(target, append_eos, document_mask)
    values |= {"tie_word_embeddings": False, "use_cache": True}
    auto_map = {auto: f"{CODE}.{name}" for auto, name in _CLASSES.items()}
    if config.head == "paper":
        return {
            "architectures": ["DualTrainForCausalLM"],
            "model_type": DualConfig.model_type,
            "auto_map": auto_map,
            **values,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "auto_map": auto_map,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **values,
    }


def exported_import(
    values: Mapping[str, Any], *, target: Target, append_eos: bool, document_mask: bool = True
) -> dict[str, Any]:
    """Describe a model that was imported from Hugging Face and trained.

    Args:
        values: Its ``config.json`` in a checkpoint.
    """
    exported = {**values, **_training(target, append_eos, document_mask)}
    exported.pop("dtype", None)
    rope = dict(values.get("rope_parameters") or {})
    is_neox = values["model_type"] == "gpt_neox"
    if (theta := rope.pop("rope_theta", None)) is not None:
        exported["rotary_emb_base" if is_neox else "rope_theta"] = theta
    if (share := rope.pop("partial_rotary_factor", None)) is not None and is_neox:
        exported["rotary_pct"] = share
    if rope.get("rope_type", "default") != "default":
        exported["rope_scaling"] = rope
    return exported


def _training(target: Target, append_eos: bool, document_mask: bool) -> dict[str, Any]:
    """What a configuration says of the training; of documents only what is not usual."""
    unusual = {} if document_mask else {_DOCUMENT_MASK: False}
    return {_TARGET: target, _APPEND_EOS: append_eos, **unusual}


def check_sizes(sizes: Mapping[str, object], where: str) -> None:
    """Refuse sizes of which no model can be made; transformers looks at few of them.

    Raises:
        UserError: One is no integer above 0.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(where, f"{name}: {size!r}", "an integer above 0")


def is_exported(values: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is from an export of a ``DualLM``, also when saved again."""
    return _TARGET in values and _HEAD in values


def read_exported_config(values: Mapping[str, Any], *, where: str) -> DualConfig:
    """The configuration of the model that an export's ``config.json`` describes.

    Args:
        values: As :func:`exported_config` gave them, perhaps saved again by transformers.

    Raises:
        UserError: A value is missing, or no model can have it.
    """
    # transformers 5 keeps the base here only.
    values = {**values, **(values.get("rope_parameters") or {})}
    missing = [f.name for f in fields(DualConfig) if f.name not in values]
    if missing:
        raise UserError(where, f"lacks {', '.join(missing)}", hint="export the model again")
    check_sizes({name: values[name] for name in _SIZES}, where)
    for name in ("rms_norm_eps", "rope_theta"):
        if not isinstance(values[name], int | float) or values[name] <= 0:
            raise UserError(where, f"{name}: {values[name]!r}", "a number above 0")
    return DualConfig.of(values)


def exported_target(values: Mapping[str, Any]) -> Target:
    """What the diffusion objective of an exported model predicts at i."""
    return values.get(_TARGET, "next")


def exported_append_eos(values: Mapping[str, Any]) -> bool:
    """Whether the texts of an exported model's training ended with ``</s>``; False if not known."""
    return values.get(_APPEND_EOS) is True


def exported_document_mask(values: Mapping[str, Any]) -> bool:
    """Whether attention ended at the borders of documents in an exported model's training."""
    return values.get(_DOCUMENT_MASK) is not False
