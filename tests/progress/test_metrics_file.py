"""Tests of: dualtrain.progress.metrics.

metrics.jsonl: append, repair, truncate, read; a full disk.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dualtrain.common.errors import UserError
from dualtrain.progress.metrics import MetricsFile, Record, finite, read_metrics


def train(step: int, **changes: object) -> Record:
    record = {"kind": "train", "step": step, "ar_loss": step / 7, "logged": {"ü": 1.0}, **changes}
    return record  # type: ignore[return-value]


def held_out(step: int) -> Record:
    return {"kind": "eval", "step": step, "ar_nll": 1.0}  # type: ignore[return-value,typeddict-item]


def scores(step: int) -> Record:
    return {"kind": "tasks", "step": step, "tasks": {"a": {"score": math.nan}}}  # type: ignore[return-value,typeddict-item]


def event(step: int) -> Record:
    return {"kind": "event", "step": step, "event": "checkpoint", "message": "a\nb"}


def test_what_is_appended_is_read_back(tmp_path: Path):
    path = tmp_path / "new" / "metrics.jsonl"
    records = [train(1), held_out(1), event(1), train(2)]
    with MetricsFile(path) as metrics:
        for record in records:
            metrics.append(record)
            # Flushed: a reader sees it while the run goes on.
            assert read_metrics(path)[-1] == record
    with MetricsFile(path) as metrics:
        metrics.append(train(3))
    assert read_metrics(path) == [*records, train(3)]
    assert path.read_text().count("\n") == 5


def test_non_finite_numbers_become_null_and_the_line_stays_json(tmp_path: Path):
    path = tmp_path / "m"
    with MetricsFile(path) as metrics:
        metrics.append(train(1, ar_loss=math.nan, lr=math.inf, logged={"x": -math.inf}))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert (line["ar_loss"], line["lr"], line["logged"]) == (None, None, {"x": None})


def test_any_torn_last_line_is_repaired(tmp_path: Path):
    whole = tmp_path / "whole"
    with MetricsFile(whole) as metrics:
        metrics.append(train(1))
        metrics.append(train(2))
    content = whole.read_bytes()
    first_line = content.index(b"\n") + 1
    for length in range(len(content) + 1):
        torn = tmp_path / "torn"
        torn.write_bytes(content[:length])
        # A line that lacks nothing but its newline is whole.
        expected = [train(1)] * (length >= first_line - 1) + [train(2)] * (
            length >= len(content) - 1
        )
        assert read_metrics(torn) == expected
        with MetricsFile(torn) as metrics:
            metrics.append(train(9))
        assert read_metrics(torn) == [*expected, train(9)]
        assert torn.read_bytes().endswith(b"\n")


def test_a_tail_of_zero_bytes_is_a_torn_line(tmp_path: Path):
    path = tmp_path / "m"
    with MetricsFile(path) as metrics:
        metrics.append(train(1))
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    MetricsFile(path).close()
    assert read_metrics(path) == [train(1)]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"step": 1}', '{"kind": "other"}', ""])
def test_a_bad_line_in_the_middle_is_named(tmp_path: Path, line: str):
    path = tmp_path / "m"
    path.write_text(json.dumps(train(1)) + "\n" + line + "\n" + json.dumps(train(2)) + "\n")
    with pytest.raises(UserError, match=r"m:2: not a metrics record"):
        read_metrics(path)


def test_truncation_drops_later_losses_and_keeps_events(tmp_path: Path):
    path = tmp_path / "m"
    with MetricsFile(path) as metrics:
        for step in (10, 20, 30):
            metrics.append(train(step))
            metrics.append(held_out(step))
            metrics.append(scores(step))
            metrics.append(event(step))
        assert metrics.truncate_after(20) == 3
        assert metrics.truncate_after(20) == 0
        metrics.append(train(30))
    expected = [finite(r(s)) for s in (10, 20) for r in (train, held_out, scores, event)]
    assert read_metrics(path) == [*expected, event(30), train(30)]
    assert os.listdir(tmp_path) == ["m"]


def test_a_crash_while_truncating_leaves_the_old_file_whole(tmp_path: Path):
    path = tmp_path / "m"
    with MetricsFile(path) as metrics:
        for step in range(5):
            metrics.append(train(step))
    before = path.read_bytes()
    script = (
        "import os, sys\n"
        "from dualtrain.progress.metrics import MetricsFile\n"
        "os.replace = lambda *names: os._exit(9)\n"
        "MetricsFile(sys.argv[1]).truncate_after(2)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == 9
    assert path.read_bytes() == before
    with MetricsFile(path) as metrics:
        assert metrics.truncate_after(2) == 2
    assert len(read_metrics(path)) == 3


def test_missing_and_unwritable_files_are_the_users(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_records_wait_while_the_disk_is_full(tmp_path: Path):
    metrics = MetricsFile(tmp_path / "m")
    metrics.append(train(1))
    there, metrics._file = metrics._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    metrics.append(train(2))
    metrics.append(train(3))
    assert metrics.waits
    with pytest.raises(UserError, match="lacks the last records of the run, as the disk is full"):
        metrics.finish()
    assert [record["step"] for record in read_metrics(tmp_path / "m")] == [1]
    metrics._file = there
    metrics.append(train(4))
    assert not metrics.waits
    metrics.finish()
    assert [record["step"] for record in read_metrics(tmp_path / "m")] == [1, 2, 3, 4]


def test_a_full_disk_leaves_whole_records(tmp_path: Path):
    """A limit on the file's size stands for the full disk: it ends within a record."""
    metrics = MetricsFile(tmp_path / "m")
    metrics.append(train(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "m").stat().st_size + 20, hard))
    try:
        metrics.append(train(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert metrics.waits
    assert (tmp_path / "m").read_bytes() == json.dumps(train(1)).encode() + b"\n"
    metrics.append(train(3))
    assert [record["step"] for record in read_metrics(tmp_path / "m")] == [1, 2, 3]
