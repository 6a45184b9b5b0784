"""From what a user names to the readers of the files that are there."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data_tools.sources.csv_files import DELIMITERS
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
from data_tools.sources.mds_files import MdsReader, mds_shards
from data_tools.sources.saved_datasets import METADATA, left_splits, saved_dataset_files
from data_tools.sources.splits import TRAIN, training_paths
from data_tools.sources.tables import TableReader
from dualtrain.common.compression import SUFFIXES
from dualtrain.common.errors import UserError
from dualtrain.common.files import in_utf8, user_path
from dualtrain.data.dataset import DATASET_FILE

_FORMATS = {
    "txt": "txt",
    "md": "txt",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "json",
    "parquet": "parquet",
    "arrow": "arrow",
    "csv": "csv",
    "tsv": "tsv",
}
"""Suffix of a file name, or name of a format, and the kind of content."""

_TABLES = {"parquet", "arrow"}
_CACHE = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")
"""What ``Dataset.map`` and its like leave beside the files that they read."""
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
            ``datasets`` or as MDS, a glob pattern, ``-`` for standard input,
            ``builtin:python-docs``. Of a directory whose names tell splits apart, only the train
            split is read.
        text_field: Field of a JSON object, or column of a table, that holds the text; as in
            :mod:`data_tools.sources.fields`.
        format: Kind of files whose names do not show it, and of standard input (else JSON lines):
            ``txt``, ``jsonl``, ``json``, ``csv``, ``tsv``, ``parquet`` or ``arrow``.
        separator: What divides text files into documents: a string, or ``blank-line``. None makes
            a file one document.
        stdin: What ``-`` reads; by default the standard input of the process.
        block_bytes: Content of a block; one that ends with a large document has more.

    Raises:
        UserError: Nothing is there, or not of a kind that can be read, or something twice, or an
            option has no effect on what is there.
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
    found.check_options()
    return ReaderSource(
        found.readers,
        ignored=map(in_utf8, found.ignored),
        notes=found.notes,
        at_end=found.check_separator,
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
    notes: list[str] = field(default_factory=list)
    repeatable: bool = True
    origins: dict[str, str] = field(default_factory=dict)
    """As what each file was found first, under its real path."""
    kinds: set[str] = field(default_factory=set)
    """Of what was found."""
    is_format_used: bool = False

    def check_options(self) -> None:
        """Raise UserError for an option that says something about files that are not there."""
        if self.format is not None and not self.is_format_used and self.kinds != {self.format}:
            raise UserError(
                "--format",
                f"'{self.format}' has no effect: the names of the files say what they are",
                "files whose names do not say it",
                "leave it out, or rename the files",
            )
        if self.options.separator is not None and "txt" not in self.kinds:
            raise UserError(
                "--separator",
                f"{self.options.separator!r} has no effect: there are no text files to divide",
                ".txt or .md files",
                "leave it out",
            )
        if self.options.text_field != "text" and self.kinds <= {"txt", BUILTIN}:
            raise UserError(
                "--text-field",
                f"'{self.options.text_field}' has no effect: text files have no fields",
                "JSON or a table",
                "leave it out, or say what the files are with --format",
            )

    def check_separator(self) -> None:
        """Raise UserError when all was read and the separator was nowhere."""
        separator = self.options.separator
        if separator is None or self.options.sought.found:
            return
        hint = "leave it out to make each file a document"
        if "\\" in separator:
            hint = f"""type $'{separator}' in bash, "{separator}" in a recipe"""
        raise UserError(
            "--separator",
            f"{separator!r} occurs nowhere in the text",
            "what stands between its documents",
            hint,
        )

    def add(self, source: str) -> None:
        if not source:
            raise UserError(
                "source",
                "an empty name is given for a source of text",
                "a file, a directory or a pattern",
                "perhaps a variable of the shell is not set",
            )
        if source == _STDIN:
            self._once(STDIN_NAME, source)
            self.readers.append(self._standard_input())
            self.repeatable = False
        elif source.startswith(BUILTIN):
            if source != PYTHON_DOCS:
                raise UserError(source, "there is no such embedded corpus", PYTHON_DOCS)
            self._once(source, source)
            self.kinds.add(BUILTIN)
            self.readers.append(PythonDocs())
        else:
            try:
                self._add_path(source)
            except OSError as error:
                what = f"cannot be read: {error.strerror or error}"
                raise UserError(in_utf8(error.filename or source), what) from None

    def _add_path(self, source: str) -> None:
        path = user_path(source)
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
        units = sorted(_walk(directory, source, self.format), key=lambda unit: unit.path)
        units = _without_descriptions(units)
        texts = [unit.path for unit in units if unit.has_text]
        training, note = training_paths(directory, texts)
        self.notes.extend([note] if note else [])
        for unit in units:
            self.ignored.extend(unit.ignored)
            if unit.has_text and unit.path not in training:
                continue
            self.notes.extend(unit.notes)
            for path in unit.files:
                self._once(path, source)
                self.readers.append(self._reader(path, default="arrow" if unit.is_saved else None))
            for shard in unit.shards:
                self._add_shard(unit.path, shard, source)
        if len(self.readers) == before:
            if (directory / DATASET_FILE).is_file():
                what, hint = "is a dataset already", "`dualtrain data merge` joins datasets"
                raise UserError(in_utf8(directory), what, "text", hint)
            suffixes = ", ".join(f".{suffix}" for suffix in _FORMATS)
            hint = "say with --format what files of other names are"
            raise UserError(
                in_utf8(directory), "the directory has no text", f"{suffixes} files", hint
            )

    def _add_shard(self, directory: Path, shard: dict[str, Any], source: str) -> None:
        options = self.options
        reader = MdsReader(
            directory, shard, field=options.text_field, block_bytes=options.block_bytes
        )
        self._once(reader.file.path, source)
        self.kinds.add("mds")
        self.readers.append(reader)

    def _add_file(self, path: Path, source: str) -> None:
        if _kind(path)[0] is None and self.format is None:
            raise UserError(
                in_utf8(path),
                f"cannot read '{''.join(path.suffixes[-2:])}' files",
                ", ".join(f".{suffix}" for suffix in _FORMATS),
                "or say what it is with --format",
            )
        if _CACHE.fullmatch(path.name):
            raise UserError(
                in_utf8(path),
                "is what Dataset.map left in a cache, beside the text that it read",
                "files of text",
                "give the directory, which leaves it out, or save it with save_to_disk",
            )
        self._once(path, source)
        self.readers.append(self._reader(path))
        self.repeatable = self.repeatable and path.is_file()  # not a named pipe

    def _reader(self, path: Path, default: str | None = None) -> Reader:
        kind, compression = _kind(path)
        if kind is None:
            self.is_format_used = self.is_format_used or default is None
            kind = default or self.format
        assert kind is not None  # others were refused, or ignored
        self.kinds.add(kind)
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
            expected = ", ".join(["txt", "jsonl", "json", *DELIMITERS])
            raise UserError(STDIN_NAME, what, expected, "save it to a file")
        self.is_format_used = True
        self.kinds.add(kind)
        stream = self.stdin or standard_input()
        return StandardInput(stream, kind=kind, options=self.options)

    def _once(self, path: str | Path, source: str) -> None:
        name, identity = in_utf8(path), os.path.realpath(path)
        if identity in self.origins:
            other = self.origins[identity]
            what = "is named twice among the sources"
            if other != name:
                what += f": it is the same file as {other}"
            raise UserError(name, what, "each text once", f"found in '{in_utf8(source)}'")
        self.origins[identity] = name


def standard_input() -> IO[bytes]:
    """What ``-`` reads.

    Raises:
        UserError: The process was started without (``<&-``).
    """
    if sys.stdin is None:
        raise UserError(STDIN_NAME, "is closed", "text on it", "give a file")
    return sys.stdin.buffer


@dataclass(frozen=True)
class _Unit:
    """What stands at one path of a searched directory: a file, a saved dataset, or MDS shards."""

    path: Path
    files: list[Path] = field(default_factory=list)
    shards: list[dict[str, Any]] = field(default_factory=list)
    """Entries of ``index.json``."""
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_saved: bool = False

    @property
    def has_text(self) -> bool:
        return bool(self.files or self.shards)


def _walk(directory: Path, source: str, format: str | None) -> Iterator[_Unit]:
    """Search through all levels; links to directories are followed, but not in circles."""
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        name, what = in_utf8(error.filename), f"cannot be searched: {error.strerror}"
        raise UserError(name, what, hint=f"found in '{in_utf8(source)}'")

    for top, directories, names in os.walk(directory, onerror=fail, followlinks=True):
        here, real = Path(top), os.path.realpath(top)
        if (here / DATASET_FILE).is_file() and (here / "train").is_dir():
            # Made by convert, perhaps from this very source: its JSON files are no text.
            yield _Unit(here, ignored=[f"{here}{os.sep}"])
            directories.clear()
            continue
        if unit := _dataset(here) if real not in seen else None:
            yield unit
        if unit is not None or real in seen:
            directories.clear()
            continue
        seen.add(real)
        for name in [name for name in directories if name.startswith(".")]:
            directories.remove(name)
            yield _Unit(here / name, ignored=[f"{here / name}{os.sep}"])
        directories.sort()
        for name in names:
            yield _unit(here / name, format)


def _dataset(directory: Path) -> _Unit | None:
    """A directory whose files belong together, as one of its files says."""
    files, shards = saved_dataset_files(directory), mds_shards(directory)
    if files is None:
        return None if shards is None else _Unit(directory, shards=shards)
    left = left_splits(directory)
    known = (
        {path.name for path in files} | METADATA | {path.parent.name for path in files} | {*left}
    )
    ignored = [str(path) for path in sorted(directory.iterdir()) if path.name not in known]
    notes = [f"{in_utf8(directory)}: only the split {TRAIN} is read, not {', '.join(left)}"]
    return _Unit(
        directory, files=files, ignored=ignored, notes=notes if left else [], is_saved=True
    )


def _unit(path: Path, format: str | None) -> _Unit:
    kind = _kind(path)[0] or format
    is_known = path.name.startswith(".") or path.name in METADATA or _CACHE.fullmatch(path.name)
    if kind is not None and not is_known and path.is_file():
        return _Unit(path, files=[path])
    return _Unit(path, ignored=[str(path)])


def _without_descriptions(units: list[_Unit]) -> list[_Unit]:
    """Take Markdown for what it mostly is beside text of other kinds: no text of the corpus."""
    if all(_is_markdown(unit) for unit in units if unit.has_text):
        return units
    return [
        _Unit(unit.path, ignored=[str(unit.path)]) if _is_markdown(unit) else unit for unit in units
    ]


def _is_markdown(unit: _Unit) -> bool:
    return bool(unit.files) and unit.path.suffix.lower() == ".md"


def _kind(path: Path) -> tuple[str | None, str | None]:
    """Kind of content and compression, by the name of a file."""
    suffix = path.suffix.lower()
    compression = SUFFIXES.get(suffix)
    if compression is not None:
        suffix = path.with_suffix("").suffix.lower()
    kind = _FORMATS.get(suffix.removeprefix("."))
    return (None if compression and kind in _TABLES else kind), compression
