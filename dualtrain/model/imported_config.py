"""Configurations of Hugging Face decoders: read, checked, translated between versions.

Only families whose attention and head are known to be nothing but a mask away from ``DualLM``'s are
taken: another one may scale or cap its logits, or skip parts of its attention, and would be trained
as something else without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from dualtrain.common.errors import UserError, raise_together
from dualtrain.common.file_kinds import read_object
from dualtrain.model.exported import check_sizes

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox")
"""Values of ``model_type`` that can be imported; ``gpt_neox`` is Pythia's."""

_DROPOUTS = ("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Their frequencies depend on the longest row of a batch.
_VARIABLE_ROPES = ("dynamic", "longrope")


def read_config(file: Path) -> PretrainedConfig:
    """Read the ``config.json`` of a model of a known family.

    Raises:
        UserError: It cannot be read, is of another family, or has something that is not supported.
    """
    values = read_object(file, "a model's configuration")
    return parse_config(values, where=str(file))


def parse_config(values: Mapping[str, Any], *, where: str) -> PretrainedConfig:
    """Make a configuration of the values of a ``config.json``.

    Args:
        values: By name, as version 4 or 5 of transformers writes them.

    Raises:
        UserError: As in :func:`read_config`.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            where,
            f"model_type {family!r} cannot be imported",
            f"one of {', '.join(FAMILIES)}",
            "what another family does beside attention masks is not known here",
        )
    try:
        config = CONFIG_MAPPING[family].from_dict(_in_words_of_installed(family, values))
    except Exception as error:  # each version of transformers has exceptions of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(where, f"is not a configuration of {family}: {reason}") from None
    _check_sizes(config, where)
    raise_together(_obstacles(config, values, where))
    return config


def longest_row(config: PretrainedConfig) -> int:
    """Tokens a row can have: as many as there are positions, and no more than are attended to."""
    positions = config.max_position_embeddings
    window = _sliding_window(config)
    return positions if window is None else min(positions, window)


def check_length(config: PretrainedConfig, sequence_length: int, *, where: str) -> None:
    """Check that a recipe's sequences fit the model.

    Raises:
        UserError: They have more tokens than positions, or than a sliding window.
    """
    most = longest_row(config)
    if sequence_length <= most:
        return
    is_window = most < config.max_position_embeddings
    reason = "a sliding window" if is_window else "positions"
    raise UserError(
        "sequence_length",
        f"{sequence_length:,}, but {where} has {reason} of {most:,} tokens"
        if is_window
        else f"{sequence_length:,}, but {where} has {most:,} {reason}",
        f"at most {most:,}",
    )


def find_dropouts(config: PretrainedConfig) -> dict[str, float]:
    """Dropout probabilities above 0 by name."""
    values = {name: getattr(config, name, None) for name in _DROPOUTS}
    return {name: value for name, value in values.items() if value}


def remove_dropout(config: PretrainedConfig) -> None:
    """Set every dropout probability to 0, in place: the method trains without."""
    for name in find_dropouts(config):
        setattr(config, name, 0.0)


def _check_sizes(config: PretrainedConfig, where: str) -> None:
    check_sizes({name: getattr(config, name, None) for name in _SIZES}, where)
    width, heads = config.hidden_size, config.num_attention_heads
    if getattr(config, "head_dim", None) is None and width % heads:
        raise UserError(where, f"hidden_size {width} with {heads} heads", "a multiple of the heads")


def _sliding_window(config: PretrainedConfig) -> int | None:
    """The window of its layers in tokens; None where all of them see everything before them."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    if window is None or (layers and "sliding_attention" not in layers):
        return None
    return window


def _obstacles(config: PretrainedConfig, values: Mapping[str, Any], where: str) -> list[UserError]:
    """What of a known family is not supported."""
    found = []
    if values.get("quantization_config"):
        what = "quantization_config: quantised weights cannot be trained"
        found.append(UserError(where, what, "weights in fp32, bf16 or fp16"))
    if getattr(config, "add_cross_attention", False):
        found.append(UserError(where, "add_cross_attention: true", "a decoder alone"))
    for name, wanted in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        value = getattr(config, name, wanted)
        if value is not wanted:
            # Version 4 of transformers leaves it out wherever attention is not `eager`.
            found.append(UserError(where, f"{name}: {value}", f"{wanted}"))
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in _VARIABLE_ROPES:
        what = f"rotary embeddings of type {kind!r} depend on the longest row of a batch"
        found.append(UserError(where, what, "another type, such as default, linear, yarn, llama3"))
    return found


def _in_words_of_installed(family: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate what version 5 of transformers has renamed, where version 4 is to read it.

    Version 5 reads version 4's files by itself; version 4 would take its own defaults for rotary
    settings that it does not find. To be removed with support for version 4.
    """
    translated = dict(values)
    rope = translated.get("rope_parameters")
    if rope is None or hasattr(CONFIG_MAPPING["llama"](), "rope_parameters"):
        return translated
    del translated["rope_parameters"]
    rope = dict(rope)
    theta, share = rope.pop("rope_theta", None), rope.pop("partial_rotary_factor", None)
    is_neox = family == "gpt_neox"
    if theta is not None:
        translated["rotary_emb_base" if is_neox else "rope_theta"] = theta
    if share is not None and is_neox:
        translated["rotary_pct"] = share
    if rope.get("rope_type", "default") != "default":
        translated["rope_scaling"] = rope
    return translated
