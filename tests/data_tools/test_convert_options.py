"""Tests of: data_tools.convert, app: what settings do, and what becomes of bad input."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.conversions import Said, StopAt, files_of, write_jsonl
from typer.testing import CliRunner

from data_tools.command import app
from data_tools.convert import build_dataset
from data_tools.tokenizers.tokenizer import Tokenizer
from data_tools.train_tokenizer import train_tokenizer
from data_tools.verify import verify_dataset
from dualtrain.common.errors import UserError
from dualtrain.data.dataset import DatasetInfo, TokenDataset
from dualtrain.recipe.schema import BuildSection

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs"]
TEXTS = [
    f"Text {i}: " + " ".join(WORDS[(i * j) % 11] for j in range(1, i % 13 + 3)) for i in range(80)
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


def section(source: object, **changes: object) -> BuildSection:
    values = {"source": source if isinstance(source, list) else str(source), "vocab_size": 300}
    return BuildSection.model_validate(values | {"val_fraction": 0.2} | changes)


def texts_of(path: Path) -> dict[str, list[str]]:
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    splits = {}
    for split in ("train", "val"):
        dataset = TokenDataset.open(path, split)
        splits[split] = [tokenizer.decode(dataset.read(i)) for i in range(dataset.documents)]
    return splits


def test_dataset_is_the_same_with_any_number_of_workers(tmp_path: Path) -> None:
    """Several blocks, so that workers really share them; every byte of every file."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [text * 300 for text in TEXTS] * 3)
    build = section(corpus, drop_duplicates=True)
    found = []
    for workers in (1, 2, 3):
        build_dataset(build, tmp_path / f"{workers}", workers=workers, shard_bytes=100_000)
        found.append(files_of(tmp_path / f"{workers}"))
    assert corpus.stat().st_size > 3 << 20
    assert len([name for name in found[0] if name.endswith(".mds")]) > 3
    assert found[0] == found[1] == found[2]


def test_first_bad_document_stops_whatever_the_workers(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [text * 500 for text in TEXTS] * 3)
    lines = corpus.read_text().splitlines()
    lines[201], lines[150] = "{", '{"body": 1}'
    corpus.write_text("\n".join(lines))
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer.train(TEXTS, 300).save(tokenizer)
    build = section(corpus, tokenizer=str(tokenizer))
    for workers in (1, 2):
        with pytest.raises(UserError) as caught:
            build_dataset(build, tmp_path / "data", workers=workers)
        assert caught.value.where == f"{corpus}:151"
    assert not list(tmp_path.glob(".data*")), "nothing to go on with"


def test_skipping_keeps_the_rest_and_lists_what_was_left_out(tmp_path: Path) -> None:
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    bad = [b"{", b'{"body": 1}', b'{"text": 7}', b'{"text": "\xff"}', b'{"text": "\\ud800"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good[:40], *bad, b'{"text": " "}']))
    packed = gzip.compress(b"\n".join(good[40:]) + b"\n" + os.urandom(100_000).hex().encode())
    (tmp_path / "b.jsonl.gz").write_bytes(packed[:-2000])
    (tmp_path / "c.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="a.jsonl:41: is not JSON"):
        build_dataset(section(tmp_path / "*.jsonl*"), tmp_path / "data")
    info = build_dataset(section(tmp_path / "*.jsonl*", on_error="skip"), tmp_path / "data")
    splits = texts_of(tmp_path / "data")
    assert sorted(splits["train"] + splits["val"]) == sorted(TEXTS)
    assert info.left_out["empty"] == 1
    assert info.left_out["truncated file"] == 1 and info.left_out["empty file"] == 1
    assert info.skipped_documents == sum(info.left_out.values()) == 8
    listed = [json.loads(line) for line in (tmp_path / "data" / "left_out.jsonl").open()]
    places = [entry["where"].removeprefix(f"{tmp_path}/").partition(":") for entry in listed]
    assert [(name, line) for name, _, line in places[:5]] == [
        ("a.jsonl", str(line)) for line in range(41, 46)
    ]
    assert places[5][0] == "b.jsonl.gz" and places[6][0] == "c.jsonl"
    assert len({entry["kind"] for entry in listed}) == len(listed) == 7


def test_nothing_left_names_the_reasons(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(UserError, match="no documents are left: 80 too short"):
        build_dataset(section(corpus, min_characters=10_000), tmp_path / "data")


def test_length_filters_and_duplicates(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [*TEXTS, *TEXTS[:30], "x", "y" * 500])
    build = section(corpus, min_characters=2, max_characters=200, drop_duplicates=True)
    info = build_dataset(build, tmp_path / "data")
    splits = texts_of(tmp_path / "data")
    assert sorted(splits["train"] + splits["val"]) == sorted(TEXTS)
    assert info.left_out == {"duplicate": 30, "too long": 1, "too short": 1}


def test_val_tokens_and_max_tokens(tmp_path: Path, corpus: Path) -> None:
    build = section(corpus, val_fraction=None, val_tokens=100, max_tokens=500)
    info = build_dataset(build, tmp_path / "data")
    assert 100 <= info.splits["val"].tokens < 200
    assert 500 <= info.splits["train"].tokens < 600
    held_out = set(texts_of(tmp_path / "data")["val"])
    expected = Tokenizer.train([t for t in TEXTS if t not in held_out], 300)
    assert expected.vocab_size == info.vocab_size


def test_adding_a_source_moves_no_document_between_splits(tmp_path: Path, corpus: Path) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", [f"{text} again" for text in TEXTS])
    build_dataset(section(corpus), tmp_path / "few")
    build_dataset(section([str(more), str(corpus)]), tmp_path / "many")
    few, many = texts_of(tmp_path / "few"), texts_of(tmp_path / "many")
    assert set(few["val"]) <= set(many["val"]) and set(few["train"]) <= set(many["train"])
    assert len(many["val"]) > len(few["val"])


@pytest.mark.parametrize("given", [False, True], ids=["trained tokenizer", "given tokenizer"])
def test_standard_input(tmp_path: Path, corpus: Path, given: bool) -> None:
    options: dict[str, object] = {}
    if given:
        Tokenizer.train(TEXTS, 300).save(tmp_path / "tokenizer.json")
        options["tokenizer"] = str(tmp_path / "tokenizer.json")
    build_dataset(section(corpus, **options), tmp_path / "file")
    stdin = io.BytesIO(corpus.read_bytes())
    build_dataset(section("-", **options), tmp_path / "stdin", stdin=stdin)
    assert texts_of(tmp_path / "stdin") == texts_of(tmp_path / "file")
    with pytest.raises(UserError, match="standard input cannot be compared"):
        build_dataset(section("-", **options), tmp_path / "stdin", stdin=io.BytesIO())


def test_interrupted_standard_input_starts_again(tmp_path: Path, corpus: Path) -> None:
    stdin = io.BytesIO(corpus.read_bytes())
    with pytest.raises(KeyboardInterrupt):
        build_dataset(section("-"), tmp_path / "data", stdin=stdin, report=StopAt("writing val"))
    said = Said()
    other = io.BytesIO(write_jsonl(tmp_path / "other.jsonl", TEXTS[:60]).read_bytes())
    build_dataset(section("-"), tmp_path / "data", stdin=other, report=said)
    assert "can be read once only" in said.lines[0]
    splits = texts_of(tmp_path / "data")
    assert sorted(splits["train"] + splits["val"]) == sorted(TEXTS[:60])


def test_pipe_is_read_once(tmp_path: Path, corpus: Path) -> None:
    """A tokenizer given, there is nothing to read twice; otherwise there is no way."""
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="has a pipe, which can be read once only"):
        build_dataset(section(pipe), tmp_path / "data")
    Tokenizer.train(TEXTS, 300).save(tmp_path / "tokenizer.json")
    writer = threading.Thread(target=lambda: pipe.write_bytes(corpus.read_bytes()))
    writer.start()
    build = section(pipe, tokenizer=str(tmp_path / "tokenizer.json"))
    info = build_dataset(build, tmp_path / "data")
    writer.join()
    assert sum(split.documents for split in info.splits.values()) == len(TEXTS)


def test_standard_input_may_be_closed(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as Python sets it for `<&-`
    build_dataset(section(corpus), tmp_path / "data")
    train_tokenizer(section(corpus), tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="standard input: is closed"):
        build_dataset(section("-"), tmp_path / "other")


@pytest.mark.parametrize("stage", ["index.json", "lengths.npy", "dataset.json"])
def test_full_disk_at_any_stage(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """A device that is always full, in place of one of the files that are written."""
    real_open = open

    def full(file: object, *arguments: Any, **options: Any) -> Any:
        return real_open("/dev/full" if str(file).endswith(stage) else file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        patch.setattr("io.open", full)
        patch.setattr(Path, "open", full)  # Python 3.10's goes by another name
        with pytest.raises(UserError, match="cannot be written: No space left.*make room"):
            build_dataset(section(corpus), tmp_path / "data")
    assert not (tmp_path / "data").exists()
    said = Said()
    build_dataset(section(corpus), tmp_path / "data", report=said)
    assert "going on" in said.lines[0]
    verify_dataset(tmp_path / "data")


def test_names_that_are_not_utf8_are_recorded(tmp_path: Path, corpus: Path) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/na\xefve"))
    source.mkdir()
    corpus.rename(source / "a.jsonl")
    build = section(tmp_path / "na*")
    info = build_dataset(build, source / "data")
    assert [file.path for file in info.sources] == [f"{tmp_path}/na\\xefve/a.jsonl"]
    assert info.sources[0].sha256 is not None
    assert build_dataset(build, source / "data") == info, "the same command accepts it"
    result = CliRunner().invoke(app, ["convert", str(source), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, UserError)
    assert "na\\xefve' is not UTF-8" in str(result.exception)
    result = CliRunner().invoke(app, ["inspect", str(source / "data")])
    assert result.exit_code == 0 and "na\\xefve/data: vocabulary" in result.output


@pytest.mark.parametrize(
    "command",
    [
        "convert '' --out out",
        "convert source --out ''",
        "convert source --out out --tokenizer ''",
        "convert source --out s3://a/b --local ''",
        "tokenizer train source --vocab-size 300 --out ''",
        "tokenizer train '' --vocab-size 300 --out out",
        "merge a '' --out out",
        "merge a b --out ''",
        "verify ''",
        "inspect ''",
    ],
)
def test_empty_path_is_not_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "source", TEXTS).rename(tmp_path / "source.jsonl")
    command = command.replace("source", "source.jsonl")
    result = CliRunner().invoke(app, shlex.split(command))
    assert isinstance(result.exception, UserError), result.output
    assert re.search("empty|'' is not allowed", str(result.exception))
    assert [file.name for file in tmp_path.iterdir()] == ["source.jsonl"]


@pytest.mark.parametrize(
    "command",
    [
        "convert corpus.jsonl --out LONG",
        "convert LONG --out out",
        "tokenizer train corpus.jsonl --vocab-size 300 --out LONG",
        "merge LONG LONG2 --out out",
        "verify LONG",
        "inspect LONG",
        "convert corpus.jsonl --out loop/x",
        "convert corpus.jsonl --out corpus.jsonl/x",
    ],
)
def test_place_that_no_file_can_have(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    result = CliRunner().invoke(app, command.replace("LONG", "x" * 300).split())
    assert isinstance(result.exception, UserError), result.output
    assert re.search("too long|cannot be written|is a file", str(result.exception))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--tokenizer t.json --vocab-size 300", "--vocab-size"),
        ("--tokenizer-pattern gpt2", "--tokenizer-pattern"),
        ("--keep-order --shuffle-seed 1", "--shuffle-seed"),
        ("--separator |", "--separator"),
        ("--format txt", "--format"),
        ("--local here", "--local"),
    ],
)
def test_option_without_effect_is_refused(
    tmp_path: Path, corpus: Path, options: str, named: str
) -> None:
    command = ["convert", str(corpus), "--out", str(tmp_path / "out"), *options.split()]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, UserError), result.output
    assert result.exception.where == named


def test_directory_with_splits_is_said_by_both_commands(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_jsonl(tmp_path / "source" / "train.jsonl", TEXTS)
    write_jsonl(tmp_path / "source" / "test.jsonl", ["held out"])
    said = Said()
    info = build_dataset(section(tmp_path / "source"), tmp_path / "data", report=said)
    assert sum(split.documents for split in info.splits.values()) == len(TEXTS)
    train_tokenizer(section(tmp_path / "source"), tmp_path / "tokenizer.json", report=said)
    assert [line for line in said.lines if "only the split train is read" in line] == [
        said.lines[0]
    ] * 2


def test_full_disk_is_an_error_and_the_same_command_goes_on(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [text * 100 for text in TEXTS])
    command = [sys.executable, "-m", "dualtrain", "data", "convert", str(corpus)]
    command += ["--out", str(tmp_path / "data"), "--vocab-size", "300", "--workers", "1"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    failed = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert failed.returncode == 2, failed.stderr
    assert "cannot be written: File too large" in failed.stderr
    assert "the same command goes on from there" in failed.stderr
    assert "Traceback" not in failed.stderr and not (tmp_path / "data").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "going on" in again.stderr
    verify_dataset(tmp_path / "data")


def test_every_option_of_the_command(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "data"
    (tmp_path / "more.data").write_text("One more.|" + "|".join(TEXTS[:5]))
    command = ["convert", str(corpus), str(tmp_path / "more.data"), "--out", str(out)]
    options = {
        "--format": "txt",
        "--text-field": "text",
        "--separator": "|",
        "--on-error": "skip",
        "--min-characters": "1",
        "--max-characters": "100000",
        "--vocab-size": "290",
        "--val-fraction": "0.3",
        "--val-tokens": "50",
        "--max-tokens": "2000",
        "--shuffle-seed": "3",
        "--workers": "1",
    }
    words = [word for pair in options.items() for word in pair]
    made = CliRunner().invoke(app, [*command, *words, "--drop-duplicates"])
    assert made.exit_code == 0, made.output
    arguments = DatasetInfo.load(out).arguments
    for option, value in options.items():
        if option != "--workers":
            assert str(arguments[option[2:].replace("-", "_")]) == value
    assert arguments["drop_duplicates"] is True and arguments["source"] == command[1:3]
    assert DatasetInfo.load(out).left_out["duplicate"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--on-error", "ignore"],
            "--on-error: 'ignore' is not allowed — expected 'stop' or 'skip'",
        ),
        (["--format", "pdf"], "--format: 'pdf' is not allowed"),
        (["--val-fraction", "3"], "--val-fraction: 3.0 is not allowed — expected less than 1"),
        (["--max-tokens", "0"], "--max-tokens: 0 is not allowed"),
        (["--local", "there"], "--local: goes with a URL as --out only"),
    ],
)
def test_wrong_options(tmp_path: Path, corpus: Path, options: list[str], message: str) -> None:
    command = ["convert", str(corpus), "--out", str(tmp_path / "data"), *options]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, UserError)
    assert message in str(refused.exception)


def test_files_of_other_kinds_are_mentioned(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS)
    (tmp_path / "in" / "notes.md").write_text("x")
    made = CliRunner().invoke(
        app, ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "d"), "--vocab-size", "300"]
    )
    assert made.exit_code == 0
    assert "1 files of other kinds are not read, first" in made.output


def test_dataset_in_a_searched_directory_is_no_text(tmp_path: Path) -> None:
    """Made from the directory it stands in: converting again finds the same source."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    build = section(tmp_path)
    info = build_dataset(build, tmp_path / "mds")
    assert build_dataset(build, tmp_path / "mds") == info
    more = build_dataset(build, tmp_path / "elsewhere" / "mds")
    assert more.splits == info.splits
    with pytest.raises(UserError, match="is a dataset already"):
        build_dataset(section(tmp_path / "mds"), tmp_path / "again")


def test_an_empty_source_is_one_sentence(tmp_path: Path) -> None:
    """Pydantic has one for each type that the setting may have."""
    refused = CliRunner().invoke(app, ["convert", "", "--out", str(tmp_path / "data")])
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception).startswith("SOURCES: an empty name is given")
    assert "\n" not in str(refused.exception)
