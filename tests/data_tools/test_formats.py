"""Tests of: data_tools.sources.formats, files: a format of one's own is one module and one line.

FASTA, which holds sequences of proteins behind lines that begin with ``>``, is added here as its
module and its line would add it; then the command line knows it like the others.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.runs import said

from data_tools.sources import Document, open_sources
from data_tools.sources.documents import BlockPart, Parsed
from data_tools.sources.files import Format, ReadingOptions
from data_tools.sources.formats import FORMATS
from dualtrain.common.errors import UserError
from dualtrain.data.dataset import DatasetInfo, TokenDataset
from dualtrain.recipe.load import load_recipe
from dualtrain.training.dataset import check_dataset

SEQUENCES = {f"P{number}": "MKVLAAGIV" * (number % 5 + 1) + "W" * number for number in range(30)}
CONTENT = "".join(f">{name} human\n{text[:9]}\n{text[9:]}\n" for name, text in SEQUENCES.items())


def fasta_parts(chunks: Iterator[bytes], name: str, options: ReadingOptions) -> Iterator[BlockPart]:
    for record in b"".join(chunks).decode().removeprefix(">").split("\n>"):
        head, *lines = record.split("\n")
        yield Parsed((Document("".join(lines), f"{name}: {head.split()[0]}"),))


FASTA = Format(name="fasta", suffixes=("fasta", "fa"), parts=fasta_parts, has_fields=False)


@pytest.fixture
def fasta() -> Iterator[None]:
    FORMATS.append(FASTA)
    yield
    FORMATS.remove(FASTA)


def texts(*sources: object, **options: object) -> list[str]:
    found = open_sources(map(str, sources), **options).documents()
    return [item.text if isinstance(item, Document) else str(item.error) for item in found]


def test_is_found_by_its_suffix_packed_or_not_and_by_its_name(fasta, tmp_path: Path) -> None:
    expected = list(SEQUENCES.values())
    (tmp_path / "all.fa").write_text(CONTENT)
    (tmp_path / "more.fasta.gz").write_bytes(gzip.compress(CONTENT.encode()))
    (tmp_path / "notes").write_text(CONTENT)
    assert texts(tmp_path) == expected * 2
    assert texts(tmp_path, format="fasta") == expected * 3
    assert texts("-", stdin=io.BytesIO(CONTENT.encode()), format="fasta") == expected
    (found,) = open_sources(str(tmp_path / "all.fa"), format="fasta").files
    assert found.name == str(tmp_path / "all.fa")
    with pytest.raises(UserError, match="--text-field.*no effect"):
        texts(tmp_path / "all.fa", text_field="sequence")
    with pytest.raises(UserError, match=r"expected \.txt, \.md,.* \.arrow, \.fasta, \.fa \("):
        texts(tmp_path / "notes")


def test_is_converted_like_any_other(fasta, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "all").write_text(CONTENT)
    out = tmp_path / "dataset"
    options = ["--vocab-size", "272", "--val-fraction", "0.2", "--out", str(out)]
    convert = ["data", "convert", str(tmp_path / "all"), "--format", "fasta", *options]
    assert said(monkeypatch, capsys, *convert)[0] == 0
    assert DatasetInfo.load(out).arguments["format"] == "fasta"
    documents = sum(TokenDataset.open(out, split).documents for split in ("train", "val"))
    assert documents == len(SEQUENCES)


def test_name_of_no_format_is_refused_with_the_nearest(fasta, tmp_path: Path) -> None:
    (tmp_path / "all").write_text(CONTENT)
    with pytest.raises(
        UserError, match=r"--format: 'fast' .* parquet, arrow, tokens, fasta .*mean fasta"
    ):
        texts(tmp_path / "all", format="fast")
    for source in (f"{tmp_path}/all", "builtin:python-docs"):
        build = f"data.build={{source: '{source}', format: jsnl}}"
        recipe = load_recipe("quickstart", [f"data.path={tmp_path}/made", build]).recipe
        with pytest.raises(UserError, match=r"data\.build\.format: 'jsnl' .*mean jsonl"):
            check_dataset(recipe)
