"""Where an evaluation's results are written: a directory that appears once it is whole.

Until then it is called ``NAME.partial`` and holds the items of what has been scored so far. The
directory of an earlier evaluation is never written into.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtrain.common.errors import UserError
from dualtrain.common.files import in_utf8, sync, unwritable

if TYPE_CHECKING:
    from dualtrain.evaluate.task_result import TaskResult

RESULTS = "results.json"
_LARGE_BYTES = 1 << 20
"""Files of items above this size are compressed."""


class ResultDirectory:
    """A directory in the making.

    Args:
        path: What it is to be called.
        partial: What it is called until it is whole; exists.
    """

    def __init__(self, path: Path, partial: Path) -> None:
        self.path, self._partial = path, partial

    @classmethod
    def named(cls, path: Path) -> ResultDirectory:
        """Begin a directory of a name that the user has given.

        Raises:
            UserError: It is there already, or cannot be made.
        """
        if path.exists():
            raise UserError("--out", f"{path} is there already", "a directory that is not there")
        made = _begin(path)
        if made is None:
            raise UserError(
                "--out",
                f"another evaluation is writing to {path}, or was killed while it did",
                "a directory of its own",
                f"remove {_partial(path)} unless it is still running",
            )
        return made

    @classmethod
    def numbered(cls, parent: Path, name: str) -> ResultDirectory:
        """Begin a directory ``name``, or ``name-2`` and so on where that is taken.

        Raises:
            UserError: It cannot be made.
        """
        number = 1
        while True:
            path = parent / (name if number == 1 else f"{name}-{number}")
            made = None if path.exists() else _begin(path)
            if made is not None:
                return made
            number += 1

    def write_items(self, result: TaskResult) -> str:
        """Write a task's items in a mode, one JSON object a line; returns the file's name."""
        lines = (json.dumps(item.json(), ensure_ascii=False) for item in result.items)
        content = "".join(line + "\n" for line in lines).encode()
        name = f"{result.task}.{result.mode}.jsonl"
        if len(content) > _LARGE_BYTES:
            # Without the time of its making, so that equal results are equal files.
            content, name = gzip.compress(content, mtime=0), name + ".gz"
        self._write(name, content)
        return name

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the results, wait for the disk, and give the directory its name.

        Raises:
            UserError: The directory has come to be there meanwhile.
        """
        text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
        # A name that is not UTF-8 becomes the escapes of JSON, which Python reads back.
        self._write(RESULTS, (text + "\n").encode("utf-8", "backslashreplace"))
        try:
            sync(self._partial)
            self._partial.rename(self.path)
            sync(self.path.parent)
        except OSError as error:
            what = f"cannot be given its name: {error.strerror}"
            raise UserError(str(self._partial), what, hint="the results are whole there") from None

    def give_up(self) -> Path | None:
        """Leave what there is of items, and return where; remove the directory if it is empty."""
        if any(self._partial.iterdir()):
            return self._partial
        self._partial.rmdir()
        return None

    def _write(self, name: str, content: bytes) -> None:
        path = self._partial / name
        try:
            path.write_bytes(content)
            sync(path)
        except OSError as error:
            # Half a file would be taken for the items that were scored.
            with suppress(OSError):
                path.unlink()
            raise _unwritable(path, error) from None


def _begin(path: Path) -> ResultDirectory | None:
    """Make the unfinished directory; None where somebody else has."""
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except FileExistsError:
        if partial.is_dir():
            return None
        raise UserError(str(path.parent), "is not a directory", hint="choose with --out") from None
    except OSError as error:
        raise _unwritable(path, error) from None
    return ResultDirectory(path, partial)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _unwritable(path: Path, error: OSError) -> UserError:
    return unwritable(error, path, where=in_utf8(path), hint="choose another place with --out")
