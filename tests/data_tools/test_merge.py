"""Tests of: data_tools.merge: datasets of one tokenizer become one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.conversions import files_of, write_jsonl
from typer.testing import CliRunner

from data_tools.command import app
from data_tools.convert import build_dataset
from data_tools.merge import merge_datasets
from data_tools.tokenizers.tokenizer import Tokenizer
from data_tools.verify import verify_dataset
from dualtrain.common.errors import UserError
from dualtrain.data.dataset import DatasetInfo, TokenDataset
from dualtrain.recipe.schema import BuildSection

TEXTS = [f"Text {i} of some that are all different: {i * i}" for i in range(120)]


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Two datasets that share twenty documents, divided by the same fraction."""
    Tokenizer.train(TEXTS, 300).save(tmp_path / "tokenizer.json")
    return [make(tmp_path, "a", TEXTS[:70], 0.2), make(tmp_path, "b", TEXTS[50:], 0.2)]


def make(folder: Path, name: str, texts: list[str], fraction: float, **options: object) -> Path:
    build = {
        "source": str(write_jsonl(folder / f"{name}.jsonl", texts)),
        "tokenizer": str(folder / "tokenizer.json"),
        "val_fraction": fraction,
    }
    build_dataset(BuildSection.model_validate(build | options), folder / name)
    return folder / name


def texts_of(path: Path, split: str) -> list[str]:
    dataset = TokenDataset.open(path, split)  # type: ignore[arg-type]
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    return [tokenizer.decode(dataset.read(i)) for i in range(dataset.documents)]


@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_every_document_keeps_its_split(
    tmp_path: Path, parts: list[Path], drop_duplicates: bool
) -> None:
    out = tmp_path / "both"
    info = merge_datasets(parts, out, drop_duplicates=drop_duplicates, shard_bytes=1000)
    for split in ("train", "val"):
        expected = [text for part in parts for text in texts_of(part, split)]
        if drop_duplicates:
            expected = sorted(set(expected))
        found = texts_of(out, split)
        assert sorted(found) == sorted(expected)
        assert found != [t for t in expected if t in found], "shuffled"
        assert info.splits[split].bytes == sum(len(text.encode()) for text in found)
    assert info.left_out == ({"duplicate": 20} if drop_duplicates else {})
    assert [Path(file.path).name for file in info.sources] == ["a.jsonl", "b.jsonl"]
    assert verify_dataset(out) == info == DatasetInfo.load(out)


def test_merged_equals_converted_together(tmp_path: Path, parts: list[Path]) -> None:
    """With the order kept, the same documents in the same order."""
    merge_datasets(parts, tmp_path / "both", shuffle_seed=None)
    kept = [make(tmp_path, n, t, 0.2) for n, t in {"c": TEXTS[:70], "d": TEXTS[50:]}.items()]
    merge_datasets(kept, tmp_path / "again", shuffle_seed=None)
    first, second = files_of(tmp_path / "both"), files_of(tmp_path / "again")
    assert {n: f for n, f in first.items() if n != "dataset.json"} == {
        n: f for n, f in second.items() if n != "dataset.json"
    }
    assert texts_of(tmp_path / "both", "val") == [t for p in parts for t in texts_of(p, "val")]


def test_document_held_out_in_one_is_not_trained_on(tmp_path: Path, parts: list[Path]) -> None:
    other = make(tmp_path, "other", TEXTS[:70], 0.8)
    info = merge_datasets([parts[1], other], tmp_path / "both")
    train, val = texts_of(tmp_path / "both", "train"), texts_of(tmp_path / "both", "val")
    assert not set(train) & set(val)
    shared = set(texts_of(parts[1], "train")) & set(texts_of(other, "val"))
    assert info.left_out == {"held out in another of the datasets": len(shared)}
    assert info.splits["train"].bytes == sum(len(text.encode()) for text in train)


def test_text_is_counted_as_it_was_whatever_the_tokenizer_keeps_of_it(tmp_path: Path) -> None:
    """This one puts a space before each document, as the paper's does, so decoding adds a byte."""
    content = json.loads(Tokenizer.train(TEXTS, 300).json)
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    parts = [make(tmp_path, "a", TEXTS[:70], 0.2), make(tmp_path, "b", TEXTS[50:], 0.2)]
    info = merge_datasets(parts, tmp_path / "both", drop_duplicates=True)
    found = sum(split.bytes for split in info.splits.values())
    assert found == sum(len(text.encode()) for text in TEXTS)
    verify_dataset(tmp_path / "both")
    file = parts[0] / "train" / "text_bytes.npy"
    content = file.read_bytes()
    for damaged in (content[:40], content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="text_bytes.npy: "):
            verify_dataset(parts[0])
    file.unlink()
    verify_dataset(parts[0])
    with pytest.raises(UserError, match="text_bytes.npy: cannot be read"):
        merge_datasets(parts, tmp_path / "again")


def test_what_cannot_be_merged(tmp_path: Path, parts: list[Path]) -> None:
    out = tmp_path / "both"
    with pytest.raises(UserError, match="one dataset is not enough"):
        merge_datasets(parts[:1], out)
    with pytest.raises(UserError, match="is given twice"):
        merge_datasets([*parts, parts[0]], out)
    (tmp_path / "tokenizer.json").unlink()
    Tokenizer.train(TEXTS, 310).save(tmp_path / "tokenizer.json")
    other = make(tmp_path, "other", TEXTS, 0.2)
    with pytest.raises(UserError, match="has another tokenizer") as caught:
        merge_datasets([parts[0], other], out)
    assert caught.value.where == str(other)
    with pytest.raises(UserError, match="there is no dataset"):
        merge_datasets([parts[0], tmp_path / "nowhere"], out)
    assert not out.exists()


def test_damaged_part_leaves_nothing(tmp_path: Path, parts: list[Path]) -> None:
    (parts[1] / "train" / "shard.00000.mds").unlink()
    with pytest.raises(UserError, match="shard is missing"):
        merge_datasets(parts, tmp_path / "both")
    assert not [p for p in tmp_path.iterdir() if "both" in p.name]


def test_command_accepts_what_it_made_and_refuses_the_rest(
    tmp_path: Path, parts: list[Path]
) -> None:
    command = ["merge", *map(str, parts), "--out", str(tmp_path / "both")]
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0 and "bytes/token" in made.output
    before = files_of(tmp_path / "both")
    assert CliRunner().invoke(app, command).exit_code == 0
    assert files_of(tmp_path / "both") == before
    refused = CliRunner().invoke(app, [*command, "--keep-order"])
    assert isinstance(refused.exception, UserError)
    assert "made differently" in str(refused.exception)
    in_the_way = CliRunner().invoke(app, [*command[:-1], str(tmp_path)])
    assert "has no dataset.json" in str(in_the_way.exception)
