"""Locks between the processes and threads of a machine: exclusive, shared, and who holds one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dualtrain.common.errors import UserError

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def acquire(
    path: Path,
    *,
    shared: bool = False,
    wait: bool = True,
    on_wait: Callable[[], None] = lambda: None,
) -> IO[bytes]:
    """Take the lock of a file, which is created in an existing directory.

    Args:
        shared: Together with others who share it, rather than alone.
        on_wait: Called once when another process or thread has the lock.

    Returns:
        The open file: closing it, or dying, however we die, gives the lock back.

    Raises:
        BlockingIOError: Another has the lock, and we are not to ``wait``.
        UserError: The file system has no locks; without one, two processes could write the same
            files at once.
        OSError: The file cannot be created.
    """
    while True:
        file = path.open("a+b", buffering=0)
        try:
            _lock(file, path, shared, wait, on_wait)
            # Its former holder may have removed it: then the file that is there now counts.
            if _is_still(path, file):
                if not shared:
                    _sign(file)
                return file
        except BaseException:
            file.close()
            raise
        file.close()


@contextmanager
def locked(
    path: Path,
    *,
    remove: bool = False,
    wait: bool = True,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Hold an exclusive lock within a block, as :func:`acquire`.

    Args:
        remove: Remove the file at the end.
    """
    with acquire(path, wait=wait, on_wait=on_wait):
        try:
            yield
        finally:
            if remove:
                path.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether a process has the lock of a file; leaves nothing behind."""
    try:
        with path.open("r+b") as file:
            _lock(file, path)
    except BlockingIOError:
        return True
    except OSError:  # there is no such file, or who wants the lock will say what is wrong with it
        return False
    return False


def holder(path: Path) -> str:
    """Who took a file's exclusive lock last: its process and machine."""
    return path.read_text(errors="replace").strip() or "unknown"


def claim(path: Path) -> IO[bytes]:
    """Mark a directory as in use, by a shared lock on a file in it; closing that ends the claim.

    Args:
        path: The lock file; its directory is made.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # just removed as unclaimed: once more
            return acquire(path, shared=True)


def remove_unclaimed(path: Path) -> None:
    """Remove the directory of a lock file unless some process has a claim on it."""
    # An error means that it is claimed, that another process is removing it, or that it belongs to
    # another user: in each case it is not ours to remove.
    with contextlib.suppress(OSError), acquire(path, wait=False):
        shutil.rmtree(path.parent, ignore_errors=True)


def _lock(
    file: IO[bytes],
    path: Path,
    shared: bool = False,
    wait: bool = False,
    on_wait: Callable[[], None] = lambda: None,
) -> None:
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            on_wait()
            fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise UserError(
            str(path.parent),
            f"is on a file system without locks (flock: {error.strerror})",
            "one with them, since two processes must not write the same files at once",
            "mount it with flock, or choose a directory on another file system",
        ) from None


def _sign(file: IO[bytes]) -> None:
    # Only for messages: that the disk is full will be said by what matters.
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n".encode())


def _is_still(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
