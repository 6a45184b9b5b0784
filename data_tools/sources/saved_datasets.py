"""Directories written by ``save_to_disk`` of Hugging Face ``datasets``, read without that library.

A dataset is ``state.json``, which lists the Arrow files in their order, beside
``dataset_info.json``; a ``DatasetDict`` is ``dataset_dict.json`` beside one such directory a split.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dualtrain.errors import UserError

_STATE = "state.json"
_INFO = "dataset_info.json"
_SPLITS = "dataset_dict.json"
METADATA = frozenset({_STATE, _INFO, _SPLITS})


def saved_dataset_files(directory: Path) -> list[Path] | None:
    """The Arrow files of a saved dataset in order, or None if `directory` is something else.

    Raises:
        UserError: Several splits, rows in another order than in the files, missing files.
    """
    if (directory / _SPLITS).is_file():
        return saved_dataset_files(_only_split(directory))
    if not ((directory / _STATE).is_file() and (directory / _INFO).is_file()):
        return None
    file = directory / _STATE
    state = _read(file)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            str(directory),
            "is a selection or shuffle of rows that are stored in another order",
            "a dataset whose rows are stored in their order",
            "save it again after `dataset.flatten_indices()`",
        )
    try:
        files = [directory / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(str(file), "does not list the dataset's files") from None
    for path in files:
        if not path.is_file():
            raise UserError(str(path), "is missing", f"a file, as {_STATE} lists it")
    return files


def _only_split(directory: Path) -> Path:
    file = directory / _SPLITS
    splits = _read(file).get("splits")
    if not isinstance(splits, list) or not splits:
        raise UserError(str(file), "does not list the splits of the dataset")
    found = [directory / str(split) for split in splits]
    if len(found) > 1:
        raise UserError(
            str(directory),
            f"is a dataset with {len(found)} splits",
            "one split",
            "give " + " or ".join(str(path) for path in found),
        )
    if not (found[0] / _STATE).is_file():
        raise UserError(str(found[0]), "is missing or no saved dataset", f"as {_SPLITS} says")
    return found[0]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(str(file), f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(str(file), f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(str(file), "is not a JSON object")
    return content
