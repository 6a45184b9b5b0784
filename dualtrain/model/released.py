"""Models of the paper's released code, in the names and the configuration of ``DualLM``.

What that code saves is a state dict; its sizes are those of the tensors, and what tensors do not
tell stands in a JSON file such as its ``configs/large.json``. Each layer is the same function as
``DualLM``'s with the paper's head: norms before attention and MLP, rotary halves, the up projection
before the gate, and the norm of the output in its classifier. Source: ``model/model.py`` of
ltgoslo/dual-language-models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualtrain.common.errors import UserError
from dualtrain.common.file_kinds import open_weights, refuse_foreign
from dualtrain.model.pretrained import check_values
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM

_EMBEDDING = "embedding.word_embedding.weight"
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_OUTSIDE = {
    _EMBEDDING: "model.embed_tokens.weight",
    "classifier.pre_norm.weight": "model.norm.weight",
    "classifier.projection.weight": "head_projection.weight",
    "classifier.emb2vocab.weight": "lm_head.weight",
    "classifier.emb2vocab.bias": "lm_head.bias",
}
_IN_LAYER = {
    "attention.pre_norm.weight": "input_layernorm.weight",
    "attention.qkv_proj.weights.0": "self_attn.q_proj.weight",
    "attention.qkv_proj.weights.1": "self_attn.k_proj.weight",
    "attention.qkv_proj.weights.2": "self_attn.v_proj.weight",
    "attention.out_proj.weight": "self_attn.o_proj.weight",
    "mlp.pre_norm.weight": "post_attention_layernorm.weight",
    "mlp.up_proj.weights.0": "mlp.up_proj.weight",
    "mlp.up_proj.weights.1": "mlp.gate_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}
# Norms that may have no gains, by what says so.
_GAINS = {
    "attention_pre_norm_affine": "input_layernorm",
    "feed_forward_pre_norm_affine": "post_attention_layernorm",
    "classifier_pre_norm_affine": "model.norm",
}
# Made anew from the configuration.
_CONSTANTS = ("cos_matrix", "sin_matrix", "inv_freq")
_SHOWN = 5

# The released code's name, and what other tools call the same.
_SETTINGS = {
    "num_attention_heads": ("num_attention_heads", "num_heads"),
    "d_h": ("d_h", "head_size", "head_dim"),
    "rope_theta": ("rope_theta",),
    "norm_eps": ("norm_eps", "layer_norm_eps", "rms_norm_eps"),
    "max_sequence_length": ("max_sequence_length", "max_position_embeddings"),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "num_layers": ("num_layers", "num_hidden_layers"),
}
_FRACTIONS = ("rope_theta", "norm_eps")

STATE_DICT = "a state dict of the paper's released code"


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Read the tensors that ``torch.save`` or safetensors wrote; nothing in the file is run.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    if file.suffix == ".safetensors":
        with open_weights(file) as weights:
            return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except OSError as error:
        raise UserError(str(file), f"cannot be read: {error.strerror}", STATE_DICT) from None
    except Exception as error:  # a damaged file may raise anything
        if not _is_zip(file):
            refuse_foreign(file, STATE_DICT)
        reason = str(error).splitlines()[0][:200] if str(error) else "it ends early"
        raise UserError(str(file), f"cannot be read: {reason}", STATE_DICT) from None
    # Where a run was saved to be continued, the model is one entry of several.
    if isinstance(saved, dict) and isinstance(saved.get("model"), dict):
        saved = saved["model"]
    if not isinstance(saved, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in saved.items()
    ):
        raise UserError(str(file), "holds other things than tensors by name", STATE_DICT)
    return saved


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def convert(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    special_tokens: Mapping[str, int],
    *,
    where: str,
    settings_file: str,
) -> tuple[DualConfig, dict[str, Tensor]]:
    """Give a released model the names of a ``DualLM``.

    Args:
        tensors: By the released names; all may have a prefix, such as ``module.``.
        special_tokens: Ids by role, of its tokenizer.
        where: What to call the tensors in an error.
        settings_file: What to call the settings in an error.

    Returns:
        The model's configuration, and its weights, none of which share memory.

    Raises:
        UserError: The tensors are those of another model, or do not fit one another, the settings
            or the tokenizer; of names that are missing or not understood, the first are told.
    """
    weights = _renamed(tensors, where)
    config = _config(weights, settings, special_tokens, where=where, settings_file=settings_file)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in DualLM(config).named_parameters()}
    for setting, norm in _GAINS.items():
        if settings.get(setting) is False:
            gains = [name for name in shapes if f"{norm}.weight" in name and name not in weights]
            weights |= {name: torch.ones(shapes[name]) for name in gains}
    if settings.get("tie_weights") is True:
        # safetensors keeps one of two that are the same.
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    if missing := [name for name in shapes if name not in weights]:
        raise UserError(where, f"lacks {_listed([*map(_released, missing)])}", STATE_DICT)
    for name, value in weights.items():
        if value.shape != shapes[name]:
            what = f"{_released(name)} is of shape {tuple(value.shape)}"
            raise UserError(where, what, f"{tuple(shapes[name])}, as the others have it")
        check_values(value, name, where)
    if weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr():
        weights["lm_head.weight"] = weights["lm_head.weight"].clone()  # tied in the released model
    return config, weights


def _renamed(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    anchor = next((name for name in tensors if name.endswith(_EMBEDDING)), None)
    if anchor is None:
        what = f"has no {_EMBEDDING}; it has {_listed(list(tensors))}"
        raise UserError(where, what, STATE_DICT)
    prefix = anchor.removesuffix(_EMBEDDING)
    weights, unknown = {}, []
    for name, value in tensors.items():
        own = _own_name(name.removeprefix(prefix))
        if own is not None:
            weights[own] = value
        elif not name.endswith(_CONSTANTS):
            unknown.append(name)
    if unknown:
        raise UserError(where, f"has names that are not understood: {_listed(unknown)}", STATE_DICT)
    return weights


def _own_name(released: str) -> str | None:
    layer = _LAYER.fullmatch(released)
    if layer is None:
        return _OUTSIDE.get(released)
    own = _IN_LAYER.get(layer[2])
    return None if own is None else f"model.layers.{int(layer[1])}.{own}"


def _released(name: str) -> str:
    """The released name of a weight of a ``DualLM``."""
    for released, own in _OUTSIDE.items():
        if own == name:
            return released
    _, _, number, part = name.split(".", 3)
    (released,) = (released for released, own in _IN_LAYER.items() if own == part)
    return f"encoder.layers.{number}.{released}"


def _config(
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    special_tokens: Mapping[str, int],
    *,
    where: str,
    settings_file: str,
) -> DualConfig:
    rows, width = _matrix(weights, "model.embed_tokens.weight", where)
    _, mlp_width = _matrix(weights, "model.layers.0.mlp.down_proj.weight", where)
    numbers = {int(name.split(".")[2]) for name in weights if name.startswith("model.layers")}
    # Were it the largest of them, a number in a name could ask for any memory.
    layers = len(numbers)
    if beyond := [number for number in sorted(numbers) if number >= layers]:
        what = f"has {layers} layers, one of which is number {beyond[0]}"
        raise UserError(where, what, f"the numbers 0 to {layers - 1}")
    given = dict(_given(settings, settings_file))
    for name, size in {
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_layers": layers,
    }.items():
        if given.get(name, size) != size:
            what = f"{name} is {given[name]}, but {size} in {where}"
            raise UserError(settings_file, what, "the settings of the same model")
    if "num_attention_heads" not in given and "d_h" in given:
        given["num_attention_heads"] = width // max(int(given["d_h"]), 1)
    needed = ("num_attention_heads", "rope_theta", "norm_eps", "max_sequence_length")
    if missing := [name for name in needed if name not in given]:
        what = f"does not say {', '.join(missing)}"
        raise UserError(settings_file, what, "as in the released configs/large.json")
    heads, head_size = int(given["num_attention_heads"]), given.get("d_h")
    if head_size is not None and heads * head_size != width:
        what = f"{heads} heads of size {head_size} are not the width {width} in {where}"
        raise UserError(settings_file, what, "the settings of the same model")
    return DualConfig(
        vocab_size=rows,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp_width,
        rope_theta=float(given["rope_theta"]),
        rms_norm_eps=float(given["norm_eps"]),
        max_position_embeddings=int(given["max_sequence_length"]),
        bos_token_id=special_tokens["<s>"],
        eos_token_id=special_tokens["</s>"],
        pad_token_id=special_tokens.get("<pad>"),
        mask_token_id=special_tokens["<mask>"],
    )


def _matrix(weights: Mapping[str, Tensor], name: str, where: str) -> tuple[int, int]:
    found = weights.get(name)
    if found is None or found.ndim != 2:
        what = "is not there" if found is None else f"is of shape {tuple(found.shape)}"
        raise UserError(where, f"{_released(name)} {what}", "a matrix")
    return found.shape[0], found.shape[1]


def _given(settings: Mapping[str, Any], where: str) -> Iterator[tuple[str, int | float]]:
    """The settings that are there, by the released code's names."""
    for name, others in _SETTINGS.items():
        for key in others:
            value = settings.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise UserError(f"{where}: {key}", f"{value!r}", "a number above 0")
            if not math.isfinite(value) or (name not in _FRACTIONS and value != int(value)):
                expected = "a finite number" if name in _FRACTIONS else "an integer above 0"
                raise UserError(f"{where}: {key}", f"{value!r}", expected)
            yield name, value
            break


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
