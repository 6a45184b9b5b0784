"""JSON: one object a line, an array of objects, or a single object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from data_tools.sources.cutting import TOO_LARGE, cut, decoded, gather, line_ends
from data_tools.sources.documents import BadInput, BlockPart, Document, Unparsed
from data_tools.sources.fields import documents
from data_tools.sources.files import Format, ReadingOptions
from dualtrain.common.compression import BrokenFile
from dualtrain.common.input_files import EACH_KEY_ONCE, json_values

_FIRST_BYTE = re.compile(rb"\s*(\S?)")
_LINES_LOOKED_AT = 2


def json_lines_parts(
    chunks: Iterable[bytes], name: str, options: ReadingOptions
) -> Iterator[BlockPart]:
    """Parts of about a block, of whole lines."""
    line = 1
    for data in cut(chunks, line_ends, options.block_bytes):
        yield JsonLines(name, data, line, options.text_field)
        line += data.count(b"\n")


def json_parts(chunks: Iterable[bytes], name: str, options: ReadingOptions) -> Iterator[BlockPart]:
    """Parts of a ``.json`` file, which may hold JSON lines, an array or a single object.

    An array or a single object is parsed at once. That takes about four times its size, and above
    1 GiB it is refused.
    """
    chunks = iter(chunks)
    head, broken = _head(chunks)
    chunks = chain([head], chunks if broken is None else _raising(broken))
    if _is_json_lines(head, ended=True):
        yield from json_lines_parts(chunks, name, options)
        return
    data = bytearray()
    try:
        gather(chunks, data, instead="turn it into JSON lines, one object a line")
    except BrokenFile as error:
        if error.kind != TOO_LARGE:
            # Behind the last brace no object can be whole.
            whole = bytes(data[: data.rfind(b"}") + 1])
            yield WholeJson(name, whole, field=options.text_field, is_cut=True)
        raise
    yield WholeJson(name, bytes(data), field=options.text_field)


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
    first = _FIRST_BYTE.match(head)
    if first and first[1] == b"[":
        return False
    *lines, last = head.split(b"\n", 2 * _LINES_LOOKED_AT)
    lines = [line for line in [*lines, last if ended else b""] if line and not line.isspace()]
    if any(_is_object(line) for line in lines[:_LINES_LOOKED_AT]):
        return True
    return False if ended or len(lines) >= _LINES_LOOKED_AT else None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


@dataclass(frozen=True, slots=True)
class JsonLines(Unparsed):
    """Whole lines of a file with one object a line."""

    field: str = "text"

    def documents(self) -> Iterator[Document | BadInput]:
        for number, line in enumerate(self.data.split(b"\n"), start=self.first_line):
            if line and not line.isspace():
                yield from self._documents(line, number)

    def _documents(self, data: bytes, number: int) -> Iterator[Document | BadInput]:
        line = decoded(data, self.name, number)
        if isinstance(line, BadInput):
            yield line
            return
        where = f"{self.name}:{number}"
        try:
            record = EACH_KEY_ONCE.decode(line)
        except (ValueError, RecursionError) as error:
            yield _not_json(where, error, "one JSON object a line")
            return
        yield from documents(record, self.field, where)


@dataclass(frozen=True, slots=True)
class WholeJson(Unparsed):
    """A file with an array of objects, or with one object."""

    field: str = "text"
    is_cut: bool = False
    """The end is missing, which is reported elsewhere."""

    def documents(self) -> Iterator[Document | BadInput]:
        text = decoded(self.data, self.name, first_line=1)
        if isinstance(text, BadInput):
            yield text
            return
        line, counted = 1, 0
        try:
            for record, start, _ in json_values(text, EACH_KEY_ONCE):
                line += text.count("\n", counted, start)
                counted = start
                yield from documents(record, self.field, f"{self.name}:{line}")
        except json.JSONDecodeError as error:
            if not self.is_cut:
                expected = "an array of objects, a single object or one JSON object a line"
                yield _not_json(f"{self.name}:{error.lineno}", error, expected)


def _not_json(where: str, error: Exception, expected: str) -> BadInput:
    place = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
    reason = error.msg.removesuffix(" at") if isinstance(error, json.JSONDecodeError) else error
    return BadInput.at("not JSON", where, f"is not JSON: {reason}{place}", expected)


JSON_LINES = Format(name="jsonl", suffixes=("jsonl", "ndjson"), parts=json_lines_parts)
JSON = Format(name="json", suffixes=("json",), parts=json_parts)
