"""Read a whole dataset and check everything that its files say about one another.

Opening a dataset checks what is cheap; this checks the rest: the hash of every shard, the length
and the ids of every document, and the totals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from data_tools.reporting import Report, StageProgress
from data_tools.shards import load_text_bytes
from dualtrain.common.errors import UserError, raise_together
from dualtrain.common.files import file_hash, user_path
from dualtrain.data.dataset import (
    DATASET_FILE,
    LENGTHS_FILE,
    TEXT_BYTES_FILE,
    DatasetInfo,
    Shard,
    Split,
    TokenDataset,
)

_SHOWN = 20


def verify_dataset(path: str | Path, *, report: Report | None = None) -> DatasetInfo:
    """Check every shard and every document of all splits.

    Returns:
        The facts of the dataset, now known to be true.

    Raises:
        UserError: Everything found wrong, by file; of a shard with wrong documents the first.
    """
    report = report or Report()
    info = DatasetInfo.load(path)
    found: list[UserError] = []
    for split in info.splits:
        found += _split_errors(user_path(path), split, info, report)
    if len(found) > _SHOWN:
        found = [*found[:_SHOWN], UserError(str(path), f"{len(found) - _SHOWN} more errors")]
    raise_together(found)
    return info


def _split_errors(path: Path, split: Split, info: DatasetInfo, report: Report) -> list[UserError]:
    try:
        dataset = TokenDataset(path, split, info)
    except UserError as error:
        return [error]
    errors = [*_caught(dataset.check_tokenizer), *_total_errors(dataset)]
    first = 0
    for number, shard in enumerate(dataset.shards):
        report.show(StageProgress(f"checking {split}", number, len(dataset.shards), "shards"))
        if error := dataset.shard_error(shard) or _hash_error(dataset, shard):
            errors.append(error)
        else:
            errors += _document_errors(dataset, first, first + shard.documents)
        first += shard.documents
    return errors


def _caught(check: Callable[[], object]) -> list[UserError]:
    try:
        check()
    except UserError as error:
        return [error]
    return []


def _total_errors(dataset: TokenDataset) -> Iterator[UserError]:
    if (total := int(dataset.lengths.sum())) != dataset.tokens:
        yield UserError(
            str(dataset.directory / LENGTHS_FILE),
            f"adds up to {total:,} tokens",
            f"{dataset.tokens:,} as in {DATASET_FILE}",
        )
    if (dataset.directory / TEXT_BYTES_FILE).exists():  # older datasets have none
        yield from _caught(lambda: load_text_bytes(dataset))


def _document_errors(dataset: TokenDataset, first: int, end: int) -> list[UserError]:
    """The first wrong document among those numbers."""
    return _caught(lambda: [dataset.check_document(number) for number in range(first, end)])


def _hash_error(dataset: TokenDataset, shard: Shard) -> UserError | None:
    file = str(dataset.directory / shard.name)
    if "sha256" not in shard.hashes:
        return UserError(file, "index.json holds no sha256 of this shard to compare with")
    try:
        is_same = file_hash(file) == shard.hashes["sha256"]
    except OSError as error:
        return UserError(file, f"cannot be read: {error.strerror}")
    what = "shard is damaged: its content does not match its hash in index.json"
    return None if is_same else UserError(file, what)
