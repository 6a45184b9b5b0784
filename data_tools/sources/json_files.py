"""JSON: one object a line, an array of objects, or a single object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from data_tools.sources.cutting import TOO_LARGE, cut, decoded, gather, line_ends
from data_tools.sources.documents import Document, Piece, Problem
from data_tools.sources.fields import documents
from dualtrain.common.compression import BrokenFile

_SPACE = re.compile(r"[ \t\n\r]*")
_FIRST_BYTE = re.compile(rb"\s*(\S?)")
_LINES_LOOKED_AT = 2


def json_lines_pieces(
    chunks: Iterable[bytes], name: str, *, field: str, block_bytes: int
) -> Iterator[Piece]:
    """Pieces of about `block_bytes`, of whole lines."""
    line = 1
    for data in cut(chunks, line_ends, block_bytes):
        yield JsonLines(name, line, data, field)
        line += data.count(b"\n")


def json_pieces(
    chunks: Iterable[bytes], name: str, *, field: str, block_bytes: int
) -> Iterator[Piece]:
    """Pieces of a ``.json`` file, which may hold JSON lines, an array or a single object.

    An array or a single object is parsed at once. That takes about four times its size, and above
    1 GiB it is refused.
    """
    chunks = iter(chunks)
    head, broken = _head(chunks)
    chunks = chain([head], chunks if broken is None else _raising(broken))
    if _is_json_lines(head, ended=True):
        yield from json_lines_pieces(chunks, name, field=field, block_bytes=block_bytes)
        return
    data = bytearray()
    try:
        gather(chunks, data, instead="turn it into JSON lines, one object a line")
    except BrokenFile as error:
        if error.kind != TOO_LARGE:
            # Behind the last brace no object can be whole.
            yield WholeJson(name, bytes(data[: data.rfind(b"}") + 1]), field, is_cut=True)
        raise
    yield WholeJson(name, bytes(data), field, is_cut=False)


def _head(chunks: Iterator[bytes]) -> tuple[bytes, BrokenFile | None]:
    """As much of the content as shows what it is; and what is wrong behind it, if that is met."""
    head = bytearray()
    try:
        for chunk in chunks:
            head += chunk
            if b"\n" in chunk and _is_json_lines(bytes(head), ended=False) is not None:
                break
    except BrokenFile as error:
        return bytes(head), error
    return bytes(head), None


def _raising(error: BrokenFile) -> Iterator[bytes]:
    raise error
    yield


def _is_json_lines(head: bytes, *, ended: bool) -> bool | None:
    """Whether one of the first lines is an object by itself; None if `head` is too short to say.

    The first line alone would not do: it may be the one that is damaged.
    """
    if _first_byte(head) == b"[":
        return False
    *lines, last = head.split(b"\n", 2 * _LINES_LOOKED_AT)
    lines = [line for line in [*lines, last if ended else b""] if line and not line.isspace()]
    if any(_is_object(line) for line in lines[:_LINES_LOOKED_AT]):
        return True
    return False if ended or len(lines) >= _LINES_LOOKED_AT else None


def _first_byte(data: bytes) -> bytes:
    match = _FIRST_BYTE.match(data)
    return match[1] if match else b""


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


@dataclass(frozen=True, slots=True)
class JsonLines(Piece):
    """Whole lines of a file with one object a line."""

    name: str
    first_line: int
    data: bytes
    field: str

    @property
    def content_bytes(self) -> int:
        return len(self.data)

    def documents(self) -> Iterator[Document | Problem]:
        for number, line in enumerate(self.data.split(b"\n"), start=self.first_line):
            if line and not line.isspace():
                yield from self._documents(line, number)

    def _documents(self, data: bytes, number: int) -> Iterator[Document | Problem]:
        line = decoded(data, self.name, number)
        if isinstance(line, Problem):
            yield line
            return
        where = f"{self.name}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield _not_json(where, error, "one JSON object a line")
            return
        yield from documents(record, self.field, where)


@dataclass(frozen=True, slots=True)
class WholeJson(Piece):
    """A file with an array of objects, or with one object."""

    name: str
    data: bytes
    field: str
    is_cut: bool
    """The end is missing, which is reported elsewhere."""

    @property
    def content_bytes(self) -> int:
        return len(self.data)

    def documents(self) -> Iterator[Document | Problem]:
        text = decoded(self.data, self.name, first_line=1)
        if isinstance(text, Problem):
            yield text
            return
        line = counted = 0
        try:
            for record, start in _records(text):
                line += text.count("\n", counted, start)
                counted = start
                yield from documents(record, self.field, f"{self.name}:{line + 1}")
        except (ValueError, RecursionError) as error:
            # A RecursionError does not say where, but it is behind the last good record.
            line = error.lineno - 1 if isinstance(error, json.JSONDecodeError) else line
            if not self.is_cut:
                expected = "an array of objects, a single object or one JSON object a line"
                yield _not_json(f"{self.name}:{line + 1}", error, expected)


def _records(text: str) -> Iterator[tuple[Any, int]]:
    """The objects of an array, or the only one, and where each begins.

    Raises:
        ValueError: The text is not JSON, after the records before that place.
    """
    parse = json.JSONDecoder().raw_decode
    start = _skip_space(text, 0)
    if not text.startswith("[", start):
        record, end = parse(text, start)
        yield record, start
    else:
        end = _skip_space(text, start + 1)
        more = not text.startswith("]", end)
        while more:
            record, behind = parse(text, end)
            yield record, end
            end = _skip_space(text, behind)
            more = text.startswith(",", end)
            end = _skip_space(text, end + 1) if more else end
        if not text.startswith("]", end):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
        end += 1
    end = _skip_space(text, end)
    if end < len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _skip_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return match.end() if match else start


def _not_json(where: str, error: Exception, expected: str) -> Problem:
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
    else:
        reason = str(error)
    return Problem.at("not JSON", where, f"is not JSON: {reason}", expected)
