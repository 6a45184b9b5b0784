"""From what a user names to the readers of the files that are there."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from data_tools.sources.compression import SUFFIXES
from data_tools.sources.documents import BLOCK_BYTES, Reader, ReaderSource, Source
from data_tools.sources.files import (
    BUILTIN,
    PYTHON_DOCS,
    STDIN_NAME,
    Options,
    PythonDocs,
    StandardInput,
    file_reader,
)
from data_tools.sources.saved_datasets import METADATA, saved_dataset_files
from data_tools.sources.tables import TableReader
from dualtrain.data.dataset import DATASET_FILE
from dualtrain.errors import UserError

_FORMATS = {
    "txt": "txt",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "json",
    "parquet": "parquet",
    "arrow": "arrow",
}
"""Suffix of a file name, or name of a format, and the kind of content."""

_TABLES = {"parquet", "arrow"}
_STDIN = "-"


def open_sources(
    sources: str | Sequence[str],
    *,
    text_field: str = "text",
    format: str | None = None,
    separator: str | None = None,
    stdin: IO[bytes] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Source:
    """Find what a recipe's or a command's sources name.

    Args:
        sources: One or several, read in this order: a file, a directory (searched through all
            levels, in order of the paths, without hidden files), a directory saved by Hugging Face
            ``datasets``, a glob pattern, ``-`` for standard input, ``builtin:python-docs``.
        text_field: Field of a JSON object, or column of a table, that holds the text.
        format: Kind of files whose names do not show it, and of standard input (else JSON lines):
            ``txt``, ``jsonl``, ``json``, ``parquet`` or ``arrow``.
        separator: What divides ``.txt`` files into documents: a string, or ``blank-line``. None
            makes a file one document.
        stdin: What ``-`` reads; by default the standard input of the process.
        block_bytes: Content of a block; one that ends with a large document has more.

    Raises:
        UserError: Nothing is there, or not of a kind that can be read, or something twice.
    """
    if format is not None and format not in _FORMATS:
        raise UserError("--format", f"there is no format '{format}'", ", ".join(_FORMATS))
    if separator == "":
        raise UserError("--separator", "the separator is empty", "a string, or 'blank-line'")
    sources = [sources] if isinstance(sources, str) else list(sources)
    options = Options(text_field=text_field, separator=separator, block_bytes=block_bytes)
    found = _Found(format and _FORMATS[format], options, stdin)
    for source in sources:
        found.add(source)
    if not found.readers:
        raise UserError("", "no source of text is given", hint=f"for example {PYTHON_DOCS}")
    return ReaderSource(
        found.readers,
        ignored=found.ignored,
        repeatable=found.repeatable,
        block_bytes=block_bytes,
    )


@dataclass
class _Found:
    """What has been found so far."""

    format: str | None
    options: Options
    stdin: IO[bytes] | None
    readers: list[Reader] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    repeatable: bool = True
    origins: dict[str, str] = field(default_factory=dict)
    """Through which source each file was found, under its real path."""

    def add(self, source: str) -> None:
        if source == _STDIN:
            self._once(source, source)
            self.readers.append(self._standard_input())
            self.repeatable = False
        elif source.startswith(BUILTIN):
            if source != PYTHON_DOCS:
                raise UserError(source, "there is no such embedded corpus", PYTHON_DOCS)
            self._once(source, source)
            self.readers.append(PythonDocs())
        else:
            self._add_path(source)

    def _add_path(self, source: str) -> None:
        path = Path(source).expanduser()
        if path.is_dir():
            self._add_directory(path, source)
        elif path.exists():
            self._add_file(path, source)
        else:
            self._add_pattern(str(path), source)

    def _add_pattern(self, pattern: str, source: str) -> None:
        matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
        if "**" in pattern:  # matches the files in its directories, too
            matches = [path for path in matches if path.is_file()]
        if not matches:
            raise UserError(
                source, "there is no such file, directory or pattern", hint=f"or use {PYTHON_DOCS}"
            )
        for path in matches:
            if path.is_dir():
                self._add_directory(path, source)
            else:
                self._add_file(path, source)

    def _add_directory(self, directory: Path, source: str) -> None:
        before = len(self.readers)
        units = sorted(_walk(directory, source), key=lambda unit: unit.path)
        for unit in units:
            self.ignored.extend(unit.ignored)
            for path in unit.files:
                self._once(os.path.realpath(path), source)
                kind, compression = _kind(path)
                self.readers.append(self._reader(path, kind or "arrow", compression))
        if len(self.readers) == before:
            suffixes = ", ".join(f".{suffix}" for suffix in _FORMATS)
            raise UserError(str(directory), "the directory has no text", f"{suffixes} files")

    def _add_file(self, path: Path, source: str) -> None:
        kind, compression = _kind(path)
        if kind is None and self.format is not None:
            kind, compression = self.format, compression or "detect"
        if kind is None:
            raise UserError(
                str(path),
                f"cannot read '{''.join(path.suffixes[-2:])}' files",
                ", ".join(f".{suffix}" for suffix in _FORMATS),
                "or say what it is with --format",
            )
        self._once(os.path.realpath(path), source)
        self.readers.append(self._reader(path, kind, compression))
        self.repeatable = self.repeatable and path.is_file()  # not a named pipe

    def _reader(self, path: Path, kind: str, compression: str | None) -> Reader:
        if kind not in _TABLES:
            return file_reader(path, kind=kind, compression=compression, options=self.options)
        options = self.options
        return TableReader(
            path, kind=kind, field=options.text_field, block_bytes=options.block_bytes
        )

    def _standard_input(self) -> Reader:
        kind = self.format or "jsonl"
        if kind in _TABLES:
            what = f"{kind} cannot be read from a stream"
            raise UserError(STDIN_NAME, what, "txt, jsonl or json", "save it to a file")
        stream = sys.stdin.buffer if self.stdin is None else self.stdin
        return StandardInput(stream, kind=kind, options=self.options)

    def _once(self, identity: str, source: str) -> None:
        if identity in self.origins:
            raise UserError(
                source,
                f"'{identity}' is named twice among the sources",
                "each text once",
                f"it is also in '{self.origins[identity]}'",
            )
        self.origins[identity] = source


@dataclass(frozen=True)
class _Unit:
    """What stands at one path of a searched directory: a file, or a saved dataset."""

    path: Path
    files: list[Path] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def _walk(directory: Path, source: str) -> Iterator[_Unit]:
    """Search through all levels; links to directories are followed, but not in circles."""
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise UserError(str(error.filename), f"cannot be searched: {error.strerror}", hint=source)

    for top, directories, names in os.walk(directory, onerror=fail, followlinks=True):
        here, real = Path(top), os.path.realpath(top)
        if (here / DATASET_FILE).is_file() and (here / "train").is_dir():
            # Made by convert, perhaps from this very source: its JSON files are no text.
            yield _Unit(here, ignored=[f"{here}{os.sep}"])
            directories.clear()
            continue
        saved = saved_dataset_files(here) if real not in seen else None
        if saved is not None:
            yield _Unit(here, files=saved, ignored=_beside(here, saved))
        if saved is not None or real in seen:
            directories.clear()
            continue
        seen.add(real)
        for name in [name for name in directories if name.startswith(".")]:
            directories.remove(name)
            yield _Unit(here / name, ignored=[f"{here / name}{os.sep}"])
        directories.sort()
        for name in names:
            yield _unit(here / name)


def _unit(path: Path) -> _Unit:
    kind, compression = _kind(path)
    is_text = kind is not None and not path.name.startswith(".") and path.name not in METADATA
    if is_text and path.is_file():
        return _Unit(path, files=[path])
    return _Unit(path, ignored=[str(path)])


def _beside(directory: Path, files: list[Path]) -> list[str]:
    """What stands in the directory of a saved dataset and does not belong to it."""
    known = {path.name for path in files} | METADATA | {path.parent.name for path in files}
    return [str(path) for path in sorted(directory.iterdir()) if path.name not in known]


def _kind(path: Path) -> tuple[str | None, str | None]:
    """Kind of content and compression, by the name of a file."""
    suffix = path.suffix.lower()
    compression = SUFFIXES.get(suffix)
    if compression is not None:
        suffix = path.with_suffix("").suffix.lower()
    kind = _FORMATS.get(suffix.removeprefix("."))
    return (None if compression and kind in _TABLES else kind), compression
