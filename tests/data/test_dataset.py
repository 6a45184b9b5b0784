"""Tests of: dualtrain.data.dataset: what is read, and how each kind of damage is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import distinct_documents, write_dataset
from streaming import LocalDataset

from dualtrain.common.errors import UserError
from dualtrain.data.dataset import DatasetInfo, TokenDataset

LENGTHS = [5, 1, 300, 40, 7, 120, 80]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", distinct_documents(LENGTHS), shard_bytes=400)


def test_documents_and_facts(path: Path) -> None:
    dataset = TokenDataset.open(path)
    assert dataset.documents == len(LENGTHS)
    assert dataset.tokens == sum(LENGTHS)
    assert dataset.lengths.tolist() == LENGTHS
    assert dataset.bytes_per_token == 4
    assert (dataset.info.bos_id, dataset.info.eos_id, dataset.info.mask_id) == (1, 2, 4)
    assert len(dataset.shards) > 2
    for document, tokens in enumerate(distinct_documents(LENGTHS)):
        assert dataset.read(document).tolist() == tokens
        assert dataset.read(document, 1, 4).tolist() == tokens[1:4]
    assert TokenDataset.open(path, "val").read(0).tolist() == [17, 18, 19]


def test_few_files_stay_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualtrain.data.dataset._OPEN_FILES", 2)
    dataset = TokenDataset.open(path, check=False)
    for document in [2, 0, 1, 2, 5, 3, 2, 2, 6]:
        assert dataset.read(document).tolist() == distinct_documents(LENGTHS)[document]
        assert len(dataset._files) <= 2 and not any(file.closed for file in dataset._files.values())
    files = list(dataset._files.values())
    dataset.close()
    assert all(file.closed for file in files)
    assert dataset.read(6).tolist() == distinct_documents(LENGTHS)[6]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_parts_are_what_streaming_itself_reads(tmp_path: Path, dtype: type) -> None:
    """Lengths whose number takes one, two and four bytes; beginnings and ends anywhere in them."""
    lengths = [1, 2, 255, 256, 300, 65_535, 65_536, 70_000, 5]
    rng = np.random.default_rng(0)
    documents = [rng.integers(16, 900, n).tolist() for n in lengths]
    path = write_dataset(tmp_path / "data", documents, dtype=dtype, shard_bytes=200_000)
    dataset, theirs = TokenDataset.open(path), LocalDataset(str(path), split="train")
    assert len(dataset.shards) > 2
    for document, length in enumerate(lengths):
        whole = theirs[document]["tokens"]
        assert whole.dtype == dtype and dataset.read(document).dtype == dtype
        for _ in range(20):
            start, stop = sorted(rng.integers(0, length + 1, 2).tolist())
            assert np.array_equal(dataset.read(document, start, stop), whole[start:stop])
        assert np.array_equal(dataset.read(document, 0, length + 9), whole)


def test_shard_that_is_cut_later(path: Path) -> None:
    dataset = TokenDataset.open(path)
    last = dataset.documents - 1
    shard = dataset.shard_of(last)
    os.truncate(shard, shard.stat().st_size - 3)
    with pytest.raises(UserError, match="cannot be read: the shard ends before it") as caught:
        dataset.read(last)
    assert caught.value.where == str(shard)


def test_missing_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no dataset.*data.build"):
        TokenDataset.open(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="has no dataset.json"):
        TokenDataset.open(tmp_path / "other")


def test_half_written_dataset(path: Path) -> None:
    (path / "dataset.json").unlink()
    with pytest.raises(UserError, match="half-written"):
        TokenDataset.open(path)


def test_missing_shards_are_named_together(path: Path) -> None:
    (path / "train" / "shard.00001.mds").unlink()
    (path / "train" / "shard.00002.mds").unlink()
    with pytest.raises(UserError) as caught:
        TokenDataset.open(path)
    assert "shard.00001.mds: shard is missing" in str(caught.value)
    assert "shard.00002.mds: shard is missing" in str(caught.value)


def test_truncated_shard(path: Path) -> None:
    shard = path / "train" / "shard.00001.mds"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(UserError, match=f"shard has {size - 3:,} bytes.*{size:,} bytes") as caught:
        TokenDataset.open(path)
    assert caught.value.where == str(shard)


def test_compressed_shard_is_not_taken_for_missing(path: Path) -> None:
    index = path / "train" / "index.json"
    content = json.loads(index.read_text())
    entry = content["shards"][1]
    entry["zip_data"] = {"basename": "shard.00001.mds.zstd", "bytes": 9, "hashes": {}}
    index.write_text(json.dumps(content))
    (path / "train" / "shard.00001.mds").rename(path / "train" / "shard.00001.mds.zstd")
    with pytest.raises(UserError, match="only shard.00001.mds.zstd is there: decompress it"):
        TokenDataset.open(path)


def test_shard_that_disappears_later(path: Path) -> None:
    dataset = TokenDataset.open(path)
    last = dataset.documents - 1
    dataset.close()
    dataset.shard_of(last).unlink()
    with pytest.raises(UserError, match="shard is missing") as caught:
        dataset.read(last)
    assert caught.value.where == str(dataset.shard_of(last))


def test_shard_with_other_content_of_the_same_size(path: Path) -> None:
    shard = path / "train" / "shard.00002.mds"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match="document 3 does not have the 40 tokens") as caught:
        TokenDataset.open(path)
    assert caught.value.where == str(shard)


def test_lengths_that_do_not_fit(path: Path) -> None:
    file = path / "train" / "lengths.npy"
    right = np.load(file)
    np.save(file, right[:-1])
    with pytest.raises(UserError, match="lengths.npy: holds"):
        TokenDataset.open(path)
    wrong = right.copy()
    wrong[0] += 1
    np.save(file, wrong)
    with pytest.raises(UserError, match="document 0 does not have the 6 tokens of lengths.npy"):
        TokenDataset.open(path)
    whole = file.read_bytes()
    # Cut; brackets without an end, which numpy's parser reports by another error; too large.
    open_end, large = whole.replace(b"), }", b" ((("), whole.replace(b"(", b"(" + b"9" * 20)
    for damaged in (whole[:-20], open_end, large):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="lengths.npy: is damaged"):
            TokenDataset.open(path)


def test_tokenizer_of_other_shards(path: Path) -> None:
    with (path / "tokenizer.json").open("a") as stream:
        stream.write(" ")
    with pytest.raises(UserError, match="is not the tokenizer of these shards") as caught:
        TokenDataset.open(path)
    assert caught.value.where == str(path / "tokenizer.json")


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data", [[20, 999], [20, 21]], vocab_size=999)
    with pytest.raises(UserError, match="document 0 has token id 999.*below 999"):
        TokenDataset.open(path)


def test_reserved_ids_in_a_document(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data", [[20, 21], [20, 4, 21]])
    with pytest.raises(UserError, match="document 1 has reserved token ids"):
        TokenDataset.open(path)
    write_dataset(tmp_path / "unknown", [[20, 0, 21]])
    assert TokenDataset.open(tmp_path / "unknown").tokens == 3, "<unk> may occur"


def test_facts_of_another_format(path: Path) -> None:
    file = path / "dataset.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"format": 2}))
    with pytest.raises(UserError, match="not a dataset of format 1: format"):
        DatasetInfo.load(path)
    file.write_text(file.read_text()[:100])
    with pytest.raises(UserError, match="not a dataset of format 1"):
        DatasetInfo.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"special_tokens": {"<s>": 99999}}, "special_tokens lacks <unk>, </s>, <pad>, <mask> "),
        ({"special_tokens": {}}, "special_tokens lacks <unk>, <s>, </s>, <pad>, <mask> "),
        (
            {"special_tokens": {"<unk>": 0, "<s>": 99999, "</s>": 2, "<pad>": 3, "<mask>": 4}},
            "special_tokens: <s> is 99999, outside the vocabulary of 1,000 tokens ",
        ),
        (
            {"special_tokens": {"<unk>": 0, "<s>": -1, "</s>": 2, "<pad>": 3, "<mask>": 4}},
            "special_tokens: <s> is -1, outside the vocabulary",
        ),
        (
            {"special_tokens": {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<mask>": 77}},
            "special_ids lacks 77, the id of <mask> ",
        ),
        ({"special_ids": []}, "special_ids lacks 0, the id of <unk> "),
        ({"splits": {}}, "splits lacks train "),
    ],
)
def test_facts_that_were_edited(path: Path, change: dict, message: str) -> None:
    file = path / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as caught:
        DatasetInfo.load(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["dataset.json", "tokenizer.json", "train/index.json", "train/lengths.npy", "train/*0.mds"],
)
def test_pointers_of_git_lfs(path: Path, name: str) -> None:
    file = next(path.glob(name))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")
    with pytest.raises(UserError, match=rf"{file.name}: is a pointer of Git LFS.*git lfs pull"):
        TokenDataset.open(path)


def test_shards_of_another_column(path: Path) -> None:
    index = path / "train" / "index.json"
    index.write_text(index.read_text().replace("ndarray:uint16", "ndarray:uint32"))
    with pytest.raises(UserError, match="holds .*uint32"):
        TokenDataset.open(path)
    index.write_text("{}")
    with pytest.raises(UserError, match="is damaged: KeyError.*expected an MDS index"):
        TokenDataset.open(path)
    shutil.rmtree(path / "train")
    with pytest.raises(UserError, match="index.json: cannot be read"):
        TokenDataset.open(path)


def test_words_are_no_part_of_what_a_dataset_is(path: Path) -> None:
    """Runs on a dataset whose words nobody counted go on when it is made again, with them."""
    old = DatasetInfo.load(path)
    assert "words" not in old.model_dump_json()
    train = old.splits["train"]
    new = old.model_copy(
        update={"splits": {**old.splits, "train": train.model_copy(update={"words": 7})}}
    )
    other = train.model_copy(update={"bytes": train.bytes + 1})
    (path / "dataset.json").write_text(new.model_dump_json())
    assert DatasetInfo.load(path) == new != old
    assert new.fingerprint == old.fingerprint
    assert old.model_copy(update={"splits": {"train": other}}).fingerprint != old.fingerprint
