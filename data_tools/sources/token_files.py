"""Files of token ids, one after another: nanoGPT's, modded-nanogpt's and llm.c's, and ``.npy``.

Their suffixes are those of many other things, so that only ``--format tokens`` has them read. An
id, ``--separator``, stands between documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import chain

import numpy as np

from data_tools.sources.cutting import Ends, cut
from data_tools.sources.documents import BadInput, BlockPart, Document, Unparsed, Unusable
from data_tools.sources.files import Format, ReadingOptions
from dualtrain.common.errors import UserError

_HEADER_INTS = 256
_HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""By the number that they begin with: version, and type of the ids; as llm.c writes them."""
_NPY = b"\x93NUMPY"
_HEAD_BYTES = 1 << 16
_SUSPICIOUS = 64
"""Ids, of which every other one is 0: those of a tokenizer with more than 16 bits."""


@dataclass(frozen=True)
class _Layout:
    """How ids stand in a file."""

    dtype: np.dtype
    header_bytes: int
    count: int | None
    """Of all ids, where the header says it."""


@dataclass(frozen=True, slots=True)
class Ids(Unparsed):
    """Ids of whole documents; the file's `first` ones stand before them."""

    dtype: str = "<u2"
    separator: int = 0
    first: int = 0

    def documents(self) -> Iterator[Document | BadInput]:
        ids = np.frombuffer(self.data, dtype=self.dtype)
        for start, document in divided(ids, self.separator):
            where = f"{self.name}: from token {self.first + start + 1:,} on"
            yield Document("", where, document)


def divided(ids: np.ndarray, separator: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """What stands between separators and is not empty, each with the place of its first id."""
    ends = [] if separator is None else np.flatnonzero(ids == separator).tolist()
    start = 0
    for end in [*ends, len(ids)]:
        if end > start:
            yield start, ids[start:end]
        start = end + 1


def token_parts(chunks: Iterator[bytes], name: str, options: ReadingOptions) -> Iterator[BlockPart]:
    """Parts of about a block."""
    head = bytearray()
    for chunk in chunks:
        head += chunk
        if len(head) >= _HEAD_BYTES:
            break
    layout = _layout(bytes(head), name)
    separator = separator_id(options)
    rest = chain([bytes(head[layout.header_bytes :])], chunks)
    size, count = layout.dtype.itemsize, 0
    for data in cut(rest, _ends(layout.dtype, separator, options), options.block_bytes):
        if len(data) % size:
            at = f"{layout.header_bytes + count * size + len(data):,}"
            raise _unusable(name, f"has {at} bytes, which are not whole ids of {size}", "all of it")
        yield Ids(name, data, dtype=layout.dtype.str, separator=separator, first=count)
        count += len(data) // size
    if layout.count not in (None, count):
        what = f"has {count:,} tokens, and its header says {layout.count:,}"
        raise _unusable(name, what, "as many as the header says")


def separator_id(options: ReadingOptions) -> int:
    """The id between documents.

    Raises:
        UserError: The option is not given, or is none.
    """
    text = options.separator.text
    if text is not None and text.isascii() and text.isdecimal():
        return int(text)
    raise UserError(
        "--separator",
        f"{text!r} is no token id" if text else "is not given",
        "the id that stands between the documents of files of tokens",
        "50256 is that of GPT-2's <|endoftext|>",
    )


def _ends(dtype: np.dtype, separator: int, options: ReadingOptions) -> Ends:
    """Documents end with an id."""

    def ends(buffer: bytearray, seen: int) -> tuple[int, int]:
        whole = len(buffer) - len(buffer) % dtype.itemsize
        # A copy: a bytearray that something looks into cannot grow.
        ids = np.frombuffer(bytes(buffer[seen:whole]), dtype=dtype)
        found = np.flatnonzero(ids == separator)
        if not len(found):
            return 0, whole
        options.separator.is_found = True
        return seen + (int(found[-1]) + 1) * dtype.itemsize, whole

    return ends


def _layout(head: bytes, name: str) -> _Layout:
    """How ids stand in a file that begins so.

    Raises:
        Unusable: It is not a file of ids.
    """
    if head.startswith(_NPY):
        return _npy_layout(head, name)
    if len(head) >= 4 * _HEADER_INTS:
        magic, version, count = np.frombuffer(head, dtype="<i4", count=3).tolist()
        if magic in _HEADERS:
            expected, dtype = _HEADERS[magic]
            if version != expected:
                what = f"has a header of version {version}"
                raise _unusable(name, what, f"version {expected}, as {magic} begins")
            return _Layout(np.dtype(dtype), 4 * _HEADER_INTS, count)
    ids = np.frombuffer(head[: len(head) // 2 * 2], dtype="<u2")
    if len(ids) >= _SUSPICIOUS and not ids[1::2].any():
        raise _unusable(
            name,
            "looks like ids of 32 bits: every other one of 16 is 0",
            "ids of 16 bits, or a header",
            "save them as .npy, which says how large they are",
        )
    return _Layout(np.dtype("<u2"), 0, None)


def _npy_layout(head: bytes, name: str) -> _Layout:
    stream = BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read: dict[tuple[int, int], Callable] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = read[version](stream)
    except (ValueError, KeyError) as error:
        raise _unusable(name, f"has a damaged header: {error}", "a .npy file") from None
    if len(shape) != 1 or dtype.kind not in "iu":
        raise _unusable(
            name,
            f"holds an array of {dtype} of the shape {shape}",
            "one row of whole numbers",
            "np.save(FILE, ids.reshape(-1)), if an id stands between documents",
        )
    return _Layout(dtype, stream.tell(), shape[0])


def _unusable(name: str, what: str, expected: str, hint: str = "") -> Unusable:
    return Unusable(BadInput.at("damaged file", name, what, expected, hint))


TOKENS = Format(name="tokens", suffixes=(), parts=token_parts, has_fields=False)
