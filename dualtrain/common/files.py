"""Paths of users; files and directories that are written beside their place and moved there whole.

A reader finds what was there before or what is new, never half of it, also after a loss of power.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dualtrain.common.errors import UserError
from dualtrain.common.locks import locked

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of writing that room, a larger quota or a higher limit would end."""

LONGEST_SHOWN = 120
"""Characters of a path in a message: one that is too long for the system is too long to read."""

_OUT_OF = (*DISK_FULL, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EIO)
"""Errors that speak for themselves without the name of a file."""


def user_path(path: str | Path) -> Path:
    """The path that a user means: a home directory in place of ``~``."""
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


def in_utf8(path: str | Path) -> str:
    """A path as text that any file and terminal takes: bytes that are not UTF-8 as ``\\xef``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def unwritable(error: OSError, path: str | Path, *, where: str = "", hint: str = "") -> UserError:
    """What to say when a file could not be written.

    Args:
        path: What was to be made, where the error names no file.
        where: The place to name; by default the file.
        hint: What else there is to say.
    """
    room = "make room" if error.errno in DISK_FULL else ""
    what = f"cannot be written: {error.strerror or error}"
    where = where or in_utf8(error.filename or path)
    return UserError(where, what, hint="; ".join(filter(None, (room, hint))))


@contextmanager
def writing(path: str | Path, *, where: str = "", hint: str = "") -> Iterator[None]:
    """Turn every OSError of a block into what :func:`unwritable` says."""
    try:
        yield
    except OSError as error:
        raise unwritable(error, path, where=where, hint=hint) from None


@contextmanager
def replacing(path: Path, *, beside: Path | None = None) -> Iterator[Path]:
    """Give a file to write, which takes the name of `path` once it is on the disk.

    After an error it is removed, and `path` is as it was.

    Args:
        beside: The file to write: one name for all, where a lock is held, so that what a killed
            process leaves is overwritten. By default a new name, since several processes, on
            several machines, may write the same file.
    """
    new = beside or path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        yield new
        sync(new)
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise


def write_json(path: Path, value: object) -> None:
    """Write JSON as :func:`write_bytes`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text as :func:`write_bytes`."""
    # A file's name that is no text comes from os.fsdecode, and is shown as Python shows it.
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file, :func:`replacing` the one that is there."""
    try:
        with replacing(path) as new:
            new.write_bytes(content)
    except OSError as error:
        raise unwritable(error, path, where=in_utf8(path)) from None


def file_hash(path: str | Path, algorithm: str = "sha256") -> str:
    """The hash of a file's content."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def beside(path: Path) -> Path:
    """The directory in which what belongs at a place is made."""
    return path.parent / f".{path.name}.partial"


@contextmanager
def reserved(
    place: Path,
    *,
    where: str = "",
    marker: str = "",
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Hold the place of a directory against other processes, and check that it is free.

    After an error the directories above it are as they were.

    Args:
        where: The place as messages name it.
        marker: A file that makes what is there one of ours.

    Yields:
        The directory to make it in, which may be there with what a killed process left.

    Raises:
        UserError: Something else is there.
        OSError: The directory above cannot be written.
    """
    refuse_taken(place, where, marker)
    new = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.parent / f".{place.name}.lock", remove=True, on_wait=on_wait):
            refuse_taken(place, where, marker)  # again: somebody may have been quicker
            yield beside(place)
    except BaseException:
        for parent in new:
            with suppress(OSError):  # in use, or never made
                parent.rmdir()
        raise


@contextmanager
def made_whole(partial: Path, place: Path) -> Iterator[None]:
    """Have an empty directory to write into, which moves to its place; nothing after an error."""
    discard(partial)
    try:
        partial.mkdir()
        yield
        publish(partial, place)
    except BaseException:
        discard(partial)
        raise


def refuse_taken(place: Path, where: str = "", marker: str = "") -> None:
    """Refuse a place for a directory where something is.

    Raises:
        UserError: A file, a volume, or a directory that is not empty and lacks the `marker`.
    """
    where, expected = where or in_utf8(place), "a new or empty directory"
    existing = next((path for path in (place, *place.parents) if path.exists()), place)
    if existing.is_file():
        raise UserError(where, f"{in_utf8(existing)} is a file", expected)
    if place.is_mount():
        raise UserError(
            where,
            "a volume is mounted there, and nothing can be moved in its place",
            "a directory in it",
            f"give {in_utf8(place / 'new')}, for example",
        )
    if place.exists() and any(place.iterdir()) and not (marker and (place / marker).exists()):
        raise UserError(
            where,
            f"is not empty and has no {marker}" if marker else "the directory is not empty",
            expected,
            "nothing is overwritten: remove it, or choose another name",
        )


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
