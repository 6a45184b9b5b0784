"""Write one split of a dataset, and read it back before it counts."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_tools.reporting import Report, StageProgress
from dualtrain.common.errors import UserError
from dualtrain.data.dataset import (
    DATASET_FILE,
    LENGTHS_FILE,
    NOT_AN_ARRAY,
    TEXT_BYTES_FILE,
    TOKENS_FIELD,
    DatasetInfo,
    Split,
    TokenDataset,
)

SHARD_BYTES = 1 << 26
_PICKED = 100
_SHOWN_EVERY = 1000


def import_ahead(module: str) -> None:
    """Import a module in the background: ``streaming`` brings torch and transformers, seconds."""

    def work() -> None:
        # Whoever imports it next meets the same error, and reports it.
        with contextlib.suppress(Exception):
            importlib.import_module(module)

    # Not a daemon: a process that ends in the middle of torch's initialisation aborts.
    threading.Thread(target=work, name=f"import-{module}").start()


def write_split(
    directory: Path,
    split: Split,
    documents: Iterable[np.ndarray],
    lengths: np.ndarray,
    text_bytes: np.ndarray,
    *,
    dtype: str,
    report: Report,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``directory/split``: shards, ``index.json``, ``lengths.npy``, ``text_bytes.npy``.

    Args:
        documents: Each (tokens,) of `dtype`, in order.
        lengths: (documents,) int64, tokens of each.
        text_bytes: (documents,) int64, bytes of the text of each.
        dtype: ``uint16`` or ``uint32``.
    """
    from dualtrain.data.mds import MDSWriter

    # Not as a context manager: that would write an index over whatever is there on an error.
    writer = MDSWriter(
        columns={TOKENS_FIELD: f"ndarray:{dtype}"},
        out=str(directory / split),
        hashes=["sha256"],
        size_limit=shard_bytes,
    )
    for number, tokens in enumerate(documents):
        writer.write({TOKENS_FIELD: tokens})
        if number % _SHOWN_EVERY == 0:
            report.show(StageProgress(f"writing {split}", number, len(lengths), "documents"))
    writer.finish()
    _save(directory / split / LENGTHS_FILE, lengths)
    _save(directory / split / TEXT_BYTES_FILE, text_bytes)


def _save(file: Path, numbers: np.ndarray) -> None:
    """As ``np.save``, whose error on a full disk says neither what nor where."""
    header = np.lib.format.header_data_from_array_1_0(numbers)
    with file.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(np.ascontiguousarray(numbers).data)


def check_split(
    directory: Path, split: Split, info: DatasetInfo, read: Iterable[tuple[int, np.ndarray]]
) -> None:
    """Check what was written: every shard's size, and some documents against their tokens.

    Args:
        info: Its facts; the file need not be there yet.
        read: Documents to compare: (number in the split, tokens).

    Raises:
        UserError: Something reads back differently.
    """
    dataset = TokenDataset(directory, split, info)
    dataset.check_shards()
    dataset.check_documents()
    for document, tokens in read:
        if not np.array_equal(dataset.read(document), tokens):
            raise UserError(
                str(dataset.shard_of(document)),
                f"document {document} reads back differently from what was written",
                hint="check the disk",
            )


def picked_documents(count: int) -> np.ndarray:
    """Numbers of at most a hundred documents spread over a split, to be read back."""
    return np.unique(np.linspace(0, count - 1, _PICKED).astype(np.int64))


def load_text_bytes(dataset: TokenDataset) -> np.ndarray:
    """The bytes of each document's text, (documents,) int64.

    Raises:
        UserError: The file is missing or damaged, or does not add up to the split's bytes.
    """
    file = dataset.directory / TEXT_BYTES_FILE
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, *NOT_AN_ARRAY) as error:
        raise UserError(
            str(file), f"cannot be read: {error}", hint="make the dataset again with data convert"
        ) from None
    if found.shape != (dataset.documents,) or int(found.sum()) != dataset.facts.bytes:
        raise UserError(
            str(file),
            f"holds {found.size:,} numbers that add up to {int(found.sum()):,}",
            f"{dataset.documents:,} that add up to {dataset.facts.bytes:,} as in {DATASET_FILE}",
            "make the dataset again with data convert",
        )
    return found
