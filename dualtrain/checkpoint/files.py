"""The files of a checkpoint: written with their hashes, and checked against them.

``checkpoint.save`` writes every file through a :class:`Files`, on every rank; ``resume`` asks
:func:`find_defects` before anything is loaded. The marker ``complete.json`` lists size and XXH3-128
of each file: a hash of 20 GB/s that finds what a disk, a network or a hand has altered (it is no
protection against forgery).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from dualtrain.common.files import replacing, sync

MARKER = "complete.json"
FORMAT = 2

_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class FileFacts:
    """What the marker knows of a file."""

    size: int
    hash: str


class Files:
    """What one rank writes of a checkpoint.

    A full disk must not leave the other ranks waiting in a collective, so nothing here raises
    OSError: the first one is kept in ``error``, and the ranks compare notes when all have written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.facts: dict[str, FileFacts] = {}
        self.error: str | None = None

    def attempt(self, write: Callable[[], object]) -> None:
        """Do something with the disk, unless something has failed before; keep its OSError."""
        if self.error is not None:
            return
        try:
            write()
        except OSError as error:
            self.error = f"{error.filename or self.directory}: {error.strerror or error}"

    def make_directory(self, path: str) -> None:
        """Make a directory, unless it is there."""
        self.attempt(lambda: os.makedirs(path, exist_ok=True))

    def torch_save(self, value: object, path: Path) -> None:
        """``torch.save``, hashed on the way."""
        self.attempt(lambda: self._stream(path, lambda sink: torch.save(value, sink)))  # type: ignore[arg-type]

    def text(self, text: str, path: Path) -> None:
        """Write a small text."""
        self.attempt(lambda: self._stream(path, lambda sink: sink.write(text.encode())))

    def add(self, path: Path) -> None:
        """Take up a file that somebody else's function has written."""
        self.attempt(lambda: self._take(path))

    def _stream(self, path: Path, write: Callable[[_Sink], object]) -> None:
        with path.open("wb", buffering=0) as file:
            sink = _Sink(file)
            write(sink)
            # Raised here, not inside: torch's writer does not survive an error of its stream.
            if sink.error is not None:
                sink.error.filename = str(path)
                raise sink.error
        self._note(path, FileFacts(sink.size, sink.hash.hexdigest()))

    def sync(self) -> None:
        """Wait until all of it is on the disk: at the end and at once, as disks like it."""
        with ThreadPoolExecutor() as pool:
            self.attempt(lambda: list(pool.map(sync, [self.directory / n for n in self.facts])))

    def _take(self, path: Path) -> None:
        self._note(path, FileFacts(path.stat().st_size, hash_file(path)))

    def _note(self, path: Path, facts: FileFacts) -> None:
        self.facts[str(path.relative_to(self.directory))] = facts


class _Sink(io.RawIOBase):
    """A stream into a file that hashes what passes, and keeps the first error to itself."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.hash = xxhash.xxh3_128()
        self.size = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        self.hash.update(view)
        self.size += len(view)
        rest = view
        while len(rest) and self.error is None:
            try:
                rest = rest[self._file.write(rest) :]
            except OSError as error:
                self.error = error
        return len(view)


def write_marker(directory: Path, facts: dict[str, FileFacts]) -> None:
    """Write the marker, when all files are there and on the disk; only then is it whole."""
    text = json.dumps(
        {
            "format": FORMAT,
            "files": {
                name: {"size": facts[name].size, "xxh3_128": facts[name].hash}
                for name in sorted(facts)
            },
        },
        indent=1,
    )
    with replacing(directory / MARKER) as file:
        file.write_text(text + "\n")
    for path in (directory, *(path for path in directory.iterdir() if path.is_dir())):
        sync(path)


def read_marker(directory: Path) -> dict[str, FileFacts]:
    """The files that a checkpoint's marker lists."""
    marker = directory / MARKER
    if not marker.is_file():
        raise ValueError(f"no {MARKER}, so it is not a whole checkpoint")
    try:
        found = json.loads(marker.read_text())
        if found.get("format") != FORMAT:
            raise ValueError(
                f"written by another version (format {found.get('format')!r}, not {FORMAT})"
            )
        files = found["files"].items()
        return {name: FileFacts(int(f["size"]), str(f["xxh3_128"])) for name, f in files}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{MARKER} cannot be read: {error}") from None


def find_defects(
    directory: Path,
    *,
    required: Sequence[str] = (),
    share: tuple[int, int] | None = None,
    only: Collection[str] | None = None,
) -> list[str]:
    """What is wrong with a checkpoint.

    Args:
        share: (index, number of readers) of the reader that hashes every so manyth file; None
            compares only sizes.
        only: The files that matter, of those that the marker lists; None: all.
    """
    try:
        files = read_marker(directory)
    except ValueError as error:
        return [str(error)]
    if not set(required) <= files.keys():
        return [f"{MARKER} does not list the files of a checkpoint"]
    defects = []
    for number, (name, facts) in enumerate(files.items()):
        file = directory / name
        if only is not None and name not in only:
            continue
        if not file.is_file():
            defects.append(f"{name} is missing")
        elif file.stat().st_size != facts.size:
            defects.append(f"{name} has {file.stat().st_size} bytes, expected {facts.size}")
        elif share is not None and number % share[1] == share[0]:
            defects += _altered(file, name, facts)
    return defects


def _altered(file: Path, name: str, facts: FileFacts) -> list[str]:
    try:
        found = hash_file(file)
    except OSError as error:
        return [f"{name} cannot be read: {error.strerror}"]
    return [] if found == facts.hash else [f"{name} is not as it was saved (its hash differs)"]


def hash_file(path: Path) -> str:
    """XXH3-128 of a file, hexadecimal."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            state.update(block)
    return state.hexdigest()
