"""Tests of: data_tools.convert, shards: whatever ends it, there is nothing or a whole dataset."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers.conversions import write_jsonl

from data_tools import shards
from data_tools.convert import _KEY_FILE, build_dataset
from data_tools.tokenizers.tokenizer import Tokenizer
from data_tools.verify import verify_dataset
from dualtrain.common.errors import UserError
from dualtrain.common.files import beside
from dualtrain.data.dataset import DatasetInfo
from dualtrain.recipe.schema import BuildSection

TESTS = Path(__file__).parents[1]
TEXTS = [f"Text {i} of some that are all different: {i * i}" for i in range(200)]


def test_kills_at_random_moments() -> None:
    """`tests/experiments/kill_conversions.py` does the same with more trials."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.kill_conversions", "--trials", "6", "--seed", "1"],
        cwd=TESTS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= 6 and found["went_on"] >= 3 and len(found["stages"]) >= 3


def test_error_while_writing_leaves_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MDSWriter as a context manager writes a valid index over partial data; ours must not."""
    import streaming

    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    build = BuildSection(source=str(corpus), vocab_size=300, val_fraction=0.2)
    written = []
    write = streaming.MDSWriter.write

    def fail(writer: object, sample: dict[str, np.ndarray]) -> None:
        if len(written) == 50:
            raise RuntimeError("in the writer")
        written.append(sample)
        write(writer, sample)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(streaming.MDSWriter, "write", fail)
        with pytest.raises(RuntimeError, match="in the writer"):
            build_dataset(build, tmp_path / "data", shard_bytes=500)
    assert list(tmp_path.rglob("*.mds")), "some shards were written"
    assert not list(tmp_path.rglob("index.json")) and not (tmp_path / "data").exists()
    build_dataset(build, tmp_path / "data")
    verify_dataset(tmp_path / "data")


def test_what_reads_back_differently_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    build = BuildSection(source=str(corpus), vocab_size=300, val_fraction=0.2)
    write = shards.write_split

    def damage(directory: Path, split: str, *args: object, **options: object) -> None:
        write(directory, split, *args, **options)  # type: ignore[arg-type]
        shard = directory / split / "shard.00000.mds"
        content = shard.read_bytes()
        shard.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))

    with monkeypatch.context() as patch:
        patch.setattr("data_tools.shards.write_split", damage)
        with pytest.raises(UserError, match="reads back differently"):
            build_dataset(build, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_killed_worker_is_an_error_and_the_same_command_goes_on(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [" ".join(TEXTS) for _ in range(2000)])
    Tokenizer.train(TEXTS, 300).save(tmp_path / "tokenizer.json")
    command = [sys.executable, "-m", "dualtrain", "data", "convert", str(corpus)]
    command += ["--out", str(tmp_path / "data"), "--workers", "2"]
    command += ["--tokenizer", str(tmp_path / "tokenizer.json")]
    # The large documents are all the same, which alone could not be divided.
    with corpus.open("a") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    worker = first_worker(process)
    # Stopped before it can be done: else a fast machine might end before the kill.
    os.kill(worker, signal.SIGSTOP)
    wait_for_file(process, beside(tmp_path / "data"), _KEY_FILE)
    os.kill(worker, signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 2, said
    assert "a worker process died" in said and "Traceback" not in said
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "going on" in again.stderr, again.stderr
    splits = DatasetInfo.load(tmp_path / "data").splits
    assert sum(split.documents for split in splits.values()) == 2200


def first_worker(process: subprocess.Popen) -> int:
    """The number of a process that will encode, as soon as there is one."""
    while process.poll() is None:
        for child in psutil.Process(process.pid).children():
            if "spawn_main" in " ".join(child.cmdline()):
                return child.pid
        time.sleep(0.01)
    raise AssertionError("no worker was started")


def wait_for_file(process: subprocess.Popen, directory: Path, name: str) -> None:
    while not list(directory.rglob(name)):
        assert process.poll() is None, f"no {name} in {directory}"
        time.sleep(0.01)
