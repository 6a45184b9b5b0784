"""Tests of: data_tools.convert, choose, sources.build_source: a corpus with a validation split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers.conversions import StopAt, files_of, write_jsonl
from helpers.runs import said

from data_tools.convert import build_dataset
from data_tools.tokenizers.tokenizer import Tokenizer
from dualtrain.common.errors import UserError
from dualtrain.data.dataset import Split, TokenDataset
from dualtrain.recipe.schema import BuildSection

TRAIN = [f"train {number} {number**3}" for number in range(60)]
VAL = [f"held out {number} {number**3}" for number in range(7)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "a.jsonl", [*TRAIN[:30], VAL[3]])
    write_jsonl(tmp_path / "b.jsonl", TRAIN[30:])
    (tmp_path / "a.dev").write_text("\n\n".join(VAL[:4]))
    (tmp_path / "b.dev").write_text("\n\n".join(VAL[4:]))
    Tokenizer.train(TRAIN + VAL, 300).save(tmp_path / "tokenizer.json")
    return tmp_path


def given(corpus: Path, **more: object) -> BuildSection:
    settings = {
        "source": [f"{corpus}/a.jsonl", f"{corpus}/b.jsonl"],
        "val_source": f"{corpus}/*.dev",
        "format": "txt",
        "separator": "blank-line",
        "tokenizer": f"{corpus}/tokenizer.json",
    }
    return BuildSection.model_validate(settings | more)


def texts(dataset: Path, split: Split) -> list[str]:
    tokenizer = Tokenizer.load(dataset / "tokenizer.json")
    data = TokenDataset.open(dataset, split)
    return [tokenizer.decode(data.read(n).tolist()) for n in range(data.documents)]


def test_all_of_it_is_held_out_and_nothing_else(corpus: Path) -> None:
    settings: Mapping[str, object] = {"format": None, "separator": None}
    write_jsonl(corpus / "dev.jsonl", VAL)
    build = given(corpus, val_source=f"{corpus}/dev.jsonl", **settings)
    made = build_dataset(build, corpus / "data")
    assert sorted(texts(corpus / "data", "val")) == sorted(VAL)
    assert sorted(texts(corpus / "data", "train")) == sorted(TRAIN)
    assert made.left_out == {"held out by val_source": 1}
    assert {Path(file.path).name for file in made.sources} == {"a.jsonl", "b.jsonl", "dev.jsonl"}
    build_dataset(build, corpus / "data")  # the one that is there
    write_jsonl(corpus / "dev.jsonl", VAL[1:])
    with pytest.raises(UserError, match="1 source files changed since, first .*dev.jsonl"):
        build_dataset(build, corpus / "data")


def test_is_the_same_with_workers_and_after_an_interruption(corpus: Path) -> None:
    write_jsonl(corpus / "dev.jsonl", VAL)
    build = given(corpus, val_source=f"{corpus}/dev.jsonl", format=None, separator=None)
    build_dataset(build, corpus / "one", workers=1)
    build_dataset(build, corpus / "two", workers=2)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(build, corpus / "three", report=StopAt("writing val"))
    build_dataset(build, corpus / "three")
    assert files_of(corpus / "one") == files_of(corpus / "two") == files_of(corpus / "three")


def test_one_text_on_both_sides_is_refused(corpus: Path) -> None:
    build = given(corpus, val_source=f"{corpus}/b.jsonl", format=None, separator=None)
    with pytest.raises(UserError, match=r"b\.jsonl: is both trained on and held out"):
        build_dataset(build, corpus / "data")


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "has no content"), (["   "], "no documents for val"), (TRAIN + VAL, "for train")],
)
def test_a_side_without_text_is_refused(corpus: Path, texts: list[str], message: str) -> None:
    write_jsonl(corpus / "dev.jsonl", texts)
    build = given(corpus, val_source=f"{corpus}/dev.jsonl", format=None, separator=None)
    with pytest.raises(UserError, match=message):
        build_dataset(build, corpus / "data")


def test_options_that_do_not_go_together(corpus: Path, monkeypatch, capsys) -> None:
    options = ["data", "convert", f"{corpus}/a.jsonl", "--out", f"{corpus}/data"]
    options += ["--val-source", f"{corpus}/b.jsonl"]
    code, error = said(monkeypatch, capsys, *options, "--val-tokens", "100")
    assert code == 2 and "val_tokens: 100 has no effect: what val_source names" in error
    code, error = said(monkeypatch, capsys, *options[:-1], "-")
    assert code == 2 and "val_source: standard input or a pipe cannot be held out" in error
    code, error = said(monkeypatch, capsys, *options[:-1], "")
    assert code == 2 and "--val-source: an empty name is given" in error
    code, error = said(monkeypatch, capsys, *options)
    assert code == 0, error
    change = [f"data.build.source={corpus}/a.jsonl", f"data.build.val_source={corpus}/b.jsonl"]
    change += ["data.build.val_fraction=0.1", f"data.path={corpus}/other", "--dry-run"]
    code, error = said(monkeypatch, capsys, "run", "quickstart", *change)
    assert code == 2 and "val_fraction: 0.1 has no effect" in error
