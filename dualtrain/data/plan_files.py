"""Plan arrays in files that the ranks of a node share, so that 10^9 documents cost little memory.

An array is built by one process under a lock, written beside its place, renamed, and then mapped by
all of them. One is built at a time, so that two never need memory at once. Files only save time:
whatever is missing is built again, with the same content.
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
_AHEAD_AFTER_S = 5.0  # what other streams need now is built first


class PlanFiles:
    """A directory of arrays, each named ``kind-number.npy`` and built at most once at a time.

    Args:
        directory: Where the files go, on a local disk; None keeps arrays in memory instead, for
            corpora so small that building is cheaper than a file.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._claim: IO[bytes] | None = None
        self._ahead: dict[tuple[str, int], tuple[threading.Thread, threading.Event]] = {}

    @classmethod
    def open(cls, plan_dir: Path, key: str) -> PlanFiles:
        """The directory `key` in `plan_dir`, which other runs may share.

        What ended runs left in `plan_dir` is removed: an epoch takes four bytes a document.
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
        if (kind, number) in self._ahead:
            thread, is_needed = self._ahead.pop((kind, number))
            is_needed.set()
            thread.join()
        try:
            return self._map_or_build(self.directory, kind, number, build)
        except OSError as error:
            raise _unwritable(self.directory, error) from None

    def build_ahead(self, kind: str, number: int, build: Build, *, oldest: int) -> None:
        """Build an array that will be needed, in the background and soon.

        Before that the arrays of its kind below `oldest` are removed, so that there is room for it:
        no rank needs them again (one behind builds them anew).
        """
        directory = self.directory
        if directory is None or (kind, number) in self._ahead:
            return
        is_needed = threading.Event()

        def work() -> None:
            is_needed.wait(_AHEAD_AFTER_S)
            # Only an optimisation: load() meets the same error again and reports it.
            with contextlib.suppress(OSError):
                _remove_below(directory, kind, oldest)
                self._map_or_build(directory, kind, number, build)

        thread = threading.Thread(target=work, name=f"plan-{kind}-{number}", daemon=True)
        self._ahead[kind, number] = thread, is_needed
        thread.start()

    def _map_or_build(self, directory: Path, kind: str, number: int, build: Build) -> np.ndarray:
        file = directory / f"{kind}-{number:08d}.npy"
        if not file.exists():
            directory.mkdir(parents=True, exist_ok=True)
            with locked(directory / "building.lock"):
                if not file.exists():
                    # What a killed builder left has the same name, and is overwritten.
                    partial = directory / "building.partial"
                    with replacing(file, beside=partial), partial.open("wb") as stream:
                        np.save(stream, build(), allow_pickle=False)
        return np.load(file, mmap_mode="r", allow_pickle=False)


def _remove_below(directory: Path, kind: str, number: int) -> None:
    for file in directory.glob(f"{kind}-*.npy"):
        if int(file.stem.rpartition("-")[2]) < number:
            file.unlink(missing_ok=True)


def _unwritable(directory: Path, error: OSError) -> UserError:
    return UserError(
        str(directory),
        f"the data plan cannot be written: {error.strerror or error}",
        "a writable directory with some free gigabytes",
    )
