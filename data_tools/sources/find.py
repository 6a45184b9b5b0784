"""From what a user names to the readers of the files that are there."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from data_tools.sources.cutting import Separator
from data_tools.sources.documents import BLOCK_BYTES, Corpus, CorpusFile, Reader
from data_tools.sources.files import (
    BUILTIN,
    PYTHON_DOCS,
    STDIN_NAME,
    Format,
    PythonDocs,
    ReadingOptions,
)
from data_tools.sources.formats import FORMATS, find_format, format_of, known_suffixes
from data_tools.sources.json_files import JSON_LINES
from data_tools.sources.mds_files import MdsReader
from data_tools.sources.splits import training_paths
from data_tools.sources.tables import ARROW, PARQUET
from data_tools.sources.text_files import TEXT
from data_tools.sources.token_files import TOKENS, separator_id
from data_tools.sources.walk import entries, is_cache
from dualtrain.common.errors import UserError
from dualtrain.common.files import in_utf8, user_path
from dualtrain.data.dataset import DATASET_FILE

STANDARD_INPUT = "-"
_DIVIDED = {format.name for format in (TEXT, TOKENS, PARQUET, ARROW)}
"""What a separator may divide; of tables, lists of ids."""


def open_sources(
    sources: str | Iterable[str],
    *,
    text_field: str = "text",
    format: str | None = None,
    separator: str | None = None,
    stdin: IO[bytes] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Corpus:
    """Find what a recipe's or a command's sources name.

    Args:
        sources: One or several, read in this order: a file, a directory (searched through all
            levels, in order of the paths, without hidden files), a directory saved by Hugging Face
            ``datasets`` or as MDS, a glob pattern, ``-`` for standard input,
            ``builtin:python-docs``. Of a directory whose names tell splits apart, only the train
            split is read.
        text_field: Field of a JSON object, or column of a table, that holds the text; as in
            :mod:`data_tools.sources.fields`.
        format: Kind of files whose names do not show it, and of standard input (else JSON lines).
        separator: What divides text files into documents: a string, or ``blank-line``. None makes
            a file one document.
        stdin: What ``-`` reads; by default the standard input of the process.
        block_bytes: Content of a block; one that ends with a large document has more.

    Raises:
        UserError: Nothing is there, or not of a kind that can be read, or something twice, or an
            option has no effect on what is there.
    """
    options = ReadingOptions(
        text_field=text_field, separator=Separator(separator or None), block_bytes=block_bytes
    )
    search = _Search(None if format is None else find_format(format), options, stdin)
    for source in [sources] if isinstance(sources, str) else sources:
        search.add(source)
    if not search.readers:
        raise UserError("", "no source of text is given", hint=f"for example {PYTHON_DOCS}")
    search.check_options()
    return Corpus(
        readers=tuple(search.readers),
        block_bytes=block_bytes,
        ignored=tuple(map(in_utf8, search.ignored)),
        notes=tuple(search.notes),
        repeatable=search.repeatable,
        at_end=search.check_separator,
    )


def standard_input() -> IO[bytes]:
    """What ``-`` reads.

    Raises:
        UserError: The process was started without (``<&-``).
    """
    if sys.stdin is None:
        raise UserError(STDIN_NAME, "is closed", "text on it", "give a file")
    return sys.stdin.buffer


@dataclass
class _Search:
    """What has been found so far."""

    format: Format | None
    options: ReadingOptions
    stdin: IO[bytes] | None
    readers: list[Reader] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repeatable: bool = True
    names: dict[str, str] = field(default_factory=dict)
    """As what each file was found first, by its real path."""
    kinds: set[str] = field(default_factory=set)
    """Of what was found."""
    is_format_used: bool = False

    def add(self, source: str) -> None:
        """Add the readers of what one source names."""
        if not source:
            raise UserError(
                "source",
                "an empty name is given for a source of text",
                "a file, a directory or a pattern",
                "perhaps a variable of the shell is not set",
            )
        if source == STANDARD_INPUT:
            self._add_standard_input()
        elif source.startswith(BUILTIN):
            if source != PYTHON_DOCS:
                raise UserError(source, "there is no such embedded corpus", PYTHON_DOCS)
            self._keep(PythonDocs(), BUILTIN, source, name=source)
        else:
            try:
                for path in _matches(source):
                    if path.is_dir():
                        self._add_directory(path, source)
                    else:
                        self._add_file(path, source)
            except OSError as error:
                what = f"cannot be read: {error.strerror or error}"
                raise UserError(in_utf8(error.filename or source), what) from None

    def check_options(self) -> None:
        """Raise UserError for an option that says something about files that are not there."""
        format = self.format
        if format is not None and not self.is_format_used and self.kinds != {format.name}:
            raise UserError(
                "--format",
                f"'{format.name}' has no effect: the names of the files say what they are",
                "files whose names do not say it",
                "leave it out, or rename the files",
            )
        if TOKENS.name in self.kinds:
            separator_id(self.options)
        elif self.options.separator.text is not None and not self.kinds & _DIVIDED:
            raise UserError(
                "--separator",
                f"{self.options.separator.text!r} has no effect: there are no text files to divide",
                ".txt or .md files, or files or tables of tokens",
                "leave it out",
            )
        plain = {BUILTIN, *(format.name for format in FORMATS if not format.has_fields)}
        if self.options.text_field != "text" and self.kinds <= plain:
            raise UserError(
                "--text-field",
                f"'{self.options.text_field}' has no effect: text files have no fields",
                "JSON or a table",
                "leave it out, or say what the files are with --format",
            )

    def check_separator(self) -> None:
        """Raise UserError when all was read and the separator was nowhere."""
        separator = self.options.separator
        if separator.text is None or separator.is_found:
            return
        hint = "leave it out to make each file a document"
        if "\\" in separator.text:
            hint = f"""type $'{separator.text}' in bash, "{separator.text}" in a recipe"""
        raise UserError(
            "--separator",
            f"{separator.text!r} occurs nowhere in the text",
            "what stands between its documents",
            hint,
        )

    def _add_standard_input(self) -> None:
        format = self.format or JSON_LINES
        if format.parts is None:
            what = f"{format.name} cannot be read from a stream"
            expected = ", ".join(format.name for format in FORMATS if format.parts is not None)
            raise UserError(STDIN_NAME, what, expected, "save it to a file")
        self.is_format_used, self.repeatable = True, False
        stream = self.stdin or standard_input()
        reader = format.open(CorpusFile(STDIN_NAME, 0), self.options, stream=stream)
        self._keep(reader, format.name, STANDARD_INPUT)

    def _add_directory(self, directory: Path, source: str) -> None:
        before = len(self.readers)
        found = entries(directory, self.format)
        training, note = training_paths(directory, [e.path for e in found if e.has_text])
        self.notes += [note] if note else []
        for entry in found:
            self.ignored += entry.ignored
            if not entry.has_text or entry.path not in training:
                continue
            self.notes += [entry.note] if entry.note else []
            for path in entry.files:
                self._add_reader(path, source)
            for shard in entry.shards:
                self._keep(MdsReader(entry.path, shard, self.options), "mds", source)
        if len(self.readers) == before:
            where = in_utf8(directory)
            if (directory / DATASET_FILE).is_file():
                hint = "`dualtrain data merge` joins datasets"
                raise UserError(where, "is a dataset already", "text", hint)
            hint = "say with --format what files of other names are"
            raise UserError(where, "the directory has no text", f"{known_suffixes()} files", hint)

    def _add_file(self, path: Path, source: str) -> None:
        if format_of(path)[0] is None and self.format is None:
            raise UserError(
                in_utf8(path),
                f"cannot read '{''.join(path.suffixes[-2:])}' files"
                if path.suffix
                else "has no suffix that says what it is",
                known_suffixes(),
                "or say what it is with --format",
            )
        if is_cache(path):
            raise UserError(
                in_utf8(path),
                "is what Dataset.map left in a cache, beside the text that it read",
                "files of text",
                "give the directory, which leaves it out, or save it with save_to_disk",
            )
        self._add_reader(path, source)
        self.repeatable = self.repeatable and path.is_file()  # not a named pipe

    def _add_reader(self, path: Path, source: str) -> None:
        format, compression = format_of(path)
        if format is None:
            format, self.is_format_used = self.format or ARROW, True  # of a saved dataset
        file = CorpusFile(str(path), path.stat().st_size)
        self._keep(format.open(file, self.options, compression=compression), format.name, source)

    def _keep(self, reader: Reader, kind: str, source: str, *, name: str = "") -> None:
        """Take a reader, unless its file was found before."""
        path = name or reader.file.path
        name, identity = in_utf8(path), os.path.realpath(path)
        if identity in self.names:
            other = self.names[identity]
            what = "is named twice among the sources"
            if other != name:
                what += f": it is the same file as {other}"
            raise UserError(name, what, "each text once", f"found in '{in_utf8(source)}'")
        self.names[identity] = name
        self.kinds.add(kind)
        self.readers.append(reader)


def _matches(source: str) -> list[Path]:
    """What is called so, or matches the pattern."""
    path = user_path(source)
    if path.exists():
        return [path]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if "**" in source:  # matches the files in its directories, too
        matches = [path for path in matches if path.is_file()]
    if not matches:
        raise UserError(
            source, "there is no such file, directory or pattern", hint=f"or use {PYTHON_DOCS}"
        )
    return matches
