"""Shards in the MDS format of ``streaming`` that hold text, read without that library.

Not what ``data convert`` makes, which holds tokens: what others have prepared for it, or for LLM
Foundry. ``index.json`` beside the shards says which they are and which columns they have.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.sources.cutting import gather
from data_tools.sources.documents import BadInput, BlockPart, CorpusFile, Reader, Unusable
from data_tools.sources.fields import no_field
from data_tools.sources.files import ReadingOptions
from data_tools.sources.tables import Rows
from dualtrain.common.compression import BrokenFile, Content
from dualtrain.common.errors import UserError
from dualtrain.common.files import in_utf8
from dualtrain.data.dataset import INDEX_FILE

_COMPRESSIONS = {"zstd": "zstandard", "gz": "gzip", "bz2": "bzip2"}
_TEXT_ENCODINGS = {"str", "bytes"}


def mds_shards(directory: Path) -> list[dict[str, Any]] | None:
    """The shards of an ``index.json`` in their order; None if the directory has no such file."""
    file = directory / INDEX_FILE
    if not file.is_file():
        return None
    try:
        index = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(in_utf8(file), f"cannot be read: {error.strerror}") from None
    except ValueError:
        return None  # a file of this name may be anything
    shards = index.get("shards") if isinstance(index, dict) else None
    if not isinstance(shards, list):
        return None
    if not all(isinstance(shard, dict) and shard.get("format") == "mds" for shard in shards):
        return None
    return shards


class MdsReader(Reader):
    """Reads one column of text of a shard, which is held in memory.

    Args:
        shard: Its entry in ``index.json``.

    Raises:
        UserError: The shard is not there, or its entry is not as ``streaming`` writes it.
    """

    def __init__(self, directory: Path, shard: dict[str, Any], options: ReadingOptions) -> None:
        try:
            raw, packed = shard["raw_data"], shard["zip_data"]
            path = directory / raw["basename"]
            self._compression = None
            if packed and not path.is_file():
                path = directory / packed["basename"]
                self._compression = shard["compression"].partition(":")[0]
            self._names = list(shard["column_names"])
            self._encodings = list(shard["column_encodings"])
            self._sizes = list(shard["column_sizes"])
        except (KeyError, TypeError, AttributeError) as error:
            file = in_utf8(directory / INDEX_FILE)
            raise UserError(file, f"is not an MDS index: {error!r}") from None
        try:
            self.file = CorpusFile(str(path), path.stat().st_size)
        except OSError as error:
            raise UserError(in_utf8(path), f"cannot be read: {error.strerror}") from None
        self._path = path
        self._field = options.text_field
        self._block_bytes = options.block_bytes

    def _read(self) -> Iterator[tuple[BlockPart, int]]:
        self._check_column()
        try:
            yield from self._parts(self._content())
        except (struct.error, IndexError):
            raise BrokenFile("damaged file", "is not the MDS shard of its index") from None

    def _check_column(self) -> None:
        name, field = self.file.name, self._field
        if field not in self._names:
            raise Unusable(no_field(name, field, self._names, kind="column"))
        encoding = self._encodings[self._names.index(field)]
        if encoding not in _TEXT_ENCODINGS:
            what = f"column '{field}' holds {encoding}"
            raise Unusable(BadInput.at("text is not a string", name, what, "str or bytes"))
        if self._compression is not None and self._compression not in _COMPRESSIONS:
            what, known = f"is compressed with {self._compression}", ", ".join(_COMPRESSIONS)
            raise Unusable(BadInput.at("unreadable file", name, what, known, "decompress it"))

    def _content(self) -> bytes:
        compression = _COMPRESSIONS[self._compression] if self._compression else None
        data = bytearray()
        with self._path.open("rb") as raw:
            gather(Content(raw, compression), data, instead="write smaller shards")
        return bytes(data)

    def _parts(self, data: bytes) -> Iterator[tuple[BlockPart, int]]:
        """A shard is a count, where each sample begins and ends, the columns, and the samples."""
        (count,) = struct.unpack_from("<I", data)
        ends = struct.unpack_from(f"<{count + 1}I", data, 4)
        if ends[-1] != len(data):
            raise BrokenFile("truncated file", f"has {len(data):,} bytes and not {ends[-1]:,}")
        values: list[bytes | None] = []
        size, first = 0, 1
        for row in range(count):
            value = self._value(data[ends[row] : ends[row + 1]])
            values.append(value)
            size += len(value)
            if size >= self._block_bytes or row == count - 1:
                rows = range(first, row + 2)
                share = ends[row + 1] / len(data)
                yield (
                    Rows(self.file.name, rows, values, self._field),
                    round(self.file.bytes * share),
                )
                values, size, first = [], 0, row + 2

    def _value(self, sample: bytes) -> bytes:
        """One column: the sizes of those whose size is not fixed come first, then all of them."""
        variable = [number for number, size in enumerate(self._sizes) if not size]
        sizes = list(self._sizes)
        found = struct.unpack_from(f"<{len(variable)}I", sample)
        for number, size in zip(variable, found, strict=True):
            sizes[number] = size
        wanted = self._names.index(self._field)
        start = 4 * len(variable) + sum(sizes[:wanted])
        end = start + sizes[wanted]
        if end > len(sample):
            raise IndexError
        return sample[start:end]
