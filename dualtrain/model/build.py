"""Models: from a recipe, from a checkpoint's ``config.json``, from the directory of an export.

transformers takes seconds to import, and our own model does without: only imported ones ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dualtrain.common.file_kinds import read_object
from dualtrain.data.dataset import DatasetInfo
from dualtrain.engine.norm_gains import set_type
from dualtrain.engine.parameters import (
    is_partitioned,
    partitioned_build,
    whole_parameters,
)
from dualtrain.model.exported import is_exported, read_exported_config
from dualtrain.model.pretrained import load_pretrained
from dualtrain.network.config import DualConfig
from dualtrain.network.initialize import initialize_parameter
from dualtrain.network.norms import norm_parameters
from dualtrain.network.transformer import DualLM
from dualtrain.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dualtrain.model.imported import ImportedLM

CONFIG = "config.json"
"""The model's configuration, in a checkpoint as in an export."""


def build_model(
    recipe: Recipe,
    info: DatasetInfo,
    ds_config: Mapping[str, object] | None = None,
    *,
    pretrained: bool = True,
) -> DualLM | ImportedLM:
    """The recipe's model for a dataset's vocabulary, with its initial values.

    Args:
        ds_config: As merged for DeepSpeed. At stage 3 the model is partitioned from the start, with
            the same values, and every rank must call. None makes it whole.
        pretrained: Whether an imported model gets its initial values, which may have to be fetched;
            False where those of a checkpoint follow.
    """
    section = recipe.model
    if section.hf is not None:
        from dualtrain.model.hugging_face import build_imported

        model = build_imported(recipe, info, ds_config, pretrained=pretrained)
    else:
        model = _build_own(recipe, info, ds_config)
    model.activation_checkpointing = section.activation_checkpointing
    if section.compile:
        model.compile_blocks()
    return model


def _build_own(recipe: Recipe, info: DatasetInfo, ds_config: Mapping[str, object] | None) -> DualLM:
    """``DualLM``, initialised from the recipe's seed."""
    config = model_config(recipe, info)
    with nullcontext() if ds_config is None else partitioned_build(ds_config):
        model = DualLM(config, seed=recipe.seed)
    set_type(norm_parameters(model), torch.float32)  # which partitioned_build may have made bf16
    for name, parameter in model.named_parameters():
        if not is_partitioned(parameter):
            continue
        # DualLM could not fill it. One at a time, so that never more than one is whole.
        with whole_parameters([parameter]):
            initialize_parameter(name, parameter, config, recipe.seed)
    return model


def model_config(recipe: Recipe, info: DatasetInfo) -> DualConfig:
    """The configuration of the recipe's model for a dataset's vocabulary."""
    return DualConfig.of_recipe(
        recipe.model,
        info.vocab_size,
        max_position_embeddings=recipe.sequence_length,
        bos_token_id=info.bos_id,
        eos_token_id=info.eos_id,
        pad_token_id=info.pad_id,
        mask_token_id=info.mask_id,
    )


def empty_model(directory: Path, recipe: Recipe, info: DatasetInfo) -> nn.Module:
    """The model of a checkpoint, whose weights are yet to be loaded.

    Args:
        directory: Of the checkpoint; one of an older version has no configuration of its own.
    """
    file = directory / CONFIG
    config = read_config(file) if file.is_file() else model_config(recipe, info)
    return _on_meta(config).to_empty(device="cpu")


def read_exported(directory: Path) -> nn.Module:
    """Load an exported model.

    Raises:
        UserError: Its files are missing, or do not fit one another.
    """
    model = _on_meta(read_config(directory / CONFIG)).to_empty(device="cpu")
    load_pretrained(directory, model)
    return model


def read_config(file: Path) -> DualConfig | PretrainedConfig:
    """Read a model's configuration: ours, or that of a family that can be imported.

    Raises:
        UserError: It cannot be read, or is of another kind of model.
    """
    values = read_object(file, "a model's configuration")
    if is_exported(values):
        return read_exported_config(values, where=str(file))
    if values.get("model_type") == DualConfig.model_type:
        return DualConfig.of(values)
    from dualtrain.model.imported_config import parse_config

    return parse_config(values, where=str(file))


def _on_meta(config: DualConfig | PretrainedConfig) -> DualLM | ImportedLM:
    with torch.device("meta"):
        if isinstance(config, DualConfig):
            return DualLM(config)
        from dualtrain.model.imported import ImportedLM

        return ImportedLM(config)
