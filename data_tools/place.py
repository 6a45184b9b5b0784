"""Where a dataset is made: beside its place, and moved there when it is whole.

Only one process works on a place at a time. Whatever ends it, the place itself has a whole dataset
or none; what a killed one left beside it is for its maker to use again or to remove.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.reporting import Progress, Report, shown
from dualtrain.common.errors import UserError
from dualtrain.common.files import DISK_FULL
from dualtrain.common.locks import locked
from dualtrain.data.dataset import DATASET_FILE


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn every OSError into a :func:`disk_error`."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, Path(path)) from None


def disk_error(error: OSError, path: Path, hint: str = "") -> UserError:
    """What to say when a file could not be written.

    Args:
        path: What was to be made, where the error names no file.
        hint: What else there is to say.
    """
    if error.errno in DISK_FULL:
        hint = f"make room; {hint}" if hint else "make room"
    place = shown(error.filename or path)
    return UserError(place, f"cannot be written: {error.strerror or error}", hint=hint)


@contextmanager
def locked_place(path: Path, report: Report) -> Iterator[None]:
    """Hold the place of a dataset against other processes, and check that it is free or a dataset.

    Raises:
        UserError: Something else is there.
        OSError: The directory above cannot be written.
    """
    check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".{path.name}.lock"
    waiting = Progress("waiting for another conversion", 0, 0, "documents")
    with locked(lock, remove=True, on_wait=lambda: report.show(waiting)):
        check_place(path)  # again: somebody may have been quicker
        yield


def check_place(path: Path) -> None:
    """Raise UserError unless a place is free or a dataset."""
    if path.is_mount():
        raise UserError(
            shown(path),
            "is where a volume is mounted, and a whole dataset cannot be moved there",
            "a directory in it",
            f"give {shown(path / 'data')}, for example",
        )
    other = path.is_file() or (path.exists() and any(path.iterdir()))
    if other and not (path / DATASET_FILE).exists():
        raise UserError(
            shown(path),
            f"is in the way: it exists and has no {DATASET_FILE}",
            "a new or empty directory",
            "remove it or choose another path",
        )
