"""The directory that a run writes to; made, and found writable, before anything is spent."""

from __future__ import annotations

from pathlib import Path

from dualtrain.errors import UserError
from dualtrain.recipe.schema import Recipe


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
