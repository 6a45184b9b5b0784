"""Bytes of a file as they were before compression: gzip, zstandard, xz, bzip2, or as they stand.

The file objects of the standard library and of zstandard are not used, because they pass over what
must not be lost silently: zstandard's reader takes a truncated frame for the end of the file, and
those for xz and bzip2 drop everything behind the first stream that is not another whole one.
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Protocol

SUFFIXES = {".gz": "gzip", ".zst": "zstandard", ".xz": "xz", ".bz2": "bzip2"}

_MAGIC = {
    re.compile(rb"\x1f\x8b"): "gzip",
    re.compile(rb"\x28\xb5\x2f\xfd"): "zstandard",
    re.compile(rb"\xfd7zXZ\x00"): "xz",
    # Of a block, or of a file without one: three letters might begin a text.
    re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"): "bzip2",
}
_PADDED = {"gzip", "xz"}
"""Formats in which zeros may follow a stream, from tapes and block devices."""

_COMPRESSED_CHUNK = 1 << 15  # small: a chunk of something very regular grows a thousandfold
_BOM = b"\xef\xbb\xbf"
_LONGEST_MAGIC = 10


class BrokenFile(Exception):
    """The content ends early; what came before it is good.

    Args:
        kind: Of the problem: ``truncated file``, ``damaged file``.
    """

    def __init__(self, kind: str, what: str, hint: str = "") -> None:
        self.kind, self.what, self.hint = kind, what, hint
        super().__init__(what)


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class Content:
    """The content of an open file, in chunks, without a byte order mark.

    Args:
        raw: The file, open for reading bytes.
        compression: Name of the format, None for as it stands, ``detect`` to go by the first bytes.
        chunk_bytes: Size of a chunk, and at most what is read from the file at once.
    """

    def __init__(
        self, raw: IO[bytes], compression: str | None, *, chunk_bytes: int = 1 << 20
    ) -> None:
        self._raw = raw
        self._compression = compression
        self._chunk_bytes = chunk_bytes
        self.position = 0
        """Bytes of the file, as it stands, that have been read."""

    def __iter__(self) -> Iterator[bytes]:
        """Yield the chunks, none of them empty.

        Raises:
            BrokenFile: Truncated or damaged, after all that could be decompressed.
            OSError: The file cannot be read.
        """
        head = b""
        for chunk in self._plain():
            if len(head) < len(_BOM):
                head += chunk
                if len(head) < len(_BOM):
                    continue
                chunk = head.removeprefix(_BOM)
            if chunk:
                yield chunk
        if 0 < len(head) < len(_BOM):
            yield head

    def _plain(self) -> Iterator[bytes]:
        first = b""
        if self._compression == "detect":
            first = self._read(_LONGEST_MAGIC)
            matches = (name for magic, name in _MAGIC.items() if magic.match(first))
            self._compression = next(matches, None)
        if self._compression is None:
            while chunk := first + self._read(self._chunk_bytes):
                first = b""
                yield chunk
            return
        for data in self._decompressed(first, self._compression):
            for start in range(0, len(data), self._chunk_bytes):
                yield data[start : start + self._chunk_bytes]

    def _read(self, size: int) -> bytes:
        data = self._raw.read(size)
        self.position += len(data)
        return data

    def _decompressed(self, first: bytes, compression: str) -> Iterator[bytes]:
        start, errors = _decoders(compression)
        padding = b""
        decoder: _Decoder | None = None  # None between two streams
        size = min(_COMPRESSED_CHUNK, self._chunk_bytes)
        while data := first + self._read(size):
            first = b""
            while data:
                if decoder is None:
                    data = data.lstrip(padding) if padding else data
                    if not data:
                        break
                    decoder = start()
                try:
                    yield decoder.decompress(data)
                except errors as error:
                    what = f"cannot be decompressed as {compression}: {error}"
                    raise BrokenFile("damaged file", what) from None
                data = b""
                if decoder.eof:
                    data, decoder = decoder.unused_data, None
                    padding = b"\0" if compression in _PADDED else b""
        if decoder is not None:
            raise BrokenFile("truncated file", f"ends in the middle of its {compression} data")


def _decoders(compression: str) -> tuple[Callable[[], _Decoder], tuple[type[Exception], ...]]:
    """How to start on a stream of this format, and what it raises on damaged data."""
    if compression == "gzip":
        return lambda: zlib.decompressobj(zlib.MAX_WBITS | 16), (zlib.error,)
    if compression == "xz":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), (lzma.LZMAError,)
    if compression == "bzip2":
        return bz2.BZ2Decompressor, (OSError, ValueError)
    import zstandard

    # The largest window there is: files made with `zstd --long` are refused otherwise.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return decompressor.decompressobj, (zstandard.ZstdError,)
