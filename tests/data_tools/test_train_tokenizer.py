"""Tests of: data_tools.train_tokenizer: `dualtrain data tokenizer train`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from helpers.conversions import write_jsonl
from typer.testing import CliRunner

from data_tools.command import app
from data_tools.tokenizers.tokenizer import SPECIAL_TOKENS, Tokenizer
from data_tools.train_tokenizer import train_tokenizer
from dualtrain.common.errors import UserError
from dualtrain.recipe.schema import BuildSection

TEXTS = [f"Text {i} of some that are all different: {i * i}" for i in range(60)]


def build(source: str, **options: object) -> BuildSection:
    return BuildSection.model_validate({"source": source, "vocab_size": 320} | options)


def test_command_writes_a_tokenizer_that_convert_takes(tmp_path: Path) -> None:
    corpus, file = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "deep" / "tokenizer.json"
    command = ["tokenizer", "train", str(corpus), "--vocab-size", "320", "--out", str(file)]
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0, made.output
    tokenizer = Tokenizer.load(file)
    assert tokenizer.sha256 == Tokenizer.train(TEXTS, 320).sha256
    assert [tokenizer.special_tokens[name] for name in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    size, tokens = sum(map(len, TEXTS)), sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert f"vocabulary 320, {size / tokens:.3f} bytes/token" in made.output
    convert = ["convert", str(corpus), "--out", str(tmp_path / "d"), "--tokenizer", str(file)]
    assert CliRunner().invoke(app, convert).exit_code == 0
    assert (tmp_path / "d" / "tokenizer.json").read_bytes() == file.read_bytes()
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, UserError) and "exists" in str(refused.exception)


def test_filters_and_standard_input(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in [*TEXTS, "x" * 500]]
    stdin = io.BytesIO("\n".join([*lines, "{"]).encode())
    file = tmp_path / "tokenizer.json"
    train_tokenizer(build("-", max_characters=400, on_error="skip"), file, stdin=stdin)
    assert Tokenizer.load(file).sha256 == Tokenizer.train(TEXTS, 320).sha256
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_failures_leave_nothing(tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", TEXTS)
    bad.write_text(bad.read_text() + "{")
    file = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="bad.jsonl:61: is not JSON"):
        train_tokenizer(build(str(bad)), file, stdin=io.BytesIO())
    with pytest.raises(UserError, match="has no text to learn from"):
        blank = write_jsonl(tmp_path / "blank.jsonl", [" ", ""])
        train_tokenizer(build(str(blank)), file, stdin=io.BytesIO())
    with pytest.raises(UserError, match="cannot be written"):
        train_tokenizer(build(str(bad)), bad / "tokenizer.json", stdin=io.BytesIO())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "blank.jsonl"]
