"""Tests of: data_tools.inspection, verify: looking at datasets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import write_dataset
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_tools.command import app
from data_tools.inspection import length_histogram
from data_tools.verify import verify_dataset
from dualtrain.common.errors import UserError, UserErrors


@given(st.lists(st.integers(0, 5000), min_size=1))
def test_histogram_counts_every_document_once(lengths: list[int]) -> None:
    bins = length_histogram(np.array(lengths, dtype=np.int64))
    assert [b.first for b in bins[1:]] == [b.last + 1 for b in bins[:-1]]
    assert sum(b.tokens for b in bins) == sum(lengths)
    for b in bins:
        assert b.documents == sum(b.first <= max(length, 1) <= b.last for length in lengths)


def test_inspect_shows_lengths_and_marked_documents(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [[17, 18], [17] * 9, [18] * 10])
    shown = CliRunner().invoke(
        app, ["inspect", str(tmp_path / "data"), "--documents", "2", "--characters", "5"]
    )
    assert shown.exit_code == 0
    assert "train: documents of 2 to 10 tokens, median 9, mean 7.0" in shown.output
    assert "8-15" in shown.output and "90.5%" in shown.output
    from helpers.datasets import TOKENIZER

    one, nine = TOKENIZER.decode([17, 18]), TOKENIZER.decode([17] * 5)
    assert f"<s>{one}</s>" in shown.output and f"<s>{nine}…" in shown.output


def hashed(path: Path) -> Path:
    """A dataset of several shards with their hashes."""
    import hashlib

    write_dataset(path, [[17 + i % 50] * 40 for i in range(60)], shard_bytes=1000)
    for split in ("train", "val"):
        index = json.loads((path / split / "index.json").read_text())
        for shard in index["shards"]:
            file = path / split / shard["raw_data"]["basename"]
            shard["raw_data"]["hashes"] = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        (path / split / "index.json").write_text(json.dumps(index))
    return path


def test_verify_finds_everything_that_is_wrong(tmp_path: Path) -> None:
    path = hashed(tmp_path / "data")
    verify_dataset(path)
    shards = sorted((path / "train").glob("*.mds"))
    shards[0].unlink()
    content = bytearray(shards[2].read_bytes())
    content[-1] ^= 1
    shards[2].write_bytes(content)
    shards[3].write_bytes(shards[3].read_bytes()[:-1])
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserErrors) as caught:
        verify_dataset(path)
    found = {Path(error.where).name: error.what for error in caught.value.errors}
    assert "missing" in found[shards[0].name]
    assert "does not match its hash" in found[shards[2].name]
    assert "bytes" in found[shards[3].name]
    assert "is not the tokenizer" in found["tokenizer.json"]
    assert shards[1].name not in found


def test_verify_compares_lengths_and_vocabulary(tmp_path: Path) -> None:
    path = hashed(tmp_path / "data")
    lengths = np.load(path / "train" / "lengths.npy")
    np.save(path / "train" / "lengths.npy", np.where(np.arange(60) == 30, 41, lengths))
    with pytest.raises(UserErrors) as caught:
        verify_dataset(path)
    text = str(caught.value)
    assert "adds up to 2,401 tokens — expected 2,400" in text
    assert "document 30 does not have the 41 tokens of lengths.npy" in text
    np.save(path / "train" / "lengths.npy", lengths)
    facts = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps(facts | {"vocab_size": 60}))
    with pytest.raises(UserError, match="ordinary ids below 60"):
        verify_dataset(path)
