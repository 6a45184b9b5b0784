"""Write a dataset, and read it back before it counts."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.reporting import Report, StageProgress
from data_tools.tokenizers.tokenizer import Tokenizer
from dualtrain.common.errors import UserError
from dualtrain.data.dataset import (
    DATASET_FILE,
    LENGTHS_FILE,
    NOT_AN_ARRAY,
    TEXT_BYTES_FILE,
    TOKENIZER_FILE,
    TOKENS_FIELD,
    DatasetInfo,
    Split,
    SplitInfo,
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


@dataclass(frozen=True)
class SplitDocuments:
    """What a split is made of.

    Attributes:
        order: (documents,) numbers of its documents, in their order on disk.
        lengths: (all documents,) tokens of each.
        text_bytes: (all documents,) bytes of the text of each.
        read: The tokens of documents, by their numbers.
        text_words: (all documents,) words of the text of each; None: not known.
    """

    order: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    read: Callable[[np.ndarray], Iterable[np.ndarray]]
    text_words: np.ndarray | None = None

    @property
    def facts(self) -> SplitInfo:
        return SplitInfo(
            documents=len(self.order),
            tokens=int(self.lengths[self.order].sum()),
            bytes=int(self.text_bytes[self.order].sum()),
            words=None if self.text_words is None else int(self.text_words[self.order].sum()),
        )


def write_dataset(
    directory: Path,
    info: DatasetInfo,
    tokenizer: Tokenizer,
    splits: Mapping[Split, SplitDocuments],
    *,
    report: Report,
    shard_bytes: int,
) -> None:
    """Write a dataset into an empty directory, read it back, and declare it whole.

    Raises:
        UserError: Something reads back differently.
    """
    tokenizer.save(directory / TOKENIZER_FILE)
    for split, documents in splits.items():
        write_split(directory, split, info, documents, report, shard_bytes)
        _check_split(directory, split, info, documents)
    (directory / DATASET_FILE).write_text(info.model_dump_json(indent=2) + "\n")


def write_split(
    directory: Path,
    split: Split,
    info: DatasetInfo,
    documents: SplitDocuments,
    report: Report,
    shard_bytes: int,
) -> None:
    """Write ``directory/split``: shards, ``index.json``, ``lengths.npy``, ``text_bytes.npy``."""
    from dualtrain.data.mds import MDSWriter

    # Not as a context manager: that would write an index over whatever is there on an error.
    writer = MDSWriter(
        columns={TOKENS_FIELD: f"ndarray:{info.dtype}"},
        out=str(directory / split),
        hashes=["sha256"],
        size_limit=shard_bytes,
    )
    order = documents.order
    for number, tokens in enumerate(documents.read(order)):
        writer.write({TOKENS_FIELD: tokens})
        if number % _SHOWN_EVERY == 0:
            report.show(StageProgress(f"writing {split}", number, len(order), "documents"))
    writer.finish()
    _save(directory / split / LENGTHS_FILE, documents.lengths[order].astype(np.int64))
    _save(directory / split / TEXT_BYTES_FILE, documents.text_bytes[order].astype(np.int64))


def _check_split(
    directory: Path, split: Split, info: DatasetInfo, documents: SplitDocuments
) -> None:
    """Check every shard's size, and a hundred documents that are spread over the split."""
    dataset = TokenDataset(directory, split, info)
    dataset.check_shards()
    dataset.check_documents()
    order = documents.order
    picked = np.unique(np.linspace(0, len(order) - 1, _PICKED).astype(np.int64))
    for number, tokens in zip(picked.tolist(), documents.read(order[picked]), strict=True):
        if not np.array_equal(dataset.read(number), tokens):
            raise UserError(
                str(dataset.shard_of(number)),
                f"document {number} reads back differently from what was written",
                hint="check the disk",
            )


def _save(file: Path, numbers: np.ndarray) -> None:
    """As ``np.save``, whose error on a full disk says neither what nor where."""
    header = np.lib.format.header_data_from_array_1_0(numbers)
    with file.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(np.ascontiguousarray(numbers).data)


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
