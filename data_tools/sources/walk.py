"""What stands in a directory that is searched for text: files by the kinds that their names say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.sources.files import Format
from data_tools.sources.formats import format_of
from data_tools.sources.mds_files import mds_shards
from data_tools.sources.saved_datasets import METADATA, left_splits, saved_dataset_files
from data_tools.sources.splits import TRAIN
from dualtrain.common.errors import UserError
from dualtrain.common.files import in_utf8
from dualtrain.data.dataset import DATASET_FILE

_CACHE = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")


@dataclass(frozen=True)
class Entry:
    """A file, a directory whose files belong together, or what is left out.

    Attributes:
        shards: Of MDS, as ``index.json`` describes them.
        ignored: Names of what is no text, for messages.
        note: What is to be said if it is read.
    """

    path: Path
    files: Sequence[Path] = ()
    shards: Sequence[dict[str, Any]] = ()
    ignored: Sequence[str] = ()
    note: str = ""

    @property
    def has_text(self) -> bool:
        return bool(self.files or self.shards)

    @property
    def is_markdown(self) -> bool:
        return bool(self.files) and self.path.suffix.lower() == ".md"


def is_cache(path: Path) -> bool:
    """Whether ``Dataset.map`` and its like left a file beside those that they read."""
    return _CACHE.fullmatch(path.name) is not None


def entries(directory: Path, format: Format | None) -> list[Entry]:
    """All that stands in a directory, through all levels, in order of the paths.

    Args:
        format: That of files whose names do not say it.

    Raises:
        UserError: A directory cannot be searched, or its files do not belong together as they say.
    """
    found = sorted(_walk(directory, format), key=lambda entry: entry.path)
    if all(entry.is_markdown for entry in found if entry.has_text):
        return found
    # Beside text of other kinds Markdown mostly describes it.
    return [
        Entry(entry.path, ignored=[str(entry.path)]) if entry.is_markdown else entry
        for entry in found
    ]


def _walk(directory: Path, format: Format | None) -> Iterator[Entry]:
    """Links to directories are followed, but not in circles."""
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise UserError(in_utf8(error.filename), f"cannot be searched: {error.strerror}")

    for top, directories, names in os.walk(directory, onerror=fail, followlinks=True):
        here, real = Path(top), os.path.realpath(top)
        entry = None if real in seen else _whole_directory(here)
        if entry is not None:
            yield entry
        if entry is not None or real in seen:
            directories.clear()
            continue
        seen.add(real)
        for name in [name for name in directories if name.startswith(".")]:
            directories.remove(name)
            yield Entry(here / name, ignored=[f"{here / name}{os.sep}"])
        directories.sort()
        for name in names:
            yield _file(here / name, format)


def _whole_directory(directory: Path) -> Entry | None:
    """A directory whose files belong together, as one of them says."""
    if (directory / DATASET_FILE).is_file() and (directory / "train").is_dir():
        # Made by convert, perhaps from this very source: its JSON files are no text.
        return Entry(directory, ignored=[f"{directory}{os.sep}"])
    files = saved_dataset_files(directory)
    if files is None:
        shards = mds_shards(directory)
        return None if shards is None else Entry(directory, shards=shards)
    left = left_splits(directory)
    known = {
        *left,
        *METADATA,
        *(path.name for path in files),
        *(path.parent.name for path in files),
    }
    ignored = [str(path) for path in sorted(directory.iterdir()) if path.name not in known]
    note = f"{in_utf8(directory)}: only the split {TRAIN} is read, not {', '.join(left)}"
    return Entry(directory, files, ignored=ignored, note=note if left else "")


def _file(path: Path, format: Format | None) -> Entry:
    found = format_of(path)[0] or format
    is_other = path.name.startswith(".") or path.name in METADATA or is_cache(path)
    if found is not None and not is_other and path.is_file():
        return Entry(path, [path])
    return Entry(path, ignored=[str(path)])
