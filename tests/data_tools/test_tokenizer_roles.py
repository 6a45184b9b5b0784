"""Tests of: data_tools.tokenizers.roles: a tokenizer's own special tokens take our roles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers.conversions import Said, write_jsonl
from tokenizers import models, pre_tokenizers

from data_tools.convert import build_dataset
from data_tools.merge import merge_datasets
from data_tools.tokenizers.ranks import find_tokenizer
from data_tools.tokenizers.tokenizer import SPECIAL_TOKENS, Tokenizer
from data_tools.verify import verify_dataset
from dualtrain.common.errors import UserError
from dualtrain.data.dataset import DatasetInfo, TokenDataset
from dualtrain.recipe.schema import BuildSection

WORDS = ["red", "green", "blue", "one", "two"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = [f"red {WORDS[i % 5]} [MASK] one {WORDS[i // 5 % 5]} two" for i in range(25)]


def write(file: Path, special: list[str], *, unknown: str = "[UNK]", more: tuple = ()) -> Path:
    """A tokenizer of words and marks, with special tokens first."""
    names = [*special, *more, *WORDS, *"[]<>/|", "mask", "MASK", unknown]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(file))
    return file


def roles(tokenizer: Tokenizer) -> list[str]:
    """Names of the tokens in the roles, in the order of these."""
    return [tokenizer.decode([tokenizer.special_tokens[role]]) for role in SPECIAL_TOKENS]


def test_names_of_bert(tmp_path: Path) -> None:
    file = write(tmp_path / "bert.json", BERT)
    tokenizer = Tokenizer.load(file)
    assert roles(tokenizer) == ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    assert tokenizer.added == () and tokenizer.roles["<mask>"] == "[MASK]"
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert tokenizer.json == file.read_text(), "nothing is added, and the file remains what it was"


@pytest.mark.parametrize(
    ("special", "found", "added"),
    [
        (
            ["<pad>", "</s>", "<unk>", "<extra_id_0>"],
            ["<unk>", "<s>", "</s>", "<pad>", "<mask>"],
            ("<s>", "<mask>"),
        ),
        (
            ["<unk>", "<|endoftext|>", "<|padding|>"],
            ["<unk>", "<|endoftext|>", "<|endoftext|>", "<|padding|>", "<mask>"],
            ("<mask>",),
        ),
        (
            ["<unk>", "<bos>", "<eos>", "<mask>"],
            ["<unk>", "<bos>", "<eos>", "<pad>", "<mask>"],
            ("<pad>",),
        ),
        # Both: as versions made them that knew the roles' own names only.
        (["<unk>", *BERT, "<s>", "</s>", "<pad>", "<mask>"], list(SPECIAL_TOKENS), ()),
    ],
)
def test_well_known_names(
    tmp_path: Path, special: list[str], found: list[str], added: tuple[str, ...]
) -> None:
    tokenizer = Tokenizer.load(write(tmp_path / "tokenizer.json", special, unknown="<unk>"))
    assert roles(tokenizer) == found and tokenizer.added == added


def test_a_well_known_name_of_an_ordinary_word_is_no_role(tmp_path: Path) -> None:
    file = write(tmp_path / "tokenizer.json", ["<s>"], unknown="<unk>", more=("[MASK]",))
    tokenizer = Tokenizer.load(file)
    assert roles(tokenizer) == list(SPECIAL_TOKENS)
    assert tokenizer.added == ("</s>", "<pad>", "<mask>")


def test_what_the_files_beside_it_say(tmp_path: Path) -> None:
    special = ["<begin>", "<end>", "<what>", "<gap>"]
    write(tmp_path / "tokenizer.json", special, unknown="<what>")
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<begin>", "lstrip": False}, "pad_token": "<end>"})
    )
    config = {"eos_token": "<end>", "mask_token": "<gap>", "unk_token": "<none>", "cls_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = find_tokenizer(str(tmp_path))
    # A token that ends texts is no padding, whatever is said, and unknown is what the model says.
    assert roles(tokenizer) == ["<what>", "<begin>", "<end>", "<pad>", "<gap>"]
    assert tokenizer.added == ("<pad>",)


def test_one_token_may_begin_and_end_texts_and_do_no_more(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer.json", ["<sep>"], unknown="<unk>")
    names = ("bos", "eos", "unk", "pad", "mask")
    config = {f"{name}_token": "<sep>" for name in names}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert roles(find_tokenizer(str(tmp_path))) == ["<unk>", "<sep>", "<sep>", "<pad>", "<mask>"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "special_tokens_map.json: is not JSON"),
        (b"[]", "special_tokens_map.json: holds a list"),
        (b"\xff", "special_tokens_map.json: is not text in UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    ],
)
def test_files_beside_it_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path / "tokenizer.json", BERT)
    (tmp_path / "special_tokens_map.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        find_tokenizer(str(tmp_path))


def section(source: Path, tokenizer: Path) -> BuildSection:
    return BuildSection(source=str(source), tokenizer=str(tokenizer), val_fraction=0.2)


def test_a_dataset_in_these_roles(tmp_path: Path) -> None:
    special = ["<begin>", "<end>", "<what>", "<gap>"]
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder / "tokenizer.json", special, unknown="<what>")
    names = {"bos_token": "<begin>", "eos_token": "<end>", "mask_token": "<gap>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    corpus, said = write_jsonl(tmp_path / "a.jsonl", TEXTS), Said()
    build = section(corpus, folder)
    info = build_dataset(build, tmp_path / "one", report=said, workers=2)
    assert (
        f"{folder}: takes its own special tokens: <what> as <unk>, <begin> as <s>, <end> as </s>,"
        " <gap> as <mask>" in said.lines
    )
    assert any("added <pad> at the end of its vocabulary" in line for line in said.lines)
    assert [info.bos_id, info.eos_id, info.mask_id] == [0, 1, 3]
    dataset = TokenDataset.open(tmp_path / "one")
    for document in range(dataset.documents):
        assert set(np.unique(dataset.read(document))).isdisjoint(info.special_ids)
    assert verify_dataset(tmp_path / "one") == info
    assert build_dataset(build, tmp_path / "one") == info  # the one that is there is taken

    # The dataset's tokenizer means the same without the files that told its roles.
    other = write_jsonl(tmp_path / "b.jsonl", [f"{text} blue" for text in TEXTS])
    again = build_dataset(section(other, tmp_path / "one"), tmp_path / "two")
    assert again.special_tokens == info.special_tokens and again.vocab_size == info.vocab_size
    merged = merge_datasets([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    assert merged.special_tokens == info.special_tokens
    assert merged.tokenizer_sha256 == info.tokenizer_sha256


def test_a_dataset_with_all_five_added_is_still_the_one_that_is_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "bert.json", BERT)
    given = file.read_text()
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    Tokenizer.load(file, own_names=True).save(file)
    info = build_dataset(section(corpus, file), tmp_path / "data")
    assert info.vocab_size == 5 + len(json.loads(given)["model"]["vocab"])
    file.write_text(given)
    assert build_dataset(section(corpus, file), tmp_path / "data") == info
    write(file, BERT, more=("purple",))
    with pytest.raises(UserError, match="bert.json is another tokenizer now"):
        build_dataset(section(corpus, file), tmp_path / "data")
    assert DatasetInfo.load(tmp_path / "data") == info
