"""Tables with a column of text, or of lists of token ids: ``.parquet`` and ``.arrow`` files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from data_tools.sources.documents import (
    BadInput,
    BlockPart,
    CorpusFile,
    Document,
    Reader,
    Unusable,
)
from data_tools.sources.fields import EACH, ITEMS, no_field, steps
from data_tools.sources.files import Format, ReadingOptions
from data_tools.sources.token_files import divided, separator_id
from dualtrain.common.compression import BrokenFile

_PARQUET_MAGIC = b"PAR1"
_ARROW_MAGIC = b"ARROW1"
_ARROW_STREAM_START = 8
_ARROW_CONTINUES = b"\xff\xff\xff\xff"
_TEXT_TYPES = {
    f"{size}{kind}{view}"
    for kind in ("string", "binary")
    for size, view in (("", ""), ("large_", ""), ("", "_view"))
}
_MOST_ROWS = 1 << 16


_ID = np.dtype("<i8")
"""In which lists of ids become bytes, for the time in which they are read."""


@dataclass(frozen=True, slots=True)
class Rows(BlockPart):
    """Texts of consecutive rows, in UTF-8; or lists of ids."""

    name: str
    rows: Sequence[int]
    """The number of each value's row, from 1 on."""
    values: list[bytes | None]
    field: str
    holds_ids: bool = False
    separator: int | None = None
    """Of ids: what divides a row into several documents."""

    @property
    def content_bytes(self) -> int:
        return sum(len(value) for value in self.values if value is not None)

    def documents(self) -> Iterator[Document | BadInput]:
        for row, value in zip(self.rows, self.values, strict=True):
            where = f"{self.name}: row {row}"
            if self.holds_ids and value is not None:
                for _, ids in divided(np.frombuffer(value, _ID), self.separator):
                    yield Document("", where, ids)
            else:
                yield self._document(value, where)

    def _document(self, value: bytes | None, where: str) -> Document | BadInput:
        if value is None:
            what = f"column '{self.field}' is null"
            expected = "a list of ids" if self.holds_ids else "a string"
            return BadInput.at("text is not a string", where, what, expected)
        try:
            return Document(value.decode(), where)
        except UnicodeDecodeError as error:
            what = f"byte 0x{value[error.start]:02x} is not UTF-8"
            return BadInput.at("not UTF-8", where, what, "text in UTF-8")


class TableReader(Reader):
    """Reads the column of text of a ``.parquet`` or ``.arrow`` file.

    Only that column is read, a batch of rows at a time: of a Parquet file as many rows as make a
    block, of an Arrow file the batches that it was written in.
    """

    def __init__(self, file: CorpusFile, options: ReadingOptions, *, is_parquet: bool) -> None:
        self.file = file
        self._is_parquet = is_parquet
        self._field = options.text_field
        self._steps: list[str] = []
        self._options = options
        self._holds_ids = False

    def _read(self) -> Iterator[tuple[BlockPart, int]]:
        before, separator = 1, None
        for found, share in self._columns():
            used = round(self.file.bytes * share)
            if self._holds_ids and self._options.separator.text is not None:
                separator = separator_id(self._options)
            for start, values in _in_parts(found.values, self._options.block_bytes):
                end = start + len(values)
                rows: Sequence[int] = range(before + start, before + end)
                if found.parents is not None:
                    rows = [before + row for row in found.parents[start:end].to_pylist()]
                ids = {"holds_ids": self._holds_ids, "separator": separator}
                yield Rows(self.file.name, rows, values, self._field, **ids), used
            before += found.rows

    def _columns(self) -> Iterator[tuple[_Texts, float]]:
        """Texts of the column, each time with the share of the file that is read then.

        Raises:
            BrokenFile: Truncated or damaged, after the arrays before that place.
            OSError: The file cannot be read.
        """
        import pyarrow

        with pyarrow.OSFile(self.file.path, "rb") as handle:
            if not handle.size():
                raise BrokenFile("empty file", "has no content")
            try:
                columns = self._parquet(handle) if self._is_parquet else self._arrow(handle)
                for column, share in columns:
                    yield _texts(column, self._steps[1:], self._convert), share
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                # A ValueError is a damaged name that pyarrow fails to decode.
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                # Some of these messages go on for many lines.
                reason = str(error).partition("\n")[0]
                kind = "Parquet" if self._is_parquet else "Arrow"
                raise BrokenFile("damaged file", f"is not {kind}: {reason}") from None

    def _parquet(self, handle: Any) -> Iterator[tuple[Any, float]]:
        from pyarrow.parquet import ParquetFile

        if _starts_but_does_not_end(handle, _PARQUET_MAGIC):
            what = "has lost its end, without which nothing can be read"
            raise BrokenFile("truncated file", what)
        table = ParquetFile(
            handle, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
        self._check(table.schema_arrow)
        name = self._steps[0]
        rows = _rows_in(self._options.block_bytes, table.metadata, name)
        read = 0
        for batch in table.iter_batches(batch_size=rows, columns=[name], use_threads=False):
            read += batch.num_rows
            yield batch.column(name), read / table.metadata.num_rows

    def _arrow(self, handle: Any) -> Iterator[tuple[Any, float]]:
        import pyarrow

        start = _start(handle, len(_ARROW_MAGIC))
        if start != _ARROW_MAGIC:
            yield from self._arrow_stream(handle, 0)
            return
        if _starts_but_does_not_end(handle, _ARROW_MAGIC):
            # Behind its magic a file is a stream, of which the beginning can still be read.
            yield from self._arrow_stream(handle, _ARROW_STREAM_START)
            raise BrokenFile("truncated file", "has lost its end")
        only = self._only_text(pyarrow.ipc.open_file(handle).schema)
        reader = pyarrow.ipc.open_file(handle, options=only)
        for index in range(reader.num_record_batches):
            column = reader.get_batch(index).column(0)
            yield column, (index + 1) / reader.num_record_batches

    def _arrow_stream(self, handle: Any, start: int) -> Iterator[tuple[Any, float]]:
        import pyarrow

        is_stream = start or _start(handle, 4) == _ARROW_CONTINUES
        try:
            handle.seek(start)
            only = self._only_text(pyarrow.ipc.open_stream(handle).schema)
            handle.seek(start)
            for batch in pyarrow.ipc.open_stream(handle, options=only):
                yield batch.column(0), handle.tell() / handle.size()
        except (pyarrow.ArrowException, OSError):
            if not is_stream or handle.tell() < handle.size():
                raise
            raise BrokenFile("truncated file", "ends in the middle of its Arrow data") from None

    def _only_text(self, schema: Any) -> Any:
        """Options to read the column of text only."""
        from pyarrow.ipc import IpcReadOptions

        self._check(schema)
        return IpcReadOptions(included_fields=[schema.names.index(self._steps[0])])

    def _check(self, schema: Any) -> None:
        from pyarrow.types import is_dictionary, is_integer

        name, field = self.file.name, self._field
        self._steps = steps(field, schema.names)
        path, held = "", schema
        children = {column.name: column.type for column in schema}
        for step in self._steps:
            if step not in children:
                names = [_joined(path, other) for other in children]
                raise Unusable(no_field(name, field, names, kind="column"))
            held, path = children[step], _joined(path, step)
            children = _children(held)
        text = held.value_type if is_dictionary(held) else held
        self._holds_ids = is_integer(_children(held).get(ITEMS, held)) and not is_integer(held)
        if str(text) not in _TEXT_TYPES and not self._holds_ids:
            strings = str(children.get(ITEMS)) in _TEXT_TYPES
            hint = EACH.format(field + ITEMS) if strings else ""
            what = f"column '{field}' holds {held}"
            raise Unusable(BadInput.at("text is not a string", name, what, "strings", hint))

    def _convert(self, column: Any) -> Any:
        """What a column holds as bytes."""
        if not self._holds_ids:
            return _as_bytes(column)
        separator = self._options.separator
        id_ = None if separator.text is None else separator_id(self._options)
        rows, is_found = _ids_as_bytes(column, id_)
        separator.is_found = separator.is_found or is_found
        return rows


def _children(held: Any) -> dict[str, Any]:
    """What a field of this type can be followed to."""
    from pyarrow import types

    if types.is_struct(held):
        return {child.name: child.type for child in held}
    if types.is_list(held) or types.is_large_list(held) or types.is_fixed_size_list(held):
        return {ITEMS: held.value_type}
    return {}


def _joined(path: str, step: str) -> str:
    return path + step if step == ITEMS else f"{path}.{step}".removeprefix(".")


def _start(handle: Any, length: int) -> bytes:
    handle.seek(0)
    return handle.read(length)


def _starts_but_does_not_end(handle: Any, magic: bytes) -> bool:
    start = _start(handle, len(magic))
    handle.seek(max(0, handle.size() - len(magic)))
    return start == magic != handle.read(len(magic))


def _rows_in(block_bytes: int, metadata: Any, field: str) -> int:
    """Rows of a Parquet file that make about one block."""
    size = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(number) for number in range(group.num_columns))
        size += sum(
            c.total_uncompressed_size
            for c in columns
            if f"{c.path_in_schema}.".startswith(f"{field}.")
        )
    return min(_MOST_ROWS, max(1, block_bytes * metadata.num_rows // max(1, size)))


@dataclass(frozen=True, slots=True)
class _Texts:
    """What a batch of rows holds."""

    values: Any
    """Array of bytes."""
    parents: Any | None
    """Array: the row in the batch that each value is of; None if they are the rows."""
    rows: int


def _texts(column: Any, left: list[str], convert: Callable[[Any], Any]) -> _Texts:
    """Follow the steps from a column to its texts, and convert them."""
    import pyarrow.compute

    compute: Any = pyarrow.compute  # its functions are made when it is imported
    rows, parents = len(column), None
    for step in left:
        column.validate(full=True)
        if step == ITEMS:
            of_items = compute.list_parent_indices(column)
            parents = of_items if parents is None else parents.take(of_items)
            column = compute.list_flatten(column)
        else:
            column = compute.struct_field(column, [step])
    return _Texts(convert(column), parents, rows)


def _as_bytes(column: Any) -> Any:
    """A column of text in UTF-8 that is not decoded yet: a bad value is to cost only itself.

    Raises:
        ArrowInvalid: The array is damaged; without these checks that may end the process.
    """
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    column.validate()
    column = column.cast(pyarrow.large_binary())
    column.validate(full=True)
    return column


def _ids_as_bytes(column: Any, separator: int | None) -> tuple[Any, bool]:
    """Lists of ids as arrays of bytes; and whether the separator is among them.

    Raises:
        ArrowInvalid: The array is damaged.
    """
    import pyarrow

    column.validate(full=True)
    lists = column.cast(pyarrow.large_list(pyarrow.int64()))
    # No id is negative: where one is missing, it is refused with its row.
    ids = lists.flatten().fill_null(-1).to_numpy(zero_copy_only=False).astype(_ID, copy=False)
    lengths = [-1 if n is None else n for n in lists.value_lengths().to_pylist()]
    rows, start = [], 0
    for length in lengths:
        rows.append(None if length < 0 else ids[start : start + length].tobytes())
        start += max(0, length)
    is_found = separator is not None and bool((ids == separator).any())
    return pyarrow.array(rows, pyarrow.large_binary()), is_found


def _in_parts(column: Any, block_bytes: int) -> Iterator[tuple[int, list[bytes | None]]]:
    """The values of an array in lists of about `block_bytes`, each with the number of its first."""
    parts = max(1, math.ceil(column.nbytes / block_bytes))
    rows = max(1, math.ceil(len(column) / parts))
    for start in range(0, len(column), rows):
        yield start, column.slice(start, rows).to_pylist()


PARQUET = Format(
    name="parquet", suffixes=("parquet",), reader=partial(TableReader, is_parquet=True)
)
ARROW = Format(name="arrow", suffixes=("arrow",), reader=partial(TableReader, is_parquet=False))
