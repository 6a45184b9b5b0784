"""Tests of: dualtrain.model.released.

The released layout is built here from its description, in float32 and without dualtrain; a model
that is read from it must compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.released import (
    SETTINGS,
    SPECIAL,
    VOCABULARY,
    WIDTH,
    released_logits,
    released_weights,
)
from torch import Tensor

from dualtrain.common.errors import UserError
from dualtrain.model.released import convert, read_state_dict
from dualtrain.network.attention import plan_attention
from dualtrain.network.transformer import DualLM


def build(weights: dict[str, Tensor], settings: dict = SETTINGS) -> DualLM:
    config, own = convert(weights, settings, SPECIAL, where="W", settings_file="S")
    model = DualLM(config)
    model.load_state_dict(own)
    return model.eval()


@pytest.mark.parametrize("kind", ["causal", "full"])
@pytest.mark.parametrize("prefix", ["", "model.", "_orig_mod.module."])
def test_logits_are_those_of_the_released_model(kind: str, prefix: str):
    ids = torch.randint(0, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0] * 5 + [1] * 9, [0] * 3 + [1] * 2 + [2] * 9])
    expected = released_logits(released_weights(), ids, documents, causal=kind == "causal")
    plan = plan_attention(kind, documents, backend="sdpa", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        logits = build(released_weights(prefix))(ids, attention=plan).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_tied_weights_and_norms_without_gains():
    weights = released_weights()
    weights["classifier.emb2vocab.weight"] = weights["embedding.word_embedding.weight"]
    without = {name: value for name, value in weights.items() if "mlp.pre_norm" not in name}
    plain = {
        name: torch.ones_like(value) if "mlp.pre_norm" in name else value
        for name, value in weights.items()
    }
    ids, documents = torch.tensor([[1, 7, 8, 9]]), torch.zeros(1, 4)
    settings = SETTINGS | {"feed_forward_pre_norm_affine": False, "tie_weights": True}
    model = build(without, settings)
    expected = released_logits(plain, ids, documents, causal=True)
    assert (model(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    # As safetensors saves it: one of the two.
    del without["classifier.emb2vocab.weight"]
    assert torch.equal(build(without, settings)(ids).logits, model(ids).logits)


def wrong() -> Iterator[tuple[str, dict, dict, str]]:
    weights, name = released_weights(), "encoder.layers.1.mlp.down_proj.weight"
    yield (
        "another model",
        {"wte.weight": torch.ones(2)},
        SETTINGS,
        "has no embedding.word_embedding",
    )
    yield (
        "surplus",
        weights | {"encoder.layers.0.mlp.bias": torch.ones(2)},
        SETTINGS,
        "not understood",
    )
    less = {key: value for key, value in weights.items() if key != name}
    yield "missing", less, SETTINGS, f"lacks {name}"
    far = {key.replace("layers.2.", "layers.999999999."): v for key, v in weights.items()}
    yield "far layer", far, SETTINGS, "has 3 layers, one of which is number 999999999"
    yield "shape", weights | {name: torch.ones(WIDTH, 7)}, SETTINGS, f"{name} is of shape (24, 7)"
    yield "vector", weights | {"embedding.word_embedding.weight": torch.ones(3)}, SETTINGS, "(3,)"
    yield "gains", {k: v for k, v in weights.items() if "pre_norm" not in k}, SETTINGS, "lacks"
    yield "other sizes", weights, SETTINGS | {"num_layers": 4}, "num_layers is 4, but 3 in W"
    yield "no heads", weights, {"norm_eps": 1e-7}, "num_attention_heads, rope_theta"
    yield "odd heads", weights, SETTINGS | {"num_attention_heads": 5}, "5 heads"
    yield "no number", weights, SETTINGS | {"rope_theta": "x"}, "'x'"
    yield "nan", weights, SETTINGS | {"norm_eps": math.nan}, "nan"
    yield "infinite", weights, SETTINGS | {"max_sequence_length": math.inf}, "inf"
    yield "half a head", weights, SETTINGS | {"num_attention_heads": 2.5}, "an integer above 0"
    yield "head size", weights, SETTINGS | {"d_h": 4}, "3 heads of size 4 are not the width 24"
    yield "NaN weights", weights | {name: weights[name] * math.nan}, SETTINGS, "NaN or infinite"
    yield "quantised", weights | {name: weights[name].to(torch.int8)}, SETTINGS, "of type int8"


@pytest.mark.parametrize(
    ("weights", "settings", "said"), [case[1:] for case in wrong()], ids=[c[0] for c in wrong()]
)
def test_what_is_not_a_released_model_is_named(weights: dict, settings: dict, said: str):
    with pytest.raises(UserError) as caught:
        convert(weights, settings, SPECIAL, where="W", settings_file="S")
    assert said in str(caught.value)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("zip_file", [False, True])
def test_files_of_torch_save_are_read(nested: bool, zip_file: bool, tmp_path: Path):
    weights = released_weights()
    file = tmp_path / "state_dict.bin"
    torch.save(
        {"model": weights, "global_step": 3} if nested else weights,
        file,
        _use_new_zipfile_serialization=zip_file,
    )
    found = read_state_dict(file)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


class Program:
    def __reduce__(self):
        return (print, ("run",))


def test_nothing_in_a_file_is_run_and_other_files_are_named(tmp_path: Path, capsys):
    file = tmp_path / "state_dict.bin"
    for content in ({"a": Program()}, [1, 2], {"a": 3}, {1: torch.ones(2)}, torch.ones(3)):
        torch.save(content, file)
        with pytest.raises(UserError, match="released code"):
            read_state_dict(file)
    torch.save(released_weights(), file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read"):
        read_state_dict(file)
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        file.write_bytes(content[:place] + b"\x86" + content[place + 1 :])
        with suppress(UserError):
            read_state_dict(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="Git LFS"):
        read_state_dict(file)
    assert "run" not in capsys.readouterr().out
