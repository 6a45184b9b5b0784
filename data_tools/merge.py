"""Put several datasets of one tokenizer together into one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_tools.choose import SPLITS, in_order
from data_tools.reporting import Report, StageProgress
from data_tools.shards import SHARD_BYTES, SplitDocuments, load_text_bytes, write_dataset
from data_tools.tokenizers.tokenizer import Tokenizer
from dualtrain.common.errors import UserError
from dualtrain.common.files import absolute, made_whole, reserved, writing
from dualtrain.data.dataset import (
    DATASET_FILE,
    TOKENIZER_FILE,
    DatasetInfo,
    Split,
    TokenDataset,
)

_SHOWN_EVERY = 1000

ELSEWHERE_HELD_OUT = "held out in another of the datasets"
DUPLICATE = "duplicate"


def merge_datasets(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    shuffle_seed: int | None = 0,
    drop_duplicates: bool = False,
    report: Report | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> DatasetInfo:
    """Make a dataset of the documents of others; each stays in its split.

    A train document that is also held out in one of the others is left out, or the model would be
    trained on what it is measured with.

    Args:
        paths: Two datasets or more, made with the same tokenizer.
        out: Directory to make; one that was merged from the same datasets is accepted.
        shuffle_seed: Of the document order on disk, which decides subsets; None: one after another.
        drop_duplicates: Keep only the first of documents with the same tokens in a split.

    Returns:
        The facts of the new dataset.

    Raises:
        UserError: Different tokenizers, a dataset given twice or damaged, or `out` in use.
    """
    if len(paths) < 2:
        raise UserError("data merge", "one dataset is not enough", "two or more")
    infos = [DatasetInfo.load(path) for path in paths]
    _check_alike(paths, infos)
    arguments = {
        "merged": [info.fingerprint for info in infos],
        "shuffle_seed": shuffle_seed,
        "drop_duplicates": drop_duplicates,
    }
    report = report or Report()
    with writing(out):
        out = absolute(out)
        if (out / DATASET_FILE).exists():
            return _accept(out, arguments)
        with reserved(out, marker=DATASET_FILE, on_wait=report.wait) as directory:
            if (out / DATASET_FILE).exists():
                return _accept(out, arguments)
            # What a killed merge left is not used: it is made quickly, and needs the room.
            with made_whole(directory, out):
                return _Merge(paths, infos, arguments, directory, report, shard_bytes).run()


def _check_alike(paths: Sequence[str | Path], infos: Sequence[DatasetInfo]) -> None:
    for number, (path, info) in enumerate(zip(paths, infos, strict=True)):
        if info.fingerprint in [other.fingerprint for other in infos[:number]]:
            raise UserError(str(path), "is given twice, or holds the same as another one")
        if info.tokenizer_sha256 != infos[0].tokenizer_sha256:
            raise UserError(
                str(path),
                f"has another tokenizer (sha256 {info.tokenizer_sha256[:12]}…)",
                f"that of {paths[0]} ({infos[0].tokenizer_sha256[:12]}…)",
                "convert its text again with --tokenizer "
                f"{Path(paths[0]) / infos[0].tokenizer_file}",
            )


def _accept(out: Path, arguments: dict) -> DatasetInfo:
    info = DatasetInfo.load(out)
    if dict(info.arguments) != arguments:
        raise UserError(
            str(out),
            "holds a dataset made differently",
            "one merged from the same datasets in the same order",
            "choose another path, or remove the directory",
        )
    return info


class _Merge:
    """One merge into an empty directory."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        infos: Sequence[DatasetInfo],
        arguments: dict,
        directory: Path,
        report: Report,
        shard_bytes: int,
    ) -> None:
        self._paths = paths
        self._infos = infos
        self._arguments = arguments
        self._directory = directory
        self._report = report
        self._shard_bytes = shard_bytes
        self._left_out: Counter[str] = Counter()
        for info in infos:
            self._left_out.update(info.left_out)
        tokenizer = Path(paths[0]) / infos[0].tokenizer_file
        self._tokenizer = Tokenizer.load(tokenizer, special_tokens=infos[0].special_tokens)

    def run(self) -> DatasetInfo:
        documents = {split: _Documents(self._paths, split) for split in SPLITS}
        hashes = {split: self._hashes(split, documents[split]) for split in SPLITS}
        kept = {split: np.ones(len(hashes[split]), dtype=bool) for split in SPLITS}
        kept["train"] &= ~np.isin(hashes["train"], hashes["val"])
        self._left_out[ELSEWHERE_HELD_OUT] += int((~kept["train"]).sum())
        if self._arguments["drop_duplicates"]:
            for split in SPLITS:
                before = kept[split].sum()
                kept[split] &= _is_first(hashes[split])
                self._left_out[DUPLICATE] += int(before - kept[split].sum())
        seed = self._arguments["shuffle_seed"]
        splits: dict[Split, SplitDocuments] = {}
        for number, split in enumerate(SPLITS):
            order = in_order(np.flatnonzero(kept[split]), number, seed)
            if not len(order):
                where = ", ".join(map(str, self._paths))
                raise UserError(where, f"no documents are left for {split}", "some")
            every = documents[split]
            splits[split] = SplitDocuments(order, every.lengths, every.text_bytes, every.read_all)
        skipped = sum(info.skipped_documents - sum(info.left_out.values()) for info in self._infos)
        left_out = {reason: n for reason, n in sorted(self._left_out.items()) if n}
        info = self._infos[0].model_copy(
            update={
                "tokenizer_file": TOKENIZER_FILE,
                "tokenizer_sha256": self._tokenizer.sha256,
                "splits": {split: documents.facts for split, documents in splits.items()},
                "skipped_documents": skipped + sum(left_out.values()),
                "left_out": left_out,
                "sources": tuple(file for info in self._infos for file in info.sources),
                "arguments": self._arguments,
            }
        )
        write_dataset(
            self._directory,
            info,
            self._tokenizer,
            splits,
            report=self._report,
            shard_bytes=self._shard_bytes,
        )
        return info

    def _hashes(self, split: Split, documents: _Documents) -> np.ndarray:
        """(documents,) uint64, of the tokens of each."""
        found = np.empty(len(documents.lengths), dtype=np.uint64)
        for number in range(len(found)):
            tokens = documents.read(number)
            digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
            found[number] = int.from_bytes(digest, "little")
            if number % _SHOWN_EVERY == 0:
                self._report.show(
                    StageProgress(f"reading {split}", number, len(found), "documents")
                )
        return found


class _Documents:
    """The documents of one split of several datasets, numbered one dataset after another."""

    def __init__(self, paths: Sequence[str | Path], split: Split) -> None:
        self._datasets = [TokenDataset.open(path, split) for path in paths]
        self._ends = np.cumsum([dataset.documents for dataset in self._datasets])
        self.lengths = np.concatenate([dataset.lengths for dataset in self._datasets])
        self.text_bytes = np.concatenate([load_text_bytes(dataset) for dataset in self._datasets])

    def read(self, number: int) -> np.ndarray:
        which = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[which - 1]) if which else 0
        return self._datasets[which].read(number - before)

    def read_all(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        return map(self.read, numbers.tolist())


def _is_first(hashes: np.ndarray) -> np.ndarray:
    """(documents,) bool: no earlier document has the same hash."""
    first = np.zeros(len(hashes), dtype=bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    return first
