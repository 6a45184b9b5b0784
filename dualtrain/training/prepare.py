"""The directory that a run writes to: which it is, and that it can be written to."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from dualtrain.common.errors import UserError
from dualtrain.common.files import user_path
from dualtrain.common.locks import acquire, holder
from dualtrain.recipe.load import read_recipe
from dualtrain.recipe.schema import Recipe
from dualtrain.recipe.yaml_source import Plain

RUN_LOCK = ".lock"
MOVED_KEYS = (("data", "path"), ("data", "remote"), ("eval", "tasks_dir"), ("engine", "deepspeed"))
"""Paths of a recipe that a run may set differently when it goes on."""

_SIGNS = (RUN_LOCK, "metrics.jsonl")
"""What tells a run's directory from one that merely holds a recipe.yaml."""
PROBE = ".writable"
_PROBE_BYTES = 1 << 16


def own_places(recipe: str, overrides: Sequence[str]) -> list[str]:
    """Overrides by which a run's own ``recipe.yaml`` means that run, from wherever it is given.

    Its relative paths begin where the run was started, and its directory may have been moved since;
    taken from the current directory they would start another run.

    Args:
        overrides: The user's, who may want another run by another `name` or `run_dir`.

    Returns:
        Overrides to come before the user's; none where the recipe means that run by itself.
    """
    file = user_path(recipe)
    if file.name != "recipe.yaml" or not file.is_file():
        return []
    directory = file.resolve().parent
    if (directory / "complete.json").exists():  # a checkpoint's
        directory = directory.parent
    if not any((directory / sign).exists() for sign in _SIGNS):
        return []
    values = read_recipe(recipe).tree.plain()
    assigned = _at(values, ("run_dir",)) or f"runs/{_at(values, ('name',))}"
    if Path(assigned).resolve() == directory:
        return []
    moved = {}
    if not {"name", "run_dir"} & {override.partition("=")[0].strip() for override in overrides}:
        moved["run_dir"] = str(directory)
    parts = Path(assigned).parts
    if directory.parts[-len(parts) :] == parts:
        started_in = Path(*directory.parts[: -len(parts)])
        for key in MOVED_KEYS:
            value = _at(values, key)
            if value is not None and (key == ("data", "path") or (started_in / value).exists()):
                moved[".".join(key)] = str(started_in / value)
    return [f"{key}={json.dumps(value)}" for key, value in moved.items()]


def _at(values: Plain, path: Sequence[str]) -> str | None:
    """The text at a path; None where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, str) else None


def check_run_directory(recipe: Recipe) -> None:
    """Refuse a run directory that cannot be made or written to, without making it."""
    if why := why_unwritable(recipe.directory):
        raise _unwritable(recipe.directory, why)


def why_unwritable(directory: Path) -> str | None:
    """Why a directory could not be made or written to; None where it could. Leaves nothing."""
    place = directory.absolute()
    try:
        there = next(path for path in (place, *place.parents) if path.exists())
        if not there.is_dir():
            return f"{there} is a file"
        # The system looks at a name only once the directory above it is there.
        longest = max(len(os.fsencode(name)) for name in place.parts)
        if longest > os.pathconf(there, "PC_NAME_MAX"):
            return os.strerror(errno.ENAMETOOLONG)
        # Permissions do not tell: nobody may make a directory in /proc.
        with TemporaryDirectory(prefix=f"{PROBE}-", dir=there):
            return None
    except OSError as error:
        return error.strerror


def has_checkpoints(run_dir: Path) -> bool:
    """Whether something there bears the name of a checkpoint; imports nothing to find out."""
    return any(run_dir.glob("step-*"))


def prepare_run_directory(recipe: Recipe) -> Path:
    """Make the run directory."""
    run_dir = recipe.directory
    probe = run_dir / PROBE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))  # not empty: a full disk takes that
        finally:
            with suppress(OSError):
                probe.unlink()
    except OSError as error:
        raise _unwritable(run_dir, error.strerror) from None
    return run_dir


def _unwritable(run_dir: Path, why: str | None) -> UserError:
    return UserError(
        "run_dir",
        f"cannot write to {run_dir}: {why}",
        "a directory that can be made and written to",
        "set run_dir=PATH",
    )


def lock_run_directory(recipe: Recipe) -> IO[bytes]:
    """Claim the run directory for this process, until the returned file is closed.

    The kernel gives the lock back when the process ends, however it ends.
    """
    path = recipe.directory / RUN_LOCK
    try:
        return acquire(path, wait=False)
    except BlockingIOError:
        raise UserError(
            "run_dir",
            f"{recipe.directory} is in use by another run (process {holder(path)})",
            "a directory that no other run writes to",
            "wait for it, stop it, or set run_dir=PATH",
        ) from None
