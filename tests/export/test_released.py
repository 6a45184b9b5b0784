"""Tests of: dualtrain.export.released, dualtrain import: released models, as exports of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.released import SETTINGS, VOCABULARY, released_logits, released_weights
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dualtrain.checkpoint.trained import open_trained
from dualtrain.cli import app

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<mask>", *(f"<special_{i}>" for i in range(11))]
BRANCHES = ["alpha_0.000_n-reps=1", "alpha_0.250_n-reps=32", "alpha_1.000_n-reps=128"]


def released_tokenizer() -> Tokenizer:
    """Put together as the released code does, with few merges."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    known = ["Ġ", "c", "a", "t", "s", "d", "o", "g", "r", "n", "Ċ", ".", "e", "h", "m", "u"]
    merges = [("Ġ", "c"), ("a", "t"), ("Ġc", "at"), ("Ġ", "t")]
    words = [*SPECIAL, *known, *("".join(pair) for pair in merges)]
    assert set(known) <= set(letters)
    vocabulary = {word: number for number, word in enumerate(words)}
    vocabulary |= {f"w{number}": number for number in range(len(words), VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", ignore_merges=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Prepend(" "),
            normalizers.NFC(),
            normalizers.Replace(Regex("\n"), "\n "),
            normalizers.Replace(Regex(" *\n"), "\n"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\s*\n+|[^\s\p{L}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteLevel(add_prefix_space=False, use_regex=False),
            decoders.Strip(" ", 1, 0),
            decoders.Replace("\n ", "\n"),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_released(directory: Path) -> Path:
    directory.mkdir(parents=True)
    torch.save(released_weights(), directory / "state_dict.bin")
    (directory / "config.json").write_text(json.dumps(SETTINGS))
    released_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return write_released(tmp_path_factory.mktemp("released") / "final")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["import", *map(str, arguments)], catch_exceptions=True)
    return f"{result.exit_code}: {result.exception or ''} {result.output}"


@pytest.fixture(scope="module")
def imported(released, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("imported") / "model"
    assert run(released, "--to", place).startswith("0:")
    return place


def test_dualtrain_and_transformers_open_it_with_the_released_logits(imported):
    ids = torch.randint(16, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(2))
    expected = released_logits(released_weights(), ids, torch.zeros_like(ids), causal=True)
    full = released_logits(released_weights(), ids, torch.zeros_like(ids), causal=False)
    model = AutoModelForCausalLM.from_pretrained(imported, trust_remote_code=True).eval()
    trained = open_trained(imported, device="cpu")
    assert (trained.target, trained.source.append_eos) == ("next", False)
    with torch.no_grad():
        for logits, wanted in (
            (trained.model(ids).logits, expected),
            (model(ids).logits, expected),
            (model(ids, attention="full").logits, full),
        ):
            assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("text", ["a cat", "cat<mask> sat", "<mask>", "dogs.\ncat <mask>\n a"])
def test_text_has_the_released_ids_around_masks(imported, text):
    tokenizer, plain = AutoTokenizer.from_pretrained(imported), released_tokenizer()
    mask = 4
    # Training's text has no special tokens within: what is between them continues the text.
    with_word = text.replace(" <mask>", "<mask>").replace("<mask>", " mu").removeprefix(" ")
    expected = plain.encode(with_word, add_special_tokens=False).ids
    word = plain.encode("mu", add_special_tokens=False).ids
    for start in range(len(expected) - len(word), -1, -1):
        if expected[start : start + len(word)] == word:
            expected[start : start + len(word)] = [mask]
    assert tokenizer(text).input_ids == [1, *expected]


def test_every_revision_of_a_copy_is_imported_once(released, tmp_path):
    for branch in BRANCHES:
        shutil.copytree(released, tmp_path / "copy" / branch)
    (tmp_path / "copy" / ".git").mkdir()
    to = tmp_path / "models"
    said = run(tmp_path / "copy", "--all", "--to", to)
    assert said.startswith("0:")
    assert sorted(path.name for path in to.iterdir()) == sorted(BRANCHES)
    assert "AR share (alpha) 0.25, 32 repetitions" in (to / BRANCHES[1] / "README.md").read_text()
    again = run(tmp_path / "copy", "--all", "--to", to)
    assert again.count("is there already") == len(BRANCHES)
    one = tmp_path / "one"
    assert run(f"{tmp_path / 'copy'}@{BRANCHES[0]}", "--to", one).startswith("0:")
    file = tmp_path / "copy" / BRANCHES[0] / "state_dict.bin"
    assert "is a file" in run(file, "--all", "--to", tmp_path / "two")
    missing = run(f"{tmp_path / 'copy'}@alpha_0.251_n-reps=32", "--to", tmp_path / "two")
    assert "has no copy of alpha_0.251_n-reps=32" in missing and BRANCHES[1] in missing


def test_an_empty_source_is_not_the_current_directory(released, tmp_path, monkeypatch):
    monkeypatch.chdir(released)
    assert "SOURCE: an empty name is given" in run("", "--to", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_hubs_cache_is_a_copy(released, tmp_path):
    cache = tmp_path / "models--ltg--dual-lm-470m"
    shutil.copytree(released, cache / "snapshots" / "abc123")
    (cache / "refs").mkdir()
    (cache / "refs" / BRANCHES[0]).write_text("abc123")
    assert run(cache, "--all", "--to", tmp_path / "models").startswith("0:")
    assert (tmp_path / "models" / BRANCHES[0] / "model.safetensors").is_file()


def test_without_a_network_the_way_out_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for arguments in (["ltg/dual-lm-470m"], ["ltg/dual-lm-470m@alpha_0.500_n-reps=8"]):
        said = run(*arguments, "--to", tmp_path / "x")
        assert "the hub has not given it" in said and "hf download ltg/dual-lm-470m" in said
    said = run("ltg/dual-lm-470m", "--all", "--to", tmp_path / "x")
    assert "the hub has not given it" in said
    assert not (tmp_path / "x").exists()


def damage_config(place: Path) -> None:
    (place / "config.json").write_text("[]")


def damage_tokenizer(place: Path) -> None:
    tokenizer = released_tokenizer()
    tokenizer.add_tokens(["dualtrain"])
    tokenizer.save(str(place / "tokenizer.json"))


def damage_names(place: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, [], unk_token="a"))
    tokenizer.save(str(place / "tokenizer.json"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda place: (place / "state_dict.bin").unlink(), "has no state_dict.bin"),
        (lambda place: (place / "tokenizer.json").unlink(), "use --tokenizer"),
        (lambda place: (place / "config.json").unlink(), "use --config"),
        (damage_config, "holds a list"),
        (damage_tokenizer, "has 97 tokens, but"),
        (damage_names, "has no <s>, </s>, <mask>"),
    ],
    ids=["weights", "tokenizer", "config", "list", "larger tokenizer", "other tokenizer"],
)
def test_what_is_missing_or_does_not_fit_is_named_and_nothing_is_left(
    released, tmp_path, damage, said
):
    place = tmp_path / "final"
    shutil.copytree(released, place)
    damage(place)
    result = run(place, "--to", tmp_path / "model")
    assert result.startswith("1:") and said in result
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_files_of_other_names_and_bf16(released, tmp_path):
    weights = tmp_path / "weights.pt"
    shutil.copyfile(released / "state_dict.bin", weights)
    given = ["--config", released / "config.json", "--tokenizer", released / "tokenizer.json"]
    assert run(weights, *given, "--to", tmp_path / "m", "--dtype", "bf16").startswith("0:")
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "does not exist" in run(tmp_path / "nowhere", "--to", tmp_path / "n")
