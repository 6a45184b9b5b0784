"""``.csv`` and ``.tsv`` files: a table in text, the names of its columns in the first row.

Fields may be quoted and then hold line ends, so only parsing finds where a row ends: it is done by
the process that reads, and blocks hold ready texts.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from functools import partial

from data_tools.sources.documents import BadInput, BlockPart, Document, Parsed, Unusable, not_text
from data_tools.sources.fields import no_field
from data_tools.sources.files import Format, ReadingOptions
from dualtrain.common.compression import BrokenFile

_NUL = "\udc00"
"""Stands for a NUL, which Python 3.10's parser refuses; nothing decodes to it."""

csv.field_size_limit(sys.maxsize)  # of all readers in this process: a document may be long


def csv_parts(
    chunks: Iterable[bytes], name: str, options: ReadingOptions, *, delimiter: str
) -> Iterator[BlockPart]:
    """Parts of about a block, of whole rows."""
    field = options.text_field
    # Bytes that are not UTF-8 pass as half surrogates, to cost only the row in which they stand.
    decoded = (line.decode("utf-8", "surrogateescape") for line in _lines(chunks))
    lines = (line.replace("\0", _NUL) for line in decoded)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    ready: list[Document | BadInput] = []
    size = line = 0
    column, columns = -1, 0
    try:
        for row in rows:
            where, line = f"{name}:{line + 1}", rows.line_num
            if not row:
                continue
            if column < 0:
                if bad := _header_problem(row, field, where):
                    raise Unusable(bad)
                column, columns = row.index(field), len(row)
                continue
            item = _document(row, column, columns, where)
            ready.append(item)
            size += len(item.text) if isinstance(item, Document) else 0
            if size >= options.block_bytes:
                yield Parsed(tuple(ready))
                ready, size = [], 0
    except csv.Error as error:
        what = f"cannot be divided into rows and fields from here on: {error}"
        hint = "a field with quotes, delimiters or line ends is quoted, its quotes are doubled"
        ready.append(BadInput.at("damaged file", f"{name}:{line + 1}", what, hint=hint))
    except BrokenFile:
        yield Parsed(tuple(ready))
        raise
    yield Parsed(tuple(ready))


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their ends, which are ``\\n`` only."""
    kept = b""
    for chunk in chunks:
        *whole, kept = (kept + chunk).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if kept:
        yield kept


def _header_problem(row: list[str], field: str, where: str) -> BadInput | None:
    if (problem := _no_text("".join(row), where)) is not None:
        return problem
    if field not in row:
        return no_field(where, field, row, kind="column")
    if row.count(field) > 1:
        what = f"names {row.count(field)} columns '{field}'"
        return BadInput.at("no text field", where, what, "one of this name")
    return None


def _document(row: list[str], column: int, columns: int, where: str) -> Document | BadInput:
    if len(row) != columns:
        what = f"the row has {len(row)} fields"
        hint = "quote fields that hold delimiters or line ends"
        return BadInput.at("ragged row", where, what, f"{columns}, as in the first row", hint)
    return _no_text(row[column], where) or Document(row[column], where)


def _no_text(text: str, where: str) -> BadInput | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if _NUL in text:
            return not_text(where)
        byte = ord(text[error.start]) - 0xDC00
        hint = "convert the file, for example with iconv"
        what = f"byte 0x{byte:02x} is not UTF-8"
        return BadInput.at("not UTF-8", where, what, "text in UTF-8", hint)
    return None


CSV = Format(name="csv", suffixes=("csv",), parts=partial(csv_parts, delimiter=","))
TSV = Format(name="tsv", suffixes=("tsv",), parts=partial(csv_parts, delimiter="\t"))
