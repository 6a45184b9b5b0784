"""Paths of users, and files that last through a loss of power and are never seen half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from pathlib import Path

from dualtrain.common.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of writing that room, a larger quota or a higher limit would end."""

LONGEST_SHOWN = 120
"""Characters of a path in a message: one that is too long for the system is too long to read."""

_OUT_OF = (*DISK_FULL, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EIO)
"""Errors that speak for themselves without the name of a file."""


def user_path(path: str | Path) -> Path:
    """The path that a user means: a home directory in place of ``~``.

    Raises:
        UserError: Nobody knows that home.
    """
    # Path.expanduser raises RuntimeError where there is none.
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        hint = "write ./~... for a name that begins so"
        raise UserError(str(path), "is no path: there is no such home", hint=hint)
    return Path(expanded)


def absolute(path: str | Path) -> Path:
    """The path itself: with ``~`` and the current directory filled in, and links followed.

    What is made beside its place is moved there in the end, and nothing can be moved over a link.
    """
    # Path.resolve raises RuntimeError for links in a circle.
    return Path(os.path.realpath(user_path(path)))


def file_problem(error: OSError, where: str = "") -> UserError | None:
    """What the system says of a file, for the user; None for an error that is not about files.

    Args:
        error: Of anything that looked at, read or wrote a file.
        where: The place to name; by default the file.
    """
    if error.strerror is None or (error.filename is None and error.errno not in _OUT_OF):
        return None
    name = "files" if error.filename is None else os.fsdecode(error.filename)
    if len(name) > LONGEST_SHOWN:
        name = f"{name[:LONGEST_SHOWN]}..."
    full = error.errno in DISK_FULL
    hint = "make room, or choose another disk" if full else ""
    what = f"{name}: {error.strerror}" if where not in ("", name) else error.strerror
    return UserError(where or name, what, "", hint)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write JSON beside its place and give it its name, as :func:`write_bytes`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text beside its place and give it its name, as :func:`write_bytes`."""
    # A file's name that is no text comes from os.fsdecode, and is shown as Python shows it.
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place and give it its name: readers find the old one or the new one.

    Raises:
        UserError: It cannot be written.
    """
    # Several processes, on several machines, may write the same file.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(str(path), f"cannot be written: {error.strerror}") from None


def beside(path: Path) -> Path:
    """The directory in which what belongs at a place is made."""
    return path.parent / f".{path.name}.partial"


def publish(partial: Path, path: Path) -> None:
    """Move a whole directory to its place, when everything is on the disk.

    The rename is what declares it whole, so nothing may reach the disk after it.
    """
    for place in [*partial.rglob("*"), partial]:
        sync(place)
    partial.replace(path)
    sync(path.parent)


def discard(partial: Path) -> None:
    """Remove what is beside a place; errors do not matter, the next maker meets them."""
    shutil.rmtree(partial, ignore_errors=True)
