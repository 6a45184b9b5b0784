"""The directory that a run writes to; made, and found writable, before anything is spent."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from dualtrain.errors import UserError
from dualtrain.recipe.schema import Recipe

RUN_LOCK = ".lock"


def prepare_run_directory(recipe: Recipe) -> Path:
    """Make the run directory.

    Raises:
        UserError: when it cannot be made or written to.
    """
    run_dir = recipe.directory
    probe = run_dir / ".writable"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            "run_dir",
            f"cannot write to {run_dir}: {error.strerror}",
            "a directory that can be made and written to",
            "set run_dir=PATH",
        ) from None
    return run_dir


def lock_run_directory(recipe: Recipe) -> TextIO:
    """Claim the run directory for this process, until the returned file is closed.

    The kernel gives the lock back when the process ends, however it ends.

    Raises:
        UserError: when another process is at work there.
    """
    file = (recipe.directory / RUN_LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            "run_dir",
            f"{recipe.directory} is in use by another run (process {owner})",
            "a directory that no other run writes to",
            "wait for it, stop it, or set run_dir=PATH",
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
