"""Tests of: dualtrain.data.remote, shard_cache: datasets on an S3 server, in directories."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.datasets import distinct_documents, write_dataset
from helpers.object_store import LENGTHS, hashed_dataset, new_bucket, s3_client, s3_server

from data_tools.remote import upload_dataset
from dualtrain.common.errors import UserError
from dualtrain.common.locks import locked
from dualtrain.data.batches import TrainingData, ValidationData
from dualtrain.data.dataset import TokenDataset
from dualtrain.data.remote import MissingRemoteFile, Remote, fetch_facts, fetch_info
from dualtrain.data.shard_cache import ShardCache
from dualtrain.method.mixing import Mixture


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hashed_dataset(tmp_path_factory.mktemp("original") / "data")


@pytest.fixture(scope="module")
def url(server: str, original: Path) -> str:
    url = new_bucket()
    upload_dataset(original, url)
    return url


@pytest.fixture
def own_url(original: Path) -> str:
    """For tests that spoil what is there."""
    url = new_bucket()
    upload_dataset(original, url)
    return url


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualtrain.data.remote._WAITS_S", (0.0, 0.0))


def opened(url: str, path: Path, split="train", **settings) -> TokenDataset:
    fetch_facts(url, path)
    return TokenDataset.open(path, split, source=ShardCache(url, path, **settings))


def shards_in(path: Path) -> dict[str, int]:
    """Bytes of every shard, whole or coming in, as they are at one moment."""
    found: dict[str, int] = {}
    # Nothing is removed or begun while we hold the lock; what is coming in only grows.
    with locked(path / ".remote" / "room.lock"):
        for folder, _, names in os.walk(path):
            inside = Path(folder).relative_to(path).parts
            for name in names if inside[-1:] != ("locks",) else ():
                with contextlib.suppress(FileNotFoundError):
                    if ".mds" in name:
                        found["/".join([*inside[-1:], name])] = Path(folder, name).stat().st_size
    return found


def remove(url: str, name: str) -> None:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    s3_client().delete_object(Bucket=bucket, Key=f"{prefix}/{name}")


def put(url: str, name: str, content: bytes) -> None:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    s3_client().put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)


def test_batches_are_those_of_the_same_dataset_on_disk(
    url: str, original: Path, tmp_path: Path
) -> None:
    def training(dataset: TokenDataset) -> TrainingData:
        return TrainingData(
            dataset,
            mixture=Mixture(alpha=Fraction(1, 2), steps=30, slots=2, micro_batch=4, rotation=True),
            sequence_length=48,
            seed=5,
            unique_tokens=1800,
            append_eos=True,
        )

    remote = opened(url, tmp_path / "copy")
    mine, theirs = training(remote), training(TokenDataset.open(original))
    for stream in ("ar", "diffusion"):
        for first in range(0, 60, 4):
            got, expected = mine.batch(stream, first), theirs.batch(stream, first)
            assert torch.equal(got.targets, expected.targets)
            assert torch.equal(got.document_ids, expected.document_ids)
            assert got.documents == expected.documents
    held_out = [
        ValidationData(dataset, sequence_length=16, append_eos=True).batch(0, 5).targets
        for dataset in (
            TokenDataset.open(tmp_path / "copy", "val", source=remote._source),
            TokenDataset.open(original, "val"),
        )
    ]
    assert torch.equal(*held_out)
    remote.close()


def test_only_what_is_read_is_fetched(url: str, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    dataset = opened(url, path)
    assert not shards_in(path), "opening needs no shard"
    assert dataset.read(0).tolist() == distinct_documents(LENGTHS)[0]
    assert list(shards_in(path)) == ["train/shard.00000.mds"]


def test_next_shards_come_ahead_and_all_of_them_in_the_background(
    url: str, original: Path, tmp_path: Path
) -> None:
    path = tmp_path / "copy"
    dataset = opened(url, path)
    dataset.prepare([0, dataset.documents - 1])
    wait_for(lambda: len(shards_in(path)) == 2)
    dataset.prepare_all(dataset.documents)
    wait_for(lambda: len(shards_in(path)) == len(dataset.shards))
    dataset.close()
    for shard in dataset.shards:
        assert (path / "train" / shard.name).read_bytes() == (
            original / "train" / shard.name
        ).read_bytes()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing comes"
        time.sleep(0.01)


READER = """
import random, sys, time
import numpy as np
from dualtrain.data.dataset import TokenDataset
from dualtrain.data.remote import fetch_facts
from dualtrain.data.shard_cache import ShardCache
from streaming.base.storage.download import LocalDownloader
copy_file = LocalDownloader._download_file_impl
def slowly(*arguments):
    copy_file(*arguments)
    time.sleep(0.01)  # so that downloads overlap
LocalDownloader._download_file_impl = slowly
url, copies, reader = sys.argv[1:]
for number in range(2):
    copy = f"{copies}-{number}"
    fetch_facts(url, copy)
    cache = ShardCache(url, copy, reader=int(reader), readers=2)
    dataset = TokenDataset.open(copy, source=cache)
    order = random.Random(reader).sample(range(dataset.documents), dataset.documents)
    total = 0
    for i, document in enumerate(order):
        dataset.prepare(order[i : i + 4])
        total += int(dataset.read(document).astype(np.int64).sum()) * (document + 1)
    dataset.close()
    print(total)
"""


def test_two_processes_read_the_same_while_they_fetch_it(original: Path, tmp_path: Path) -> None:
    script = tmp_path / "reader.py"
    script.write_text(READER)
    command = [sys.executable, str(script), str(original), str(tmp_path / "copy")]
    readers = [
        subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(2)
    ]
    expected = sum(sum(tokens) * (i + 1) for i, tokens in enumerate(distinct_documents(LENGTHS)))
    for reader in readers:
        assert reader.communicate()[0].split() == [str(expected)] * 2
    for number in range(2):
        assert not list((tmp_path / f"copy-{number}" / ".remote" / "incoming").iterdir())


def test_each_shard_is_fetched_once(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    download = Remote.download

    def count(self: Remote, name: str, into: Path, **expected) -> None:
        fetched.append(name)
        download(self, name, into, **expected)

    fetch_facts(url, tmp_path / "copy")
    monkeypatch.setattr(Remote, "download", count)
    ranks = [opened(url, tmp_path / "copy", reader=n, readers=3) for n in range(3)]
    fetched.clear()

    def read_all(dataset: TokenDataset) -> None:
        for first in range(0, dataset.documents, 6):
            documents = range(first, min(first + 6, dataset.documents))
            dataset.prepare(documents)
            assert all(len(dataset.read(d)) == LENGTHS[d] for d in documents)
        finished.append(dataset)

    finished: list[TokenDataset] = []
    threads = [threading.Thread(target=read_all, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(finished) == 3
    assert sorted(fetched) == [f"train/{shard.name}" for shard in ranks[0].shards]


def test_missing_shard_is_named_where_it_is_read(own_url: str, tmp_path: Path) -> None:
    remove(own_url, "train/shard.00001.mds")
    dataset = opened(own_url, tmp_path / "copy")
    document = dataset.shards[0].documents
    dataset.prepare([0, document])
    assert len(dataset.read(0)) == LENGTHS[0], "the other shard is unharmed"
    with pytest.raises(UserError, match="is not there") as caught:
        dataset.read(document)
    assert caught.value.where == f"{own_url}/train/shard.00001.mds"
    dataset.prepare_all(dataset.documents)
    with pytest.raises(UserError, match="is not there"):
        dataset.read(document)


def test_damaged_shard_on_the_server(own_url: str, original: Path, tmp_path: Path) -> None:
    content = bytearray((original / "train" / "shard.00000.mds").read_bytes())
    content[-1] ^= 1
    put(own_url, "train/shard.00000.mds", bytes(content))
    dataset = opened(own_url, tmp_path / "copy")
    with pytest.raises(UserError, match="shard.00000.mds: is damaged: its sha256 is"):
        dataset.read(0)
    put(own_url, "train/shard.00000.mds", bytes(content[:-3]))
    with pytest.raises(UserError, match=f"has {len(content) - 3} bytes.*{len(content)}"):
        dataset.read(0)
    assert not shards_in(tmp_path / "copy"), "nothing of it stays"
    put(own_url, "train/shard.00000.mds", (original / "train" / "shard.00000.mds").read_bytes())
    assert dataset.read(0).tolist() == distinct_documents(LENGTHS)[0]


def test_truncated_local_shard_is_fetched_again(url: str, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    opened(url, path).read(0)
    shard = path / "train" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:100])
    assert opened(url, path).read(0).tolist() == distinct_documents(LENGTHS)[0]


def test_what_a_killed_process_left_is_cleared_up(original: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    dataset = opened(str(original), path)
    left = path / ".remote" / "incoming" / f"train~{dataset.shards[0].name}"
    left.mkdir()
    (left / dataset.shards[0].name).write_bytes(bytes(300))
    assert dataset.read(0).tolist() == distinct_documents(LENGTHS)[0]
    assert not left.exists()


def test_failures_that_pass_are_tried_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streaming.base.storage.download import S3Downloader

    download, failures = S3Downloader._download_file_impl, [ConnectionError("reset")] * 2

    def fail_twice(self: S3Downloader, remote: str, local: str, timeout: float) -> None:
        if remote.endswith(".mds") and failures:
            Path(local).write_bytes(b"half")
            raise failures.pop()
        download(self, remote, local, timeout)

    dataset = opened(url, tmp_path / "copy")
    monkeypatch.setattr(S3Downloader, "_download_file_impl", fail_twice)
    assert dataset.read(0).tolist() == distinct_documents(LENGTHS)[0]
    assert not failures
    failures += [ConnectionError("reset")] * 3
    with pytest.raises(UserError, match="cannot be fetched: ConnectionError: reset") as caught:
        dataset.read(dataset.documents - 1)
    assert caught.value.where == f"{url}/train/{dataset.shards[-1].name}"


def test_a_copy_of_another_dataset_is_refused(url: str, original: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", [[17, 18]])
    before = sorted(file for file in other.rglob("*"))
    with pytest.raises(UserError, match="holds another dataset than s3://") as caught:
        fetch_facts(url, other)
    assert caught.value.where == str(other)
    assert [f for f in sorted(other.rglob("*")) if ".remote" not in str(f)] == before
    (other / "dataset.json").unlink()
    with pytest.raises(UserError, match="has shards but no dataset.json"):
        fetch_facts(url, other)
    with pytest.raises(UserError, match="is data.path itself"):
        fetch_facts(f"file://{original}", original)


def test_nothing_there_and_nobody_there(
    url: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch_info(f"{url}/nowhere") is None
    with pytest.raises(MissingRemoteFile, match="nowhere/dataset.json: is not there"):
        fetch_facts(f"{url}/nowhere", tmp_path / "nothing")
    with pytest.raises(UserError, match="not a place that datasets can be fetched from"):
        fetch_info("nosuch://bucket/data")
    whole = shutil.copytree(original, tmp_path / "whole")
    partial = tmp_path / "partial"
    opened(url, partial).read(0)
    monkeypatch.setattr("dualtrain.data.remote.Remote._fetch", unreachable)
    with pytest.raises(UserError, match="no connection"):
        fetch_info(url)
    with pytest.raises(UserError, match="no connection"):
        fetch_facts(url, partial)
    fetch_facts(url, whole)  # all shards are there
    assert len(TokenDataset.open(whole).read(0)) == LENGTHS[0]


def unreachable(self: Remote, name: str, into: Path) -> UserError:
    return UserError(f"{self.url}/{name}", "no connection")


def test_interrupted_facts_are_completed(url: str, original: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    fetch_facts(url, path)
    for name in ("dataset.json", "train/index.json", "val/lengths.npy", "tokenizer.json"):
        content = (path / name).read_bytes()
        assert content == (original / name).read_bytes()
        (path / name).unlink()
        fetch_facts(url, path)
        assert (path / name).read_bytes() == content


def test_a_disk_too_small_for_the_unique_tokens_is_refused(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all shards, less those that are here: they are read in every epoch, in any order."""
    dataset = opened(str(original), tmp_path / "copy")
    dataset.read(0)
    missing = sum(shard.bytes for shard in dataset.shards[1:])
    for free in (missing - 1, missing):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if free < missing:
            with pytest.raises(UserError, match="still to be fetched take") as caught:
                dataset.prepare_all(dataset.documents)
            assert caught.value.where == str(tmp_path / "copy")
        else:
            dataset.prepare_all(dataset.documents)
    dataset.close()


def test_unwritable_copy(original: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot hold a copy of the dataset"):
        fetch_facts(str(original), tmp_path / "file" / "copy")
