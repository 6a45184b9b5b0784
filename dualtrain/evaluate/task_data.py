"""Reading the data of a task: JSON on disk, compressed or not, or a dataset of the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtrain.common.errors import UserError
from dualtrain.common.input_files import InputFile, parse_object
from dualtrain.evaluate.templates import Templates, as_json

if TYPE_CHECKING:
    from dualtrain.evaluate.task_file import HubSection

SUFFIXES = ("", ".gz", ".xz", ".zst", ".bz2")


@dataclass(frozen=True)
class TaskData:
    """The data of a task, line by line.

    Attributes:
        origin: The file, or the dataset's name on the hub.
        sha256: Of the content, decompressed: the same whatever the compression.
        lines: The number of each line that is not blank, and its content; of an array, those of
            each element.
    """

    origin: str
    sha256: str
    lines: Sequence[tuple[int, str]]

    def __len__(self) -> int:
        return len(self.lines)

    def record(self, index: int) -> tuple[dict[str, Any], int, str]:
        """Parse a line.

        Returns:
            The object, the line's number, and ``file:line``.

        Raises:
            UserError: It is not a JSON object.
        """
        line, source = self.lines[index]
        where = f"{self.origin}:{line}"
        return parse_object(source, where), line, where


def find_data(name: str, directory: Path | None) -> Path | None:
    """Find a data file, as it stands or compressed; None where there is none.

    Raises:
        UserError: It is there in a compression that is not known.
    """
    if directory is None:
        return None
    for suffix in SUFFIXES:
        path = directory / (name + suffix)
        if path.is_file():
            return path
    folder, begin = (directory / name).parent, f"{Path(name).name}."
    others = (
        [] if not folder.is_dir() else [p for p in folder.iterdir() if p.name.startswith(begin)]
    )
    if others:
        known = ", ".join(suffix for suffix in SUFFIXES if suffix)
        raise UserError(
            str(min(others)), "is compressed in a way that is not known", f"{name}{known}"
        )
    return None


def read_file(path: Path) -> TaskData:
    """Read a data file.

    Raises:
        UserError: It cannot be read or decompressed, it is not UTF-8, or it is empty.
    """
    file = InputFile.read(path)
    lines = file.json_parts()
    if not lines:
        raise UserError(file.name, "is empty", "one JSON object a line")
    return TaskData(file.name, hashlib.sha256(file.content).hexdigest(), lines)


def read_hub(hub: HubSection, fields: Templates | None, *, data: str, where: str) -> TaskData:
    """Read a dataset through Hugging Face's library.

    Args:
        fields: How the fields of the data file are made of the dataset's; None: they are the same.
        data: Name of the data file, for messages.

    Raises:
        UserError: The library is not installed, or it cannot get the dataset.
    """
    missing = f"the data file {data} is not there"
    by_hand = f"or put {data} into a directory and name that with --tasks-dir"
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        what = f"{missing}, and the library `datasets`, which would fetch {hub.path}, neither"
        raise UserError(where, what, hint=f"pip install datasets, {by_hand}") from None
    rows: list[dict[str, Any]] = []
    for name in hub.names or [None]:
        try:
            loaded: Any = datasets.load_dataset(hub.path, name, split=hub.split)
            rows += loaded
        # The library passes on the errors of its file systems, of the network and of its parsers.
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            called = hub.path if name is None else f"{hub.path}, {name},"
            what = f"{missing}, and {called} cannot be fetched: {reason}"
            raise UserError(where, what, hint=f"check the network, {by_hand}") from None
    if fields is not None:
        rows = [
            fields.record(row, where=f"{hub.path}:{number}")
            for number, row in enumerate(rows, start=1)
        ]
    lines = [_as_json(row, f"{hub.path}:{number}") for number, row in enumerate(rows, start=1)]
    if not lines:
        raise UserError(where, f"{hub.path} has no rows in its split {hub.split}")
    content = "".join(line + "\n" for line in lines)
    digest = hashlib.sha256(content.encode("utf-8", "backslashreplace")).hexdigest()
    return TaskData(hub.path, digest, list(enumerate(lines, start=1)))


def _as_json(row: dict[str, Any], where: str) -> str:
    try:
        return as_json(row, ensure_ascii=False)
    except TypeError as error:
        hint = "name those columns that are text under `hub.fields`"
        raise UserError(where, f"a column is no JSON: {error}", hint=hint) from None
