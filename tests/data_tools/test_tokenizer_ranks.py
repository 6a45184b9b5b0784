"""Tests of: data_tools.tokenizers.ranks, named: whatever ``--tokenizer`` may name."""

from __future__ import annotations

import base64
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken
import tiktoken.registry
from tiktoken_ext import openai_public

from data_tools.tokenizers.fast import token_bytes
from data_tools.tokenizers.probes import probe_texts
from data_tools.tokenizers.ranks import find_tokenizer
from data_tools.tokenizers.tokenizer import SPECIAL_TOKENS, Tokenizer
from dualtrain.common.errors import UserError

TEXTS = [f"The cat number {i} sat on  the mat,\n\n the dog's log." for i in range(50)]


def small_ranks(*more: bytes) -> dict[bytes, int]:
    """Ranks of a trained tokenizer, from 0 on, and some tokens that no merge makes."""
    vocabulary = json.loads(Tokenizer.train(TEXTS, 340).json)["model"]["vocab"]
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)[16:]
    return {token: i for i, token in enumerate([*map(token_bytes, ordered), *more])}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = (base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items())
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def assert_same_ids(tokenizer: Tokenizer, encoding: tiktoken.Encoding) -> None:
    for text in (*probe_texts(), *TEXTS):
        assert tokenizer.encode(text) == encoding.encode_ordinary(text), repr(text[:60])
        assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


def test_tokenizer_json_and_its_directory(tmp_path: Path) -> None:
    trained = Tokenizer.train(TEXTS, 300)
    trained.save(tmp_path / "tokenizer.json")
    assert find_tokenizer(str(tmp_path)).sha256 == trained.sha256
    assert find_tokenizer(str(tmp_path / "tokenizer.json")).sha256 == trained.sha256


@pytest.mark.parametrize("name", ["p50k_base", "cl100k_base", "o200k_base"])
def test_rank_files_of_well_known_name(tmp_path: Path, name: str) -> None:
    ranks = small_ranks()
    tokenizer = find_tokenizer(str(write_ranks(tmp_path / f"{name}.tiktoken", ranks)))
    regex = {
        "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        "o200k_base": openai_public_pattern(),
    }.get(name, openai_public.r50k_pat_str)
    encoding = tiktoken.Encoding(name, pat_str=regex, mergeable_ranks=ranks, special_tokens={})
    assert_same_ids(tokenizer, encoding)
    assert tokenizer.backend == "tiktoken"
    assert tokenizer.added == SPECIAL_TOKENS
    assert min(tokenizer.special_ids) == len(ranks)
    assert tokenizer.round_trip_failures() == []


def openai_public_pattern() -> str:
    """tiktoken's pattern of o200k, which it builds within a function that would download."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
        return openai_public.o200k_base()["pat_str"]


def test_pattern_given_by_name_or_as_regular_expression(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "mine.ranks", small_ranks())
    with pytest.raises(UserError, match="does not say how text is divided.*--tokenizer-pattern"):
        find_tokenizer(str(path))
    by_name = find_tokenizer(str(path), pattern="gpt2")
    assert by_name.backend == "tiktoken"
    own = find_tokenizer(str(path), pattern=r"\p{L}+|[^\p{L}]+")
    assert own.backend == "tokenizers"
    assert own.encode("the dog's") != by_name.encode("the dog's")
    with pytest.raises(UserError, match="is not a regular expression"):
        find_tokenizer(str(path), pattern="(")
    with pytest.raises(UserError, match="gives other ids than tiktoken"):
        find_tokenizer(str(path), pattern=r"\p{L}{1,3}+|[^\p{L}]+")
    by_name.save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="is not a rank file"):
        find_tokenizer(str(tmp_path / "tokenizer.json"), pattern="gpt2")


def test_tokens_that_no_merge_makes_are_whole_words_only(tmp_path: Path) -> None:
    ranks = small_ranks(b"zqxj", b" zqxj")
    tokenizer = find_tokenizer(str(write_ranks(tmp_path / "gpt2.tiktoken", ranks)))
    encoding = tiktoken.Encoding(
        "x", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    assert len(tokenizer.encode("zqxj zqxj")) == 2 < len(tokenizer.encode("azqxj"))
    assert_same_ids(tokenizer, encoding)
    assert tokenizer.backend == "tiktoken"


def test_gaps_between_ids_become_special_tokens(tmp_path: Path) -> None:
    ranks = {token: rank + 3 * (rank > 280) for token, rank in small_ranks().items()}
    tokenizer = find_tokenizer(str(write_ranks(tmp_path / "gpt2.tiktoken", ranks)))
    assert {281, 282, 283} <= set(tokenizer.special_ids)
    assert tokenizer.decode([281]) == "<|unused_281|>"
    encoding = tiktoken.Encoding(
        "x", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    assert_same_ids(tokenizer, encoding)


def test_rank_file_changed_on_disk_is_read_again(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "gpt2.tiktoken", small_ranks())
    before = find_tokenizer(str(path)).vocab_size
    write_ranks(path, small_ranks(b"zq"))
    assert find_tokenizer(str(path)).vocab_size == before + 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"YWI=", "3: not a line of a rank file: 'YWI='"),
        (b"YW!I= 7", "3: not a line of a rank file"),
        (b"YWI= seven", "3: not a line of a rank file"),
        (b"YQ== 7", "3: the token of line 1 again: b'a'"),
        (b"YWI= 1", "3: the rank of line 2 again: 1"),
        (b"YWI= 7", "254 of the 256 single bytes have no rank, first 0x00"),
    ],
)
def test_bad_rank_files(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "gpt2.tiktoken"
    path.write_bytes(b"YQ== 0\nYg== 1\n" + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        find_tokenizer(str(path))
    assert str(path) in caught.value.where


def test_ranks_far_apart_are_refused(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "gpt2.tiktoken", small_ranks() | {b"zq": 2_000_000_000})
    with pytest.raises(UserError, match="have no token"):
        find_tokenizer(str(path))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, a fresh registry, and a failure for whoever opens a socket."""

    def forbidden(*_: object, **__: object) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    cache = tmp_path / "cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    return cache


PLUGIN = """
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str


def build(place, specials):
    ranks = load_tiktoken_bpe(place)
    name = "plugin"
    return dict(name=name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials)


ENCODING_CONSTRUCTORS = {{
    "plugin-local": lambda: build({path!r}, {{"<|end|>": {end}, "<s>": {end} + 4}}),
    "plugin-remote": lambda: build("https://example.org/plugin.tiktoken", {{}}),
    "plugin-collision": lambda: build({path!r}, {{"<|end|>": 97}}),
}}
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: Path) -> Iterator[Path]:
    """Three encodings in a ``tiktoken_ext`` directory of their own; the file of their ranks."""
    import tiktoken_ext

    path = write_ranks(tmp_path / "plugin.tiktoken", small_ranks())
    folder = tmp_path / "site" / "tiktoken_ext"
    folder.mkdir(parents=True)
    content = PLUGIN.format(path=str(path), end=len(small_ranks()))
    (folder / "small_plugin.py").write_text(content)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(tiktoken_ext, "__path__", [*tiktoken_ext.__path__, str(folder)])
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", None)
    tiktoken.registry._available_plugin_modules.cache_clear()
    yield path
    tiktoken.registry._available_plugin_modules.cache_clear()
    sys.modules.pop("tiktoken_ext.small_plugin", None)


def test_encoding_of_a_plugin(plugin: Path) -> None:
    tokenizer = find_tokenizer("plugin-local")
    end = len(small_ranks())
    assert tokenizer.decode([end]) == "<|end|>"
    assert tokenizer.special_tokens["<s>"] == end + 4
    assert tokenizer.added == ("<unk>", "</s>", "<pad>", "<mask>")
    assert tokenizer.special_ids == tuple(range(end, end + 9))
    assert min(tokenizer.special_tokens[name] for name in tokenizer.added) == end + 5
    assert_same_ids(tokenizer, tiktoken.get_encoding("plugin-local"))


def test_local_ranks_of_a_plugin_are_read_afresh(
    plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = find_tokenizer("plugin-local").sha256
    shifted = {token: (rank + 1) % len(small_ranks()) for token, rank in small_ranks().items()}
    write_ranks(plugin, shifted)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    assert find_tokenizer("plugin-local").sha256 != before


def test_colliding_special_ids_are_refused(plugin: Path) -> None:
    with pytest.raises(UserError, match="'<|end|>' with id 97 collides"):
        find_tokenizer("plugin-collision")


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_harmony", "plugin-remote"])
def test_nothing_is_ever_downloaded(plugin: Path, no_network: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        find_tokenizer(name)
    message = str(caught.value)
    for part in ("would fetch https://", "Nothing was fetched", "TIKTOKEN_CACHE_DIR", "rank file"):
        assert part in message
    assert not no_network.exists()


def test_cached_encoding_is_used(plugin: Path, no_network: Path) -> None:
    import hashlib

    no_network.mkdir()
    key = hashlib.sha1(b"https://example.org/plugin.tiktoken").hexdigest()
    write_ranks(no_network / key, small_ranks())
    assert find_tokenizer("plugin-remote").added == SPECIAL_TOKENS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer.model",
            b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n",
            "is a SentencePiece model — expected a tokenizer.json, .*save_pretrained",
        ),
        (
            "tokenizer.json",
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a pointer of Git LFS, not the file itself.*git lfs pull",
        ),
        ("gpt2.tiktoken", b"version https://git-lfs.github.com/spec/v1\n", "of Git LFS"),
        ("tokenizer.json", b"", "is empty"),
        ("tokenizer.json", b"<!doctype html><p>404", "is a web page: the download failed"),
        ("gpt2.tiktoken", b"\x1f\x8b\x08\x00", "is compressed by gzip"),
        ("tokenizer.pkl", b"\x80\x04\x95", "is a pickle"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        find_tokenizer(str(tmp_path / name))


def test_a_directory_with_another_tokenizer_only(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no tokenizer.json, only tokenizer.model.*save_pretrained"
    ):
        find_tokenizer(str(tmp_path))


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tokenizer x.*: cannot be read: File name too long"):
        find_tokenizer("x" * 300)
    with pytest.raises(UserError, match="there is no tokenizer"):
        find_tokenizer("na\udcefve.json")
    file = tmp_path / "na\udcefve.json"
    Tokenizer.train(TEXTS, 300).save(file)
    assert find_tokenizer(str(file)).added == ()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gtp2", "did you mean gpt2"),
        ("organisation/model", "nothing is downloaded"),
        ("folder", "has no tokenizer.json"),
        ("folder/tokenizr.json", "did you mean folder/tokenizer_1.json"),
    ],
)
def test_unknown_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tokenizer_1.json").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        find_tokenizer(spec)
