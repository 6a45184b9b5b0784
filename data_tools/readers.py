"""Sources of text: files of several kinds and the embedded corpus, as one stream of documents.

A source can be iterated again and again, always in the same order; conversion does so.
"""

from __future__ import annotations

import glob
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from platform import python_version

from data_tools.python_docs import python_docs
from dualtrain.data.dataset import SourceFile
from dualtrain.errors import UserError

BUILTIN = "builtin:"
PYTHON_DOCS = BUILTIN + "python-docs"
_KINDS = (".jsonl", ".txt")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the place where it stands, for messages."""

    text: str
    where: str


class Source(ABC):
    """Documents in a fixed order."""

    files: tuple[SourceFile, ...]
    """What the documents are read from."""

    @abstractmethod
    def __iter__(self) -> Iterator[Document]: ...


class PythonDocs(Source):
    """The embedded corpus of :mod:`data_tools.python_docs`."""

    def __init__(self) -> None:
        size = sum(len(text.encode()) for _, text in python_docs())
        self.files = (SourceFile(path=f"{PYTHON_DOCS}, Python {python_version()}", bytes=size),)

    def __iter__(self) -> Iterator[Document]:
        for name, text in python_docs():
            yield Document(text, f"{PYTHON_DOCS}: {name}")


class TextFiles(Source):
    """Files on disk: ``.txt`` holds one document, ``.jsonl`` one in each line.

    Args:
        paths: The files, in order.
        text_field: Field of a JSON line that holds the text.
    """

    def __init__(self, paths: list[Path], *, text_field: str) -> None:
        self._paths = paths
        self._text_field = text_field
        self.files = tuple(SourceFile(path=str(p), bytes=p.stat().st_size) for p in paths)

    def __iter__(self) -> Iterator[Document]:
        for path in self._paths:
            try:
                if path.suffix == ".jsonl":
                    yield from _json_lines(path, self._text_field)
                else:
                    yield Document(_text(path), str(path))
            except OSError as error:
                raise UserError(str(path), f"cannot be read: {error.strerror}") from None


def open_source(source: str, *, text_field: str = "text") -> Source:
    """Find what a recipe's or a command's `source` names.

    Args:
        source: ``builtin:python-docs``, a .txt or .jsonl file, a directory of such files (searched
            through all levels, in order of their paths), or a glob pattern.
        text_field: Field of a JSON line that holds the text.

    Raises:
        UserError: Nothing is there, or not of a kind that can be read.
    """
    if source.startswith(BUILTIN):
        if source != PYTHON_DOCS:
            raise UserError(source, "there is no such embedded corpus", PYTHON_DOCS)
        return PythonDocs()
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in _KINDS and p.is_file())
        if not found:
            raise UserError(source, "the directory has no text", f"{' or '.join(_KINDS)} files")
    elif path.exists():
        found = [path]
    else:
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(
                source, "there is no such file, directory or pattern", hint=f"or use {PYTHON_DOCS}"
            )
    for file in found:
        if file.suffix not in _KINDS:
            raise UserError(str(file), f"cannot read '{file.suffix}' files", " or ".join(_KINDS))
    return TextFiles(found, text_field=text_field)


def _text(path: Path) -> str:
    return _decode(path.read_bytes(), str(path), first_line=1).replace("\r\n", "\n")


def _json_lines(path: Path, field: str) -> Iterator[Document]:
    # Lines end at \n only: text may hold U+2028 and others that str.splitlines would cut at.
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield Document(_field_of(_decode(line, str(path), number), field, where), where)


def _decode(data: bytes, path: str, first_line: int) -> str:
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}:{line}",
            f"byte 0x{data[error.start]:02x} is not UTF-8",
            "text in UTF-8",
            "convert the file, for example with iconv",
        ) from None


def _field_of(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(where, f"is not JSON: {error}", "one JSON object a line") from None
    if not isinstance(record, dict):
        raise UserError(where, f"is a JSON {type(record).__name__}", "one JSON object a line")
    if field not in record:
        fields = ", ".join(f"'{name}'" for name in record) or "none"
        raise UserError(
            where, f"has no field '{field}'", f"one of its fields: {fields}", "set text_field"
        )
    text = record[field]
    if not isinstance(text, str):
        raise UserError(where, f"field '{field}' is {json.dumps(text)[:60]}", "a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(where, f"field '{field}' holds half a surrogate pair", "text") from None
    return text
