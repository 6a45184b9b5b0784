"""Tests of: data_tools.remote, upload: a dataset on an S3 server, and plain streaming of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.conversions import write_jsonl
from helpers.datasets import distinct_documents, write_dataset
from helpers.object_store import LENGTHS, hashed_dataset, new_bucket, s3_client, s3_server
from typer.testing import CliRunner

from data_tools.command import app
from data_tools.remote import fetch_info, is_remote, upload_dataset
from data_tools.reporting import Report, StageProgress
from dualtrain.common.errors import UserError
from dualtrain.data.dataset import DatasetInfo


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hashed_dataset(tmp_path_factory.mktemp("local") / "data")


def objects(url: str) -> dict[str, bytes]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = s3_client()
    keys = [o["Key"] for o in client.list_objects_v2(Bucket=bucket).get("Contents", [])]
    return {
        key.removeprefix(prefix + "/"): client.get_object(Bucket=bucket, Key=key)["Body"].read()
        for key in keys
    }


def files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def test_what_is_a_url() -> None:
    assert is_remote("s3://bucket/a") and is_remote("hf://datasets/a/b") and is_remote("dbfs:/a")
    assert not any(map(is_remote, ["data", "/data", "./s3:/x", "C:/data"]))


class Sent(Report):
    """Remembers (bytes sent, bytes of all) each time."""

    def __init__(self) -> None:
        self.bytes: list[tuple[int, int]] = []

    def show(self, progress: StageProgress) -> None:
        self.bytes.append((progress.done, progress.total))


def test_every_file_arrives_and_nothing_local_goes(local: Path) -> None:
    url, before, report = new_bucket(), files(local), Sent()
    upload_dataset(local, url + "/", report=report)
    reports = report.bytes
    assert objects(url) == before == files(local)
    assert len(reports) == len(before)
    assert reports == sorted(reports)
    assert reports[-1] == (sum(map(len, before.values())),) * 2
    assert fetch_info(url) == DatasetInfo.load(local)


def test_plain_streaming_reads_it(local: Path, tmp_path: Path) -> None:
    from streaming import StreamingDataset

    url = new_bucket()
    upload_dataset(local, url)
    dataset = StreamingDataset(
        remote=url, local=str(tmp_path / "copy"), split="train", shuffle=False, batch_size=1
    )
    found = [dataset[i]["tokens"].tolist() for i in range(len(dataset))]
    assert found == distinct_documents(LENGTHS)


def test_dataset_json_goes_last(local: Path, tmp_path: Path) -> None:
    url = new_bucket()
    broken = shutil.copytree(local, tmp_path / "broken")
    (broken / "val" / "lengths.npy").unlink()
    with pytest.raises(OSError, match="lengths.npy"):
        upload_dataset(broken, url)
    assert fetch_info(url) is None
    upload_dataset(local, url)
    assert objects(url) == files(local)


def test_a_file_that_did_not_arrive(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streaming.base.storage.upload import S3Uploader

    send = S3Uploader.upload_file

    def lose(self: S3Uploader, filename: str) -> None:
        if not filename.endswith("shard.00002.mds"):
            send(self, filename)

    monkeypatch.setattr(S3Uploader, "upload_file", lose)
    url = new_bucket()
    with pytest.raises(UserError, match="is not there after the upload") as caught:
        upload_dataset(local, url)
    assert caught.value.where == f"{url}/train/shard.00002.mds"
    assert fetch_info(url) is None


def test_a_dataset_that_is_there_is_not_sent_again_and_another_is_refused(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_bucket()
    upload_dataset(local, url)
    before = objects(url)
    other = write_dataset(tmp_path / "other", [[17, 18]])
    with pytest.raises(UserError, match="holds another dataset, with fingerprint") as caught:
        upload_dataset(other, url)
    assert caught.value.where == url
    sent = Sent()
    upload_dataset(local, url, report=sent)
    assert objects(url) == before and not sent.bytes


def test_no_bucket_and_no_uploader(local: Path) -> None:
    with pytest.raises(UserError, match="cannot be uploaded: ClientError.*existing bucket"):
        upload_dataset(local, "s3://no-such-bucket/data")
    with pytest.raises(UserError, match="not a place that datasets can be uploaded to.*s3://"):
        upload_dataset(local, "ftp://host/data")


def test_a_hugging_face_url_keeps_its_directory(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The uploader of streaming drops what follows the repository's name."""
    from huggingface_hub import HfFileSystem
    from streaming.base.storage.upload import HFUploader

    sent: dict[str, bytes] = {}

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None: ...

        def write(self, content: bytes) -> None:
            sent[self.name] = content

    monkeypatch.setattr(HFUploader, "check_dataset_exists", lambda self: None)
    monkeypatch.setattr(HfFileSystem, "open", lambda self, name, mode: Fake(name))
    monkeypatch.setattr("data_tools.remote.fetch_info", lambda remote: None)
    for url, folder in (("hf://datasets/me/it/a/b", "a/b/"), ("hf://datasets/me/it", "")):
        sent.clear()
        upload_dataset(local, url)
        assert sent == {f"datasets/me/it/{folder}{k}": v for k, v in files(local).items()}


def test_convert_to_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = [f"Text {i} of some that are all different: {i * i}" for i in range(60)]
    corpus, url = write_jsonl(tmp_path / "corpus.jsonl", texts), new_bucket()
    with corpus.open("a") as stream:
        stream.write("{")
    command = ["convert", str(corpus), "--vocab-size", "300", "--on-error", "skip"]
    kept = tmp_path / "kept"
    made = CliRunner().invoke(app, [*command, "--out", url, "--local", str(kept)])
    assert made.exit_code == 0 and f"uploaded to {url}" in made.output, made.output
    assert objects(url) == files(kept) and "left_out.jsonl" in files(kept)
    again = CliRunner().invoke(app, [*command, "--out", url])
    assert again.exit_code == 0 and f"{url} is there already" in again.output
    refused = CliRunner().invoke(app, [*command, "--out", url, "--shuffle-seed", "1"])
    assert isinstance(refused.exception, UserError)
    assert "shuffle_seed is 0 there and 1 here" in str(refused.exception)
    other = new_bucket()
    assert CliRunner().invoke(app, [*command, "--out", other]).exit_code == 0
    assert objects(other) == files(kept)
    assert not list((tmp_path / "cache").rglob("*.mds")), "nothing stays where none was asked for"
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.encode.Workers.encode", lambda *_: pytest.fail("too late"))
        failed = CliRunner().invoke(app, [*command, "--out", "s3://no-such-bucket/x"])
    assert isinstance(failed.exception, UserError)
    assert failed.exception.where == "s3://no-such-bucket/x"


def test_failed_upload_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = [f"Text {i} of some that are all different: {i * i}" for i in range(60)]
    corpus, url = write_jsonl(tmp_path / "corpus.jsonl", texts), new_bucket()
    command = ["convert", str(corpus), "--vocab-size", "300", "--out", url]
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.remote.upload_dataset", _fail)
        assert isinstance(CliRunner().invoke(app, command).exception, UserError)
    (built,) = (tmp_path / "cache").rglob("dataset.json")
    monkeypatch.setattr(
        "data_tools.encode.Workers.encode", lambda *_, **__: pytest.fail("encoded again")
    )
    assert CliRunner().invoke(app, command).exit_code == 0
    assert "dataset.json" in objects(url) and not built.exists()


def test_unfinished_upload_of_another_dataset_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = [f"Text {i} of some that are all different: {i * i}" for i in range(60)]
    corpus, url = write_jsonl(tmp_path / "corpus.jsonl", texts), new_bucket()
    command = ["convert", str(corpus), "--vocab-size", "300", "--out", url]
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.remote.upload_dataset", _fail)
        CliRunner().invoke(app, command)
    made = CliRunner().invoke(app, [*command, "--shuffle-seed", "1"])
    assert made.exit_code == 0 and "left by an unfinished upload" in made.output
    found = fetch_info(url)
    assert found is not None and found.arguments["shuffle_seed"] == 1


def _fail(*_: object, **__: object) -> None:
    raise UserError("s3", "no connection")
