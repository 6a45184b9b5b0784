"""From ``model.hf`` in a recipe to the model: its directory, configuration, sizes and weights.

``start`` calls :func:`read_hf_config` before anything else is done, ``derive`` asks for sizes and
tokenizers, ``build`` for the model. A hub is asked only for names that are no directory.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from math import ceil
from pathlib import Path

import torch
from transformers import PretrainedConfig

from dualtrain.common.errors import UserError
from dualtrain.common.file_kinds import parse_tokenizer, read_text
from dualtrain.common.files import user_path
from dualtrain.common.hub import fetch_from_hub, hub_failures
from dualtrain.data.dataset import TOKENIZER_FILE, DatasetInfo
from dualtrain.engine.config import zero_stage
from dualtrain.engine.norm_gains import set_type
from dualtrain.engine.parameters import (
    partitioned_build,
    whole_parameters,
)
from dualtrain.model.imported import ImportedLM, imported_sizes, initial_values
from dualtrain.model.imported_config import check_length, find_dropouts, read_config
from dualtrain.model.pretrained import NewRows, load_pretrained
from dualtrain.network.arithmetic import ModelSizes
from dualtrain.network.config import VOCABULARY_MULTIPLE
from dualtrain.network.norms import norm_parameters
from dualtrain.recipe.schema import ModelSection, Recipe

CONFIG = "config.json"

# By these a model that we have exported would be known as ours again.
_OF_EXPORTS = ("auto_map", "head", "diffusion_target")
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
_DESCRIPTION = (
    CONFIG,
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def find_directory(name: str, *, with_weights: bool = False) -> Path:
    """Find the directory of a model, of the hub's if there is no other of this name.

    Args:
        name: A directory, or the name of a model on the hub, which may end in ``@REVISION``.
        with_weights: Whether weights are to be fetched, beside configuration and tokenizer.

    Raises:
        UserError: It is neither, or the hub cannot be reached.
    """
    path = user_path(name)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            what = f"{name} has no {CONFIG}"
            raise UserError("model.hf", what, "a model's directory in Hugging Face's layout")
        return path
    expected = f"a directory with a {CONFIG}, or the name of a model on Hugging Face's hub"
    if path.exists() or not _HUB_NAME.fullmatch(name):
        what = "is a file" if path.exists() else "there is no such directory"
        raise UserError("model.hf", f"{name!r}: {what}", expected)
    repository, _, revision = name.partition("@")
    wanted = [*_DESCRIPTION, *_WEIGHTS] if with_weights else [*_DESCRIPTION]
    try:
        return fetch_from_hub(repository, revision, wanted)
    except hub_failures() as error:
        reason = " ".join(str(error).split())
        raise UserError(
            "model.hf",
            f"{name!r} is no directory here, and the hub has not given it: {reason[:300]}",
            expected,
            f"where there is a network, `hf download {repository} --local-dir DIR`; then DIR",
        ) from None


def read_hf_config(recipe: Recipe) -> PretrainedConfig:
    """Read the configuration of the recipe's imported model, as published.

    A run that has begun goes on without the model it began from: its checkpoints have one, too.

    Raises:
        UserError: There is none, it is not supported, or the recipe's sequences are too long.
    """
    name = recipe.model.hf
    assert name is not None
    kept = sorted(recipe.directory.glob(f"step-*[0-9]/{CONFIG}"))
    file = kept[-1] if kept and not user_path(name).is_dir() else find_directory(name) / CONFIG
    config = read_config(file)
    check_length(config, recipe.sequence_length, where=name)
    return config


def count_rows(section: ModelSection, config: PretrainedConfig, vocab_size: int | None) -> int:
    """Count the rows of the embedding: the published ones if they suffice.

    Args:
        vocab_size: Tokens of the dataset's vocabulary; None where there is no dataset yet.
    """
    if vocab_size is None:
        return config.vocab_size
    if section.hf_init == "weights" and vocab_size <= config.vocab_size:
        return config.vocab_size
    return ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def hf_sizes(recipe: Recipe, vocab_size: int | None) -> ModelSizes:
    """The sizes of the recipe's imported model.

    Raises:
        UserError: As :func:`read_hf_config`.
    """
    config = read_hf_config(recipe)
    config.vocab_size = count_rows(recipe.model, config, vocab_size)
    return imported_sizes(config)


def describe_import(recipe: Recipe, vocab_size: int | None) -> tuple[str, str]:
    """Say what is imported, for the dry run.

    Returns:
        The family, and where it comes from and what changes.
    """
    config = read_hf_config(recipe)
    section, rows = recipe.model, count_rows(recipe.model, config, vocab_size)
    kept = "weights" if section.hf_init == "weights" else "configuration alone"
    parts = [f"{kept} of {section.hf}"]
    if rows != config.vocab_size:
        parts.append(f"{rows:,} rows of vocabulary instead of {config.vocab_size:,}")
    dropouts = find_dropouts(config)
    if dropouts:
        names = ", ".join(f"{name} {value:g}" for name, value in dropouts.items())
        parts.append(f"without dropout ({names})")
    return config.model_type, "; ".join(parts)


def check_tokenizer(recipe: Recipe) -> list[str]:
    """Check that the dataset's ids mean to published weights what they say.

    Returns:
        What the user should know, if it cannot be checked.

    Raises:
        UserError: The dataset has another tokenizer than the model.
    """
    name, dataset = recipe.model.hf, Path(recipe.data.path) / TOKENIZER_FILE
    assert name is not None
    is_begun = any(recipe.directory.glob(f"step-*[0-9]/{CONFIG}"))
    if recipe.model.hf_init == "scratch" or is_begun or not dataset.is_file():
        return []
    published = find_directory(name) / TOKENIZER_FILE
    if not published.is_file():
        return [
            f"{name} has no {TOKENIZER_FILE}, so nothing tells whether the ids of "
            f"{recipe.data.path} are its own; AutoTokenizer.from_pretrained(DIR).save_pretrained"
            "(DIR) writes one"
        ]
    find_new_tokens(published, dataset, where=recipe.data.path, model=name)
    return []


def find_new_tokens(published: Path, dataset: Path, *, where: str, model: str) -> tuple[int, ...]:
    """Find the tokens that a dataset's tokenizer has beyond a model's.

    Args:
        published: The model's ``tokenizer.json``.

    Returns:
        Their ids.

    Raises:
        UserError: It is not the model's with tokens added to it.
    """
    texts = {read_text(file, "a tokenizer.json") for file in (published, dataset)}
    if len(texts) == 1:
        return ()
    old, new = parse_tokenizer(published), parse_tokenizer(dataset)
    old_ids, new_ids = (t.get_vocab(with_added_tokens=True) for t in (old, new))
    expected = "the model's, with special tokens added at its end"
    hint = (
        f"convert the text again, with --tokenizer and the directory of {model}; "
        "or model.hf_init=scratch, which takes any"
    )
    moved = [token for token, number in old_ids.items() if new_ids.get(token) != number]
    if moved:
        token = min(moved, key=lambda token: old_ids[token])
        there = new_ids.get(token)
        what = f"{token!r} is {old_ids[token]} in {model} and " + (
            "unknown here" if there is None else f"{there} here"
        )
        raise UserError(where, f"has another tokenizer than the model: {what}", expected, hint)
    one, other = (json.loads(tokenizer.to_str()) for tokenizer in (old, new))
    for part in ("model", "normalizer", "pre_tokenizer"):
        if one.get(part) != other.get(part):
            what = f"has another tokenizer than the model: its {part} differs"
            raise UserError(where, what, expected, hint)
    return tuple(sorted(set(new_ids.values()) - set(old_ids.values())))


def build_imported(
    recipe: Recipe,
    info: DatasetInfo,
    ds_config: Mapping[str, object] | None,
    *,
    pretrained: bool,
) -> ImportedLM:
    """The recipe's imported model for a dataset's vocabulary.

    Args:
        ds_config: As merged for DeepSpeed; at stage 3 the model is partitioned from the start, and
            every rank must call. None makes it whole.
        pretrained: Whether it gets its initial values; otherwise its memory is as it was.

    Raises:
        UserError: The model's files do not fit one another, or the dataset.
    """
    published = read_hf_config(recipe)
    config = copy.deepcopy(published)
    rows = count_rows(recipe.model, published, info.vocab_size)
    fit_to_dataset(config, info, rows)
    if ds_config is not None and zero_stage(ds_config) == 3:
        with partitioned_build(ds_config):
            model = ImportedLM(config)
        model.renew_rotary()
        set_type(norm_parameters(model), torch.float32)  # as published, not made bf16
    else:
        with torch.device("meta"):
            model = ImportedLM(config)
        model.to_empty(device="cpu")
    if not pretrained:
        return model
    if recipe.model.hf_init == "scratch":
        parameters = dict(model.named_parameters())
        for name, values in initial_values(config, recipe.seed):
            # One at a time, so that never more than one is whole.
            with torch.no_grad(), whole_parameters([parameters[name]]):
                parameters[name].copy_(values)
        return model
    assert recipe.model.hf is not None
    directory = find_directory(recipe.model.hf, with_weights=True)
    load_pretrained(directory, model, _new_rows(recipe, info, published, directory, rows))
    return model


def fit_to_dataset(config: PretrainedConfig, info: DatasetInfo, rows: int) -> None:
    """Write a dataset's special tokens into a configuration, in place.

    Args:
        info: Of the dataset; its documents begin with its ``<s>``, whatever the model's own was.
    """
    for name in _OF_EXPORTS:
        if hasattr(config, name):
            delattr(config, name)
    config.vocab_size = rows
    config.bos_token_id = info.bos_id
    config.eos_token_id = info.eos_id
    config.pad_token_id = info.pad_id
    config.mask_token_id = info.mask_id
    # Masters are fp32, whatever the weights were saved in; renamed in transformers 4.56.
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", torch.float32)


def _new_rows(
    recipe: Recipe, info: DatasetInfo, published: PretrainedConfig, directory: Path, rows: int
) -> NewRows:
    """Find out which rows are to be made. ``<s>`` and ``</s>`` begin as the model's own."""
    tokens: tuple[int, ...] = ()
    ours = Path(recipe.data.path) / TOKENIZER_FILE
    theirs = directory / TOKENIZER_FILE
    if ours.is_file() and theirs.is_file():
        tokens = find_new_tokens(theirs, ours, where=recipe.data.path, model=str(recipe.model.hf))
    begin, end = (_first(published, name) for name in ("bos_token_id", "eos_token_id"))
    like = {info.bos_id: end if begin is None else begin, info.eos_id: end}
    known = {
        new: old
        for new, old in like.items()
        if old is not None and old < published.vocab_size and old not in tokens
    }
    reserved = tuple(token for token in tokens if token < published.vocab_size)
    return NewRows(published.vocab_size, rows, reserved, known, recipe.seed)


def _first(config: PretrainedConfig, name: str) -> int | None:
    """A special token's id; some models have several ends of a text."""
    value = getattr(config, name, None)
    return value[0] if isinstance(value, list) else value
