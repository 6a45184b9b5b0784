"""The weights of an export: from the safetensors of a checkpoint, file by file.

No model is built. What is held at a time is one file of the export, and as much of the checkpoint,
mapped from the disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dualtrain.common.errors import UserError
from dualtrain.common.file_kinds import open_weights

INDEX = "model.safetensors.index.json"
_SIZE = re.compile(r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]B", re.IGNORECASE)


Weights = Path | Mapping[str, Tensor]
"""A safetensors file, or tensors by name."""


def write_weights(
    source: Weights, directory: Path, *, dtype: torch.dtype, max_shard_size: str
) -> int:
    """Copy weights, converted, into as many files as their size asks for.

    Args:
        source: The names stay.
        directory: Where ``model.safetensors`` is written, or several and their index.
        max_shard_size: Of a file, such as ``5GB``; a larger tensor has a file of its own.

    Returns:
        How many parameters there are.

    Raises:
        UserError: The size is none.
        OSError: The disk is full, or the like.
    """
    if isinstance(source, Path):
        with open_weights(source) as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    else:
        shapes = {name: tensor.shape for name, tensor in source.items()}
    # Tensors without memory: the library looks at their sizes only.
    sizes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    # The library takes a size below zero, and fails on an infinite one.
    if not _SIZE.fullmatch(max_shard_size):
        raise UserError("--max-shard-size", repr(max_shard_size), "such as 5GB or 500MB")
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    for name, tensors in split.filename_to_tensors.items():
        _copy(source, directory / name, tensors, dtype)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return sum(tensor.numel() for tensor in sizes.values())


def _copy(source: Weights, file: Path, names: list[str], dtype: torch.dtype) -> None:
    if isinstance(source, Path):
        # Opened anew for each file: what is mapped of the checkpoint goes with it.
        with open_weights(source) as weights:
            tensors = {name: weights.get_tensor(name).to(dtype) for name in names}
    else:
        tensors = {name: source[name].to(dtype).contiguous() for name in names}
    try:
        # transformers asks what wrote a file, and takes no other answer.
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(None, str(error), str(file)) from None
    # The library lets nobody else read it, whatever the umask says.
    file.chmod(file.parent.stat().st_mode & 0o666)
