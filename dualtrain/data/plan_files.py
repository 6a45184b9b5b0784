"""Plan arrays in files that the ranks of a node share, so that 30 M documents cost little memory.

An array is built by one process under a lock, written beside its place, renamed, and then mapped by
all of them. Files only save time: whatever is missing is built again, with the same content.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from dualtrain.common.errors import UserError
from dualtrain.common.files import replacing
from dualtrain.common.locks import claim, locked, remove_unclaimed

Build = Callable[[], np.ndarray]

_IN_USE = "in-use.lock"


class PlanFiles:
    """A directory of arrays, each named ``kind-number.npy`` and built at most once at a time.

    Args:
        directory: Where the files go, on a local disk; None keeps arrays in memory instead, for
            corpora so small that building is cheaper than a file.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._claim: IO[bytes] | None = None
        self._ahead: dict[tuple[str, int], threading.Thread] = {}

    @classmethod
    def open(cls, plan_dir: Path, key: str) -> PlanFiles:
        """The directory `key` in `plan_dir`, which other runs may share.

        What ended runs left in `plan_dir` is removed: for 30 M documents an epoch is half a
        gigabyte.
        """
        files = cls(plan_dir / key)
        try:
            files._claim = claim(plan_dir / key / _IN_USE)
            for other in plan_dir.glob(f"*/{_IN_USE}"):
                if other.parent.name != key:
                    remove_unclaimed(other)
        except OSError as error:
            raise _unwritable(plan_dir, error) from None
        return files

    def load(self, kind: str, number: int, build: Build) -> np.ndarray:
        """The array of that name, built now unless some process built it before."""
        if self.directory is None:
            return build()
        thread = self._ahead.pop((kind, number), None)
        if thread is not None:
            thread.join()
        try:
            return self._map_or_build(self.directory, kind, number, build)
        except OSError as error:
            raise _unwritable(self.directory, error) from None

    def build_ahead(self, kind: str, number: int, build: Build) -> None:
        """Start building an array that will be needed, in the background."""
        directory = self.directory
        if directory is None or (kind, number) in self._ahead:
            return

        def work() -> None:
            # Only an optimisation: load() meets the same error again and reports it.
            with contextlib.suppress(OSError):
                self._map_or_build(directory, kind, number, build)

        thread = threading.Thread(target=work, name=f"plan-{kind}-{number}", daemon=True)
        self._ahead[kind, number] = thread
        thread.start()

    def remove_below(self, kind: str, number: int) -> None:
        """Remove the arrays of a kind that no rank needs again (one behind builds them anew)."""
        if self.directory is None:
            return
        for file in self.directory.glob(f"{kind}-*.npy"):
            if int(file.stem.rpartition("-")[2]) < number:
                file.unlink(missing_ok=True)

    def _map_or_build(self, directory: Path, kind: str, number: int, build: Build) -> np.ndarray:
        file = directory / f"{kind}-{number:08d}.npy"
        if not file.exists():
            directory.mkdir(parents=True, exist_ok=True)
            with locked(directory / f"{kind}.lock"):
                if not file.exists():
                    # What a killed builder left has the same name, and is overwritten.
                    partial = directory / f"{kind}.partial"
                    with replacing(file, beside=partial), partial.open("wb") as stream:
                        np.save(stream, build(), allow_pickle=False)
        return np.load(file, mmap_mode="r", allow_pickle=False)


def _unwritable(directory: Path, error: OSError) -> UserError:
    return UserError(
        str(directory),
        f"the data plan cannot be written: {error.strerror or error}",
        "a writable directory with some free gigabytes",
    )
