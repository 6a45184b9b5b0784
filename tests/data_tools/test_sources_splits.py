"""Tests of: data_tools.sources.splits: directories that hold more than training text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_tools.sources import Corpus, Document, open_sources
from data_tools.sources.splits import split_of
from dualtrain.common.errors import UserError


def opened(directory: Path, *names: str, **options: Any) -> Corpus:
    """A source of JSON lines that hold their own names."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f'{{"text": "{name}"}}')
    return open_sources(str(directory), **options)


def texts(source: Corpus) -> list[str]:
    return [item.text for item in source.documents() if isinstance(item, Document)]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00001.parquet", "train"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("validation/0.jsonl", "validation"),
        ("wiki.valid.tokens", "validation"),
        ("train_10M/childes.train", "train"),
        ("test/train.jsonl", "test"),
        ("corpus-dev.txt", "validation"),
        ("training set 1/a.txt", "train"),
        ("train-test.jsonl", None),
        ("latest.jsonl", None),
        ("contest/trainer.jsonl", None),
    ],
)
def test_split_of_a_name(path: str, split: str | None) -> None:
    assert split_of(Path(path)) == split


def test_only_the_train_split_is_read_and_said(tmp_path: Path) -> None:
    names = ["data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl", "extra.jsonl"]
    source = opened(tmp_path, *names)
    assert texts(source) == names[:2]
    [note] = source.notes
    assert note == (
        f"{tmp_path}: only the split train is read, 2 of 4 files; "
        f"not, for one, {tmp_path / 'data/test-0.jsonl'}"
    )
    every = open_sources(str(tmp_path / "**" / "*.jsonl"))
    assert sorted(texts(every)) == sorted(names) and not every.notes, "a pattern names files"
    assert texts(open_sources(str(tmp_path / "data" / "test-0.jsonl"))) == [names[2]]


def test_directory_without_held_out_text_is_read_as_a_whole(tmp_path: Path) -> None:
    source = opened(tmp_path, "a.jsonl", "train.jsonl")
    assert texts(source) == ["a.jsonl", "train.jsonl"] and not source.notes
    test = opened(tmp_path / "test", "a.jsonl")
    assert texts(test) == ["a.jsonl"], "named by its own name"


@pytest.mark.parametrize("names", [["test/a.jsonl"], ["a.jsonl", "dev.jsonl"]])
def test_held_out_text_alone_is_refused(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(UserError, match="none of 'train'.*name the files") as caught:
        opened(tmp_path, *names)
    assert f"'{tmp_path}/**/*.jsonl'" in caught.value.hint


def test_what_map_left_in_a_cache_is_no_text(tmp_path: Path) -> None:
    """Laid out as ``datasets`` does it, which the development environment has."""
    datasets = pytest.importorskip("datasets")
    pages = [f"page {number}" for number in range(9)]

    def generate() -> Any:
        yield from ({"text": page} for page in pages)

    made = datasets.Dataset.from_generator(generate, cache_dir=str(tmp_path))
    made.map(lambda row: {"text": row["text"].upper()})
    assert list(tmp_path.rglob("cache-*.arrow")), "there is something to be mistaken for text"
    source = open_sources(str(tmp_path))
    assert texts(source) == pages
    assert any("cache-" in name for name in source.ignored)
    with pytest.raises(UserError, match="is what Dataset.map left in a cache"):
        open_sources(str(tmp_path / "**" / "*.arrow"))


def test_markdown_beside_other_text_describes_it(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "chapter.md").write_text("text")
    assert texts(open_sources(str(tmp_path))) == ["about", "text"]
    source = opened(tmp_path, "a.jsonl")
    assert texts(source) == ["a.jsonl"]
    assert source.ignored == (str(tmp_path / "README.md"), str(tmp_path / "chapter.md"))
    assert texts(open_sources(str(tmp_path / "*.md"))) == ["about", "text"], "a pattern names them"
