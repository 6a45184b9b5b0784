"""Tests of: data_tools.tokenizers.fast, patterns: the same ids by the fast way."""

from __future__ import annotations

import json
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from data_tools.tokenizers import tokenizer as tokenizer_module
from data_tools.tokenizers.patterns import CL100K, O200K, segments
from data_tools.tokenizers.probes import probe_texts
from data_tools.tokenizers.tokenizer import SPECIAL_TOKENS, Tokenizer
from dualtrain.common.errors import UserError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
NANOCHAT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPLITS = {
    "llama3": LLAMA3,
    "qwen2": QWEN2,
    "nanochat": NANOCHAT,
    "cl100k_base": CL100K.json,
    "o200k_base": O200K.json,
}
KINDS = ("gpt2", "prefix_space", "nfc", *SPLITS)


def pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    if kind not in SPLITS:
        return pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix_space")
    split = pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


@cache
def of_kind(kind: str) -> Tokenizer:
    """A tokenizer with merges over spaces, breaks, digits and letters, divided in this way."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer(kind)
    trained.decoder = tokenizers.decoders.ByteLevel()
    if kind == "nfc":
        trained.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator([text for text in probe_texts() if len(text) < 2000], trainer)
    return Tokenizer(trained.to_str(), where=kind)


def changed(**model: Any) -> dict[str, Any]:
    config = json.loads(of_kind("gpt2").json)
    config["model"].update(model)
    return config


def load(config: dict[str, Any]) -> Tokenizer:
    return Tokenizer(json.dumps(config), where="changed")


@pytest.mark.parametrize("kind", KINDS)
def test_usual_byte_level_tokenizers_go_through_tiktoken(kind: str) -> None:
    tokenizer = of_kind(kind)
    assert tokenizer.backend == "tiktoken"
    for text in probe_texts():
        ids = tokenizer.encode_array(text)
        assert ids.dtype == np.uint32
        assert ids.tolist() == tokenizer.encode(text), repr(text[:60])


ODD = st.text(
    st.sampled_from(list(" \n\t\r\xa0\u2028\x1c\x02aZ9'/.,!。，éǅs中e\u0301")), max_size=40
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=ODD | st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@example("a \n\n b  c\n /d")
def test_any_text_has_the_same_ids_cut_or_not(kind: str, text: str) -> None:
    tokenizer = of_kind(kind)
    expected = tokenizer.encode(text)
    assert tokenizer.encode_array(text).tolist() == expected
    parts = list(segments(text, 3, only_at_spaces=kind == "prefix_space"))
    assert "".join(parts) == text
    assert [i for part in parts for i in tokenizer.encode(part)] == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), length=st.integers(0, 40))
def test_any_ids_have_the_same_text(kind: str, seed: int, length: int) -> None:
    """Also where bytes are no UTF-8, as at the end of a document that was cut."""
    tokenizer = of_kind(kind)
    of_text = sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.special_ids))
    ids = np.random.default_rng(seed).choice(of_text, length)
    assert tokenizer.decode_array(ids) == tokenizer.decode(ids.tolist())


@pytest.mark.parametrize("backend", ["tiktoken", "tokenizers"])
@pytest.mark.parametrize("kind", ["prefix_space", "llama3"])
def test_documents_longer_than_a_segment(
    kind: str, backend: tokenizer_module.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(text for text in probe_texts() if len(text) < 2000) * 3
    expected = of_kind(kind).encode(text)
    monkeypatch.setattr("data_tools.tokenizers.patterns.SEGMENT_CHARS", 500)
    tokenizer = Tokenizer(of_kind(kind).json, where=kind, backend=backend)
    assert tokenizer.backend == backend
    assert tokenizer.encode_array(text).tolist() == expected


def test_pieces_end_where_words_begin() -> None:
    text = "word " * 1000
    assert max(len(piece) for piece in segments(text, 50)) < 60
    assert max(len(piece) for piece in segments("line\n" * 1000, 50)) < 60
    assert max(len(piece) for piece in segments("中文，" * 1000, 50)) < 60
    assert list(segments(" " * 1000, 50)) == [" " * 1000]


@pytest.mark.parametrize(
    ("kind", "piece"),
    [("gpt2", "a"), ("gpt2", " "), ("gpt2", "\n"), ("llama3", "\t "), ("llama3", "\xff\x02")],
)
def test_runs_of_a_million_characters(kind: str, piece: str) -> None:
    """tiktoken's own pattern overflows its stack here, and a naive merge takes hours."""
    tokenizer = of_kind(kind)
    text = (piece * 1_000_000)[:1_000_000] + "x"
    start = time.perf_counter()
    ids = tokenizer.encode_array(text)
    assert time.perf_counter() - start < 20
    assert tokenizer.decode(ids) == text


def test_marks_are_found_that_the_text_has_not() -> None:
    tokenizer = of_kind("llama3")
    text = "".join(f"{chr(i)}  x{chr(i)} \n  " for i in (*range(32), *range(0xE000, 0xE010)))
    assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


def test_every_pair_of_a_token_listed_as_merge() -> None:
    """Converters of rank files list them so: many merges with one result, side by side."""
    config = changed()
    known = config["model"]["vocab"]
    config["model"]["merges"] = [
        [token[:i], token[i:]]
        for token in ("".join(pair) for pair in config["model"]["merges"])
        for i in range(1, len(token))
        if token[:i] in known and token[i:] in known
    ]
    tokenizer = load(config)
    assert tokenizer.backend == "tiktoken"
    for text in probe_texts():
        assert tokenizer.encode(text) == of_kind("gpt2").encode(text)


def with_pre_tokenizer(regex: str) -> dict[str, Any]:
    config = json.loads(of_kind("llama3").json)
    config["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex
    return config


def with_added_token() -> dict[str, Any]:
    added = tokenizers.Tokenizer.from_str(of_kind("gpt2").json)
    added.add_tokens(["quick brown"])
    return json.loads(added.to_str())


def with_merges_reversed() -> dict[str, Any]:
    return changed(merges=json.loads(of_kind("gpt2").json)["model"]["merges"][::-1])


@pytest.mark.parametrize(
    "config",
    [
        changed(byte_fallback=True, unk_token="<unk>"),
        with_pre_tokenizer(r"\p{L}+|[^\p{L}]"),
        with_added_token(),
        with_merges_reversed(),
    ],
    ids=["byte_fallback", "unknown pattern", "added token", "unreachable tokens"],
)
def test_what_tiktoken_cannot_express_goes_through_tokenizers(config: dict[str, Any]) -> None:
    tokenizer = load(config)
    assert tokenizer.backend == "tokenizers"
    for text in ("The quick brown fox", "", "a  b\n\n c"):
        assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


def test_a_difference_on_a_probe_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: object, text: str) -> np.ndarray:
        return np.array([7] * len(text), dtype=np.uint32)

    content = of_kind("gpt2").json
    monkeypatch.setattr("data_tools.tokenizers.fast.FastEncoder.encode", wrong)
    assert Tokenizer(content, where="gpt2").backend == "tokenizers"


@pytest.mark.parametrize("backend", ["tiktoken", "tokenizers"])
def test_lone_surrogates_are_not_replaced(backend: tokenizer_module.Backend) -> None:
    tokenizer = Tokenizer(of_kind("gpt2").json, where="gpt2", backend=backend)
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode_array("a\ud800b")


def test_too_long_for_an_unknown_division(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_UNDIVIDED_CHARS", 10)
    tokenizer = load(with_pre_tokenizer(r"\p{L}+|[^\p{L}]"))
    assert len(tokenizer.encode_array("a" * 10))
    with pytest.raises(UserError, match="a text of 11 characters"):
        tokenizer.encode_array("a" * 11)
    monkeypatch.setattr("data_tools.tokenizers.patterns.SEGMENT_CHARS", 2)
    assert len(of_kind("gpt2").encode_array("a b c d e f g")), "known divisions have no limit"
