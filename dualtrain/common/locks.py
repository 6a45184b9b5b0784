"""Locks between the processes of a machine: for files to be made once, and for those in use."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dualtrain.common.errors import UserError

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def flock(descriptor: int | IO, operation: int, *, path: Path) -> None:
    """Lock an open file as ``fcntl.flock`` does; the kernel frees it when we die.

    Raises:
        BlockingIOError: Another process has the lock, and the operation is not to wait.
        UserError: The file system has no locks; without one, two processes could write the same
            files at once.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise UserError(
            str(path.parent),
            f"is on a file system without locks (flock: {error.strerror})",
            "one with them, since two processes must not write the same files at once",
            "mount it with flock, or choose a directory on another file system",
        ) from None


@contextmanager
def locked(
    path: Path, *, remove: bool = False, on_wait: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold an exclusive lock on `path`, which is created; the kernel frees it when we die.

    Args:
        path: The lock file, in an existing directory.
        remove: Remove the lock file at the end.
        on_wait: Called once when another process holds the lock.

    Raises:
        OSError: The lock file cannot be created.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _acquire(descriptor, path, on_wait)
            if not _is_still(path, descriptor):
                continue  # its former holder removed it: lock the file that is there now
            try:
                yield
            finally:
                if remove:
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def claim(path: Path) -> IO[bytes]:
    """Mark a directory as in use, by a shared lock on a file in it, for as long as we live.

    Args:
        path: The lock file; its directory is made.

    Returns:
        The open file: closing it, or dying, ends the claim.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # just removed as unclaimed: once more
            stream = path.open("ab")
            flock(stream, fcntl.LOCK_SH, path=path)
            if _is_still(path, stream.fileno()):
                return stream
            stream.close()


def remove_unclaimed(path: Path) -> None:
    """Remove the directory of a lock file unless some process has a claim on it."""
    # An error means that it is claimed, that another process is removing it, or that it belongs to
    # another user: in each case it is not ours to remove.
    with contextlib.suppress(OSError), path.open("ab") as stream:
        flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, path=path)
        shutil.rmtree(path.parent, ignore_errors=True)


def _acquire(descriptor: int, path: Path, on_wait: Callable[[], None] | None) -> None:
    try:
        flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, path=path)
    except BlockingIOError:
        if on_wait is not None:
            on_wait()
        flock(descriptor, fcntl.LOCK_EX, path=path)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
