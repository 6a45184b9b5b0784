"""Datasets whose documents the tests choose: on disk through plain streaming, or in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data_tools.tokenizers.tokenizer import Tokenizer
from dualtrain.data.dataset import DatasetInfo, SplitInfo

Documents = Sequence[Sequence[int]]
TOKENIZER = Tokenizer.train(["a b c"], 272)


def write_dataset(
    path: Path,
    train: Documents,
    val: Documents = ((17, 18, 19),),
    *,
    vocab_size: int = 1000,
    shard_bytes: int = 1 << 20,
    dtype: type = np.uint16,
) -> Path:
    """Write documents as a dataset, as the format is described and without data_tools.convert."""
    from streaming import MDSWriter

    splits = {"train": train, "val": val}
    for name, documents in splits.items():
        writer = MDSWriter(
            columns={"tokens": f"ndarray:{dtype.__name__}"},
            out=str(path / name),
            size_limit=shard_bytes,
        )
        for document in documents:
            writer.write({"tokens": np.array(document, dtype=dtype)})
        writer.finish()
        np.save(path / name / "lengths.npy", np.array([len(d) for d in documents], np.int64))
    TOKENIZER.save(path / "tokenizer.json")
    info = DatasetInfo.model_validate(
        {
            "format": 1,
            "tokenizer_file": "tokenizer.json",
            "tokenizer_sha256": TOKENIZER.sha256,
            "vocab_size": vocab_size,
            "special_tokens": TOKENIZER.special_tokens,
            "special_ids": TOKENIZER.special_ids,
            "dtype": dtype.__name__,
            "splits": {
                name: {
                    "documents": len(documents),
                    "tokens": sum(map(len, documents)),
                    "bytes": 4 * sum(map(len, documents)),
                }
                for name, documents in splits.items()
            },
            "skipped_documents": 0,
            "sources": [],
            "arguments": {},
        }
    )
    (path / "dataset.json").write_text(info.model_dump_json())
    return path


def distinct_documents(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of the given lengths in which no token occurs twice."""
    ends = np.cumsum(lengths) + 16
    return [list(range(e - n, e)) for e, n in zip(ends.tolist(), lengths, strict=True)]


class InMemory:
    """What TrainingData needs of a TokenDataset, without files: for many small examples."""

    def __init__(self, documents: Documents) -> None:
        self._documents = [np.array(d, dtype=np.uint16) for d in documents]
        self.lengths = np.array([len(d) for d in documents], dtype=np.int64)
        self.documents = len(documents)
        self.token_bytes = np.full(1 << 16, 4)
        self.directory = Path("in-memory")
        self.tokens = tokens = int(self.lengths.sum())
        self.info = DatasetInfo.model_construct(
            special_tokens={"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<mask>": 4},
            vocab_size=1 << 16,
        )
        self.facts = SplitInfo(documents=len(documents), tokens=tokens, bytes=4 * tokens)

    def prepare(self, documents: Iterable[int]) -> None:
        """There is nothing to fetch."""

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return self._documents[document][start:stop]
