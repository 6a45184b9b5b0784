"""Tests of: data_tools.tokenizers.tokenizer: training and using tokenizers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.tokenizers.tokenizer import SPECIAL_TOKENS, Tokenizer
from dualtrain.common.errors import UserError

TEXTS = [f"The cat number {i} sat on the mat, the dog on the log." for i in range(50)]


@cache
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS, 320)


def test_ids_of_special_tokens_bytes_and_merges() -> None:
    tokenizer = trained()
    assert [tokenizer.special_tokens[name] for name in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.special_ids == tuple(range(16))
    assert tokenizer.vocab_size == 320
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 3
    assert Tokenizer.train(["ab"], 4096).vocab_size < 280, "few texts give fewer merges"


def test_training_is_deterministic() -> None:
    assert Tokenizer.train(iter(TEXTS), 320).sha256 == trained().sha256


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    ids = trained().encode(text)
    assert trained().decode(ids) == text
    assert not ids or min(ids) >= 16


@pytest.mark.parametrize("loaded", [False, True])
def test_special_text_is_ordinary_text(tmp_path: Path, loaded: bool) -> None:
    tokenizer = trained()
    if loaded:
        tokenizer.save(tmp_path / "tokenizer.json")
        tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    text = "a<mask> <s></s>\n<reserved_9><pad><unk>"
    assert min(tokenizer.encode(text)) >= 16
    assert min(tokenizer.encode_array(text)) >= 16
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_array_equals_list() -> None:
    texts = [*TEXTS[:5], "", " leading", "ünï"]
    arrays = [trained().encode_array(text) for text in texts]
    assert [ids.tolist() for ids in arrays] == [trained().encode(text) for text in texts]


def test_saved_file_is_loaded_byte_for_byte(tmp_path: Path) -> None:
    file, copy = tmp_path / "tokenizer.json", tmp_path / "copy.json"
    file.write_text(json.dumps(json.loads(trained().json)).replace(", ", ",   "))
    loaded = Tokenizer.load(file)
    loaded.save(copy)
    assert copy.read_bytes() == file.read_bytes()
    assert loaded.encode(TEXTS[0]) == trained().encode(TEXTS[0])


def test_truncation_and_post_processing_of_a_given_tokenizer_do_not_apply(tmp_path: Path) -> None:
    other = tokenizers.Tokenizer.from_str(trained().json)
    other.enable_truncation(4)
    other.enable_padding(length=64)
    other.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode(TEXTS[0]) == trained().encode(TEXTS[0])
    assert loaded.encode_array(TEXTS[0]).tolist() == trained().encode(TEXTS[0])


def test_missing_special_tokens_come_after_the_vocabulary(tmp_path: Path) -> None:
    model = tokenizers.models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2}, "<unk>")
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.save(str(tmp_path / "plain.json"))
    tokenizer = Tokenizer.load(tmp_path / "plain.json")
    assert tokenizer.added == ("</s>", "<pad>", "<mask>")
    assert [tokenizer.special_tokens[name] for name in SPECIAL_TOKENS] == [1, 0, 3, 4, 5]
    assert tokenizer.vocab_size == 6
    tokenizer.save(tmp_path / "saved.json")
    saved = Tokenizer.load(tmp_path / "saved.json")
    assert saved.added == () and saved.special_tokens == tokenizer.special_tokens
    assert saved.special_ids == (0, 1, 3, 4, 5)
    assert saved.sha256 == tokenizer.sha256
    assert trained().added == ()


def test_special_tokens_are_not_put_on_ids_in_use(tmp_path: Path) -> None:
    holes = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 2, "<unk>": 3}, "<unk>"))
    holes.save(str(tmp_path / "holes.json"))
    with pytest.raises(UserError, match="would get the id 3, which is not free"):
        Tokenizer.load(tmp_path / "holes.json")


def test_round_trip_failures_are_named(tmp_path: Path) -> None:
    assert trained().round_trip_failures() == []
    lower = tokenizers.Tokenizer.from_str(trained().json)
    lower.normalizer = tokenizers.normalizers.Lowercase()
    lower.save(str(tmp_path / "lower.json"))
    failures = Tokenizer.load(tmp_path / "lower.json").round_trip_failures()
    assert any("The quick brown fox" in text for text in failures)
    assert max(len(text) for text in failures) <= 60


def test_dropout_is_refused(tmp_path: Path) -> None:
    content = json.loads(trained().json)
    content["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has a dropout of 0.1: it gives other ids each time"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_unusable_tokenizers(tmp_path: Path) -> None:
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    empty.save(str(tmp_path / "empty.json"))
    closed = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "<unk>"))
    closed.save(str(tmp_path / "closed.json"))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "binary.json").write_bytes(b"\xff")
    cases = {
        "empty.json": "has no tokens",
        "closed.json": "cannot encode text",
        "broken.json": "is not a tokenizer.json",
        "binary.json": "not text in UTF-8",
        "absent.json": "cannot be read",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            Tokenizer.load(tmp_path / name)
