"""Small random models of every family that can be imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from helpers.models import add_noise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from dualtrain.model.imported import ImportedLM
from dualtrain.model.imported_config import FAMILIES, parse_config
from dualtrain.recipe.load import LoadedRecipe, load_recipe

VOCABULARY = 96
_USUAL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
}
_GROUPED = {**_USUAL, "num_key_value_heads": 2, "sliding_window": None}
CONFIGS: Mapping[str, Mapping[str, object]] = {
    "llama": {**_GROUPED, "rms_norm_eps": 1e-2, "attention_bias": True},
    "qwen2": _GROUPED,
    # Heads that are wider than their share of the width.
    "qwen3": {**_GROUPED, "head_dim": 16},
    "mistral": _GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**_USUAL, "rotary_pct": 0.5},
}
assert set(CONFIGS) == set(FAMILIES)


def config_of(family: str, **changes: object):
    values = {"model_type": family, "vocab_size": VOCABULARY, **CONFIGS[family], **changes}
    return parse_config(values, where="a test")


def stock_model(family: str, **changes: object) -> nn.Module:
    """transformers' own model with its own attention, nothing left at its initial value."""
    from transformers import AutoModelForCausalLM

    config = config_of(family, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    return add_noise(model, 0.2)


def imported_model(stock: nn.Module) -> ImportedLM:
    """The same model, imported."""
    model = ImportedLM(type(stock.config).from_dict(stock.config.to_dict())).eval()
    with torch.no_grad():
        pairs = zip(model.parameters(), stock.parameters(), strict=True)
        for ours, theirs in pairs:
            ours.copy_(theirs)
    return model


def publish(directory: Path, family: str, texts: list[str], **changes: object) -> nn.Module:
    """Write a model as its makers would: tokenizer without `<s>` and `<mask>`, bf16 weights.

    Returns:
        transformers' model of the rounded weights, in fp32.
    """
    tokenizer = train_tokenizer(texts)
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    own = {"vocab_size": end + 1, "bos_token_id": end, "eos_token_id": end}
    model = stock_model(family, **{**own, **changes})
    model.to(torch.bfloat16).save_pretrained(directory)
    return model.float()


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of 300 tokens, the last of them ``<|endoftext|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=299,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def convert(folder: Path, texts: list[str], tokenizer: Path) -> Path:
    """Make a dataset of texts with the tokenizer of a model's directory."""
    from data_tools.convert import build_dataset
    from dualtrain.recipe.schema import BuildSection

    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_text(text)
    build = BuildSection(source=f"{folder}/*.txt", tokenizer=str(tokenizer), val_fraction=0.1)
    build_dataset(build, folder / "dataset")
    return folder / "dataset"


RECIPE = """
name: imported
seed: 3
alpha: 1/2
steps: 6
unique_tokens: 1500
sequence_length: 32
global_batch: 8
micro_batch: 1
data: {{path: {data}}}
model: {{hf: {hf}}}
optim: {{newton_schulz: gram, lr: 2e-3}}
engine: {{deepspeed: zero1, precision: fp32, timeout_s: 600}}
eval: {{sequences: 10}}
progress: {{interval_steps: 1}}
sample: {{tokens: 3, infill: "a <mask:2> list"}}
"""


def loader(folder: Path, model: Path, data: Path) -> Callable[..., LoadedRecipe]:
    """A function from overrides to a loaded recipe that imports a model."""
    file = folder / "imported.yaml"
    file.write_text(RECIPE.format(data=data, hf=model))

    def load(*overrides: str, name: str = "run") -> LoadedRecipe:
        return load_recipe(str(file), [f"run_dir={folder / name}", *overrides])

    return load
