"""Tests of: data_tools.sources: MDS shards of text that other tools made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter

from data_tools.sources import BadInput, Document, open_sources
from dualtrain.common.errors import UserError

COLUMNS = {"body": "bytes", "n": "int", "text": "str", "tokens": "ndarray:uint16"}


def write(directory: Path, texts: list[str], **options: Any) -> Path:
    import numpy as np

    with MDSWriter(columns=COLUMNS, out=str(directory), size_limit=2000, **options) as writer:
        for number, text in enumerate(texts):
            tokens = np.arange(1 + number % 5, dtype=np.uint16)
            writer.write({"text": text, "body": b"b", "n": number, "tokens": tokens})
    return directory


def brief(source: Path, **options: Any) -> list[str]:
    items = open_sources(str(source), **options).documents()
    return [item.text if isinstance(item, Document) else f"[{item.kind}]" for item in items]


TEXTS = [f"text {number} " + "é" * (number % 50) for number in range(100)]


@pytest.mark.parametrize("compression", [None, "zstd", "gz", "bz2"])
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_text_column_is_read(tmp_path: Path, compression: str | None, block_bytes: int) -> None:
    write(tmp_path / "mds", TEXTS, compression=compression)
    assert brief(tmp_path / "mds", block_bytes=block_bytes) == TEXTS
    assert brief(tmp_path / "mds", text_field="body") == ["b"] * 100
    assert len(list(open_sources(str(tmp_path)).files)) > 3


def test_of_splits_the_training_shards_are_read(tmp_path: Path) -> None:
    write(tmp_path / "train", TEXTS[:5])
    write(tmp_path / "val", TEXTS[5:])
    assert brief(tmp_path) == TEXTS[:5]
    assert brief(tmp_path / "val") == TEXTS[5:]


def test_shards_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, TEXTS[:3])
    shard, index = tmp_path / "shard.00000.mds", tmp_path / "index.json"
    for field, kind, message in (
        ("content", "no text field", "'body', 'n', 'text', 'tokens'"),
        ("tokens", "text is not a string", "ndarray:uint16"),
        ("n", "text is not a string", "holds int"),
    ):
        [problem] = open_sources(str(tmp_path), text_field=field).documents()
        assert isinstance(problem, BadInput) and problem.kind == kind
        assert message in str(problem.error)
    content = shard.read_bytes()
    for damaged, kind in (
        (content[:-1], "truncated file"),
        (content[:3], "damaged file"),
        (b"\xff" * 99, "damaged file"),
        (b"", "damaged file"),
    ):
        shard.write_bytes(damaged)
        assert brief(tmp_path) == [f"[{kind}]"]
    shard.unlink()
    with pytest.raises(UserError, match="shard.00000.mds: cannot be read"):
        open_sources(str(tmp_path))
    entries = json.loads(index.read_text())
    del entries["shards"][0]["column_sizes"]
    index.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="index.json: is not an MDS index: KeyError"):
        open_sources(str(tmp_path))
