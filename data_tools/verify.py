"""Read a whole dataset and check everything that its files say about one another.

Opening a dataset checks what is cheap; this checks the rest: the hash of every shard, the length
and the ids of every document, and the totals.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from data_tools.convert import Progress
from dualtrain.data.dataset import DATASET_FILE, LENGTHS_FILE, DatasetInfo, TokenDataset
from dualtrain.errors import UserError

_BLOCK = 1 << 20


def verify_dataset(path: str | Path, *, progress: Progress | None = None) -> DatasetInfo:
    """Check every shard and every document of all splits.

    Args:
        path: Directory of the dataset.
        progress: Called now and then with what is checked.

    Returns:
        The facts of the dataset, now known to be true.

    Raises:
        UserError: The first file found wrong, and how.
    """
    report: Progress = progress or (lambda stage, done, total: None)
    info = DatasetInfo.load(path)
    for split in info.splits:
        dataset = TokenDataset.open(path, split, check=False)
        dataset.check_tokenizer()
        dataset.check_shards()
        for number, shard in enumerate(dataset.shards):
            report(f"hashing {split}", number, len(dataset.shards))
            _check_hash(dataset.directory / shard.name, shard.hashes)
        if (total := int(dataset.lengths.sum())) != dataset.tokens:
            raise UserError(
                str(dataset.directory / LENGTHS_FILE),
                f"adds up to {total:,} tokens",
                f"{dataset.tokens:,} as in {DATASET_FILE}",
            )
        for document in range(dataset.documents):
            if document % 1000 == 0:
                report(f"reading {split}", document, dataset.documents)
            dataset.check_document(document)
    return info


def _check_hash(file: Path, hashes: dict[str, str]) -> None:
    if "sha256" not in hashes:
        raise UserError(str(file), "index.json holds no sha256 of this shard to compare with")
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            found.update(block)
    if found.hexdigest() != hashes["sha256"]:
        raise UserError(
            str(file), "shard is damaged: its content does not match its hash in index.json"
        )
