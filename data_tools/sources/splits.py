"""Which files of a directory are training text, where their names divide them into splits.

The names are those by which Hugging Face ``datasets`` tells splits apart: a word in the name of a
directory or a file, between dots, dashes, underscores, spaces or digits. Only what a directory
holds is chosen from: files that are named one by one, or by a pattern, are all read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dualtrain.common.errors import UserError
from dualtrain.common.files import in_utf8

TRAIN = "train"
_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_BETWEEN = re.compile(r"[-._ 0-9]+")


def split_of(path: Path) -> str | None:
    """The split that the names on a path say: ``train``, ``validation``, ``test``, or None.

    The first name that says one decides; a name with words of two splits says none.
    """
    for name in path.parts:
        words = _BETWEEN.split(name.lower())
        found = {_WORDS[word] for word in words if word in _WORDS}
        if len(found) == 1:
            return found.pop()
    return None


def training_paths(directory: Path, paths: Sequence[Path]) -> tuple[set[Path], str]:
    """Those of the paths in a directory that are read for training, and what is to be said of it.

    All of them, unless some are held out by their names: then those of the train split.

    Raises:
        UserError: Some are held out, and none is of the train split.
    """
    split = {path: split_of(path.relative_to(directory)) for path in paths}
    held_out = [path for path in paths if split[path] not in (None, TRAIN)]
    if not held_out:
        return set(paths), ""
    train = {path for path in paths if split[path] == TRAIN}
    if not train:
        first, where = held_out[0], in_utf8(directory)
        raise UserError(
            where,
            f"has text of a split '{split[first]}', {in_utf8(first)}, and none of '{TRAIN}'",
            "text for training",
            f"name the files to read, or give a pattern: '{where}/**/*{first.suffix}'",
        )
    note = (
        f"{in_utf8(directory)}: only the split {TRAIN} is read, {len(train):,} of {len(paths):,} "
        f"files; not, for one, {in_utf8(held_out[0])}"
    )
    return train, note
