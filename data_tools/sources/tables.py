"""Tables with a column of text: ``.parquet`` and ``.arrow`` files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.sources.compression import BrokenFile
from data_tools.sources.documents import Document, Failure, Piece, Problem, Reader
from dualtrain.data.dataset import SourceFile

_PARQUET_MAGIC = b"PAR1"
_ARROW_MAGIC = b"ARROW1"
_ARROW_STREAM_START = 8
_ARROW_CONTINUES = b"\xff\xff\xff\xff"
_TEXT_TYPES = {"string", "large_string", "string_view"}
_MOST_ROWS = 1 << 16


class _NoTextColumn(Exception):
    """The table cannot be used; carries the problem to report."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(str(problem.error))


@dataclass(frozen=True, slots=True)
class Rows(Piece):
    """Texts of consecutive rows, in UTF-8."""

    name: str
    first_row: int
    values: list[bytes | None]
    field: str

    @property
    def content_bytes(self) -> int:
        return sum(len(value) for value in self.values if value is not None)

    def documents(self) -> Iterator[Document | Problem]:
        for number, value in enumerate(self.values, start=self.first_row):
            yield self._document(value, f"{self.name}: row {number}")

    def _document(self, value: bytes | None, where: str) -> Document | Problem:
        if value is None:
            what = f"column '{self.field}' is null"
            return Problem.at("text is not a string", where, what, "a string")
        try:
            return Document(value.decode(), where)
        except UnicodeDecodeError as error:
            what = f"byte 0x{value[error.start]:02x} is not UTF-8"
            return Problem.at("not UTF-8", where, what, "text in UTF-8")


class TableReader(Reader):
    """Reads the column of text of a ``.parquet`` or ``.arrow`` file.

    Only that column is read, a batch of rows at a time: of a Parquet file as many rows as make a
    block, of an Arrow file the batches that it was written in.
    """

    def __init__(self, path: Path, *, kind: str, field: str, block_bytes: int) -> None:
        self.file = SourceFile(path=str(path), bytes=path.stat().st_size)
        self._path = path
        self._is_parquet = kind == "parquet"
        self._field = field
        self._block_bytes = block_bytes

    def pieces(self) -> Iterator[tuple[Piece, int]]:
        name, row = str(self._path), 1
        try:
            for column, share in self._columns():
                used = round(self.file.bytes * share)
                for values in _in_parts(column, self._block_bytes):
                    yield Rows(name, row, values, self._field), used
                    row += len(values)
            return
        except _NoTextColumn as error:
            problem = error.problem
        except BrokenFile as error:
            problem = Problem.at(error.kind, name, error.what, hint=error.hint)
        except OSError as error:
            problem = Problem.at("unreadable file", name, f"cannot be read: {error.strerror}")
        yield Failure(problem), self.file.bytes

    def _columns(self) -> Iterator[tuple[Any, float]]:
        """Arrays of the column, each with the share of the file that is read then.

        Raises:
            BrokenFile: Truncated or damaged, after the arrays before that place.
            OSError: The file cannot be read.
        """
        import pyarrow

        with pyarrow.OSFile(str(self._path), "rb") as handle:
            if not handle.size():
                raise BrokenFile("empty file", "has no content")
            try:
                columns = self._parquet(handle) if self._is_parquet else self._arrow(handle)
                for column, share in columns:
                    yield _as_bytes(column), share
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
        rows = _rows_in(self._block_bytes, table.metadata, self._field)
        read = 0
        for batch in table.iter_batches(batch_size=rows, columns=[self._field], use_threads=False):
            read += batch.num_rows
            yield batch.column(0), read / table.metadata.num_rows

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
        return IpcReadOptions(included_fields=[schema.names.index(self._field)])

    def _check(self, schema: Any) -> None:
        name, field = str(self._path), self._field
        if field not in schema.names:
            columns = ", ".join(f"'{column}'" for column in schema.names) or "none"
            what, expected = f"has no column '{field}'", f"one of its columns: {columns}"
            raise _NoTextColumn(Problem.at("no text field", name, what, expected, "set text_field"))
        held = schema.types[schema.names.index(field)]
        if str(getattr(held, "value_type", held)) not in _TEXT_TYPES:
            what = f"column '{field}' holds {held}"
            raise _NoTextColumn(Problem.at("text is not a string", name, what, "strings"))


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
        size += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field)
    return min(_MOST_ROWS, max(1, block_bytes * metadata.num_rows // max(1, size)))


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


def _in_parts(column: Any, block_bytes: int) -> Iterator[list[bytes | None]]:
    """The values of an array in lists of about `block_bytes`."""
    parts = max(1, math.ceil(column.nbytes / block_bytes))
    rows = max(1, math.ceil(len(column) / parts))
    for start in range(0, len(column), rows):
        yield column.slice(start, rows).to_pylist()
