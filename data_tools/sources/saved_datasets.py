"""Directories written by ``save_to_disk`` of Hugging Face ``datasets``, read without that library.

A dataset is ``state.json``, which lists the Arrow files in their order, beside
``dataset_info.json``; a ``DatasetDict`` is ``dataset_dict.json`` beside one such directory a split.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_tools.sources.splits import TRAIN
from dualtrain.common.errors import UserError
from dualtrain.common.files import in_utf8

_STATE = "state.json"
_INFO = "dataset_info.json"
_SPLITS = "dataset_dict.json"
METADATA = frozenset({_STATE, _INFO, _SPLITS})


def saved_dataset_files(directory: Path) -> list[Path] | None:
    """The Arrow files of a saved dataset in order, or None if `directory` is something else.

    Of several splits those of ``train``.

    Raises:
        UserError: Several splits without ``train``, rows in another order than in the files,
            missing files.
    """
    if (directory / _SPLITS).is_file():
        return saved_dataset_files(directory / _split(directory))
    if not ((directory / _STATE).is_file() and (directory / _INFO).is_file()):
        return None
    file = directory / _STATE
    state = _read(file)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            in_utf8(directory),
            "is a selection or shuffle of rows that are stored in another order",
            "a dataset whose rows are stored in their order",
            "save it again after `dataset.flatten_indices()`",
        )
    try:
        files = [directory / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(in_utf8(file), "does not list the dataset's files") from None
    for path in files:
        if not path.is_file():
            raise UserError(in_utf8(path), "is missing", f"a file, as {_STATE} lists it")
    return files


def left_splits(directory: Path) -> list[str]:
    """The splits of a saved dataset that are not read."""
    if not (directory / _SPLITS).is_file():
        return []
    return [split for split in _splits(directory) if split != _split(directory)]


def _splits(directory: Path) -> list[str]:
    file = directory / _SPLITS
    splits = _read(file).get("splits")
    if not isinstance(splits, list) or not splits:
        raise UserError(in_utf8(file), "does not list the splits of the dataset")
    return [str(split) for split in splits]


def _split(directory: Path) -> str:
    splits = _splits(directory)
    if len(splits) > 1 and TRAIN not in splits:
        raise UserError(
            in_utf8(directory),
            f"is a dataset with {len(splits)} splits, and none is '{TRAIN}'",
            "one split",
            "give " + " or ".join(in_utf8(directory / split) for split in splits),
        )
    split = TRAIN if TRAIN in splits else splits[0]
    if not (directory / split / _STATE).is_file():
        what = "is missing or no saved dataset"
        raise UserError(in_utf8(directory / split), what, f"as {_SPLITS} says")
    return split


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(in_utf8(file), f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(in_utf8(file), f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(in_utf8(file), "is not a JSON object")
    return content
