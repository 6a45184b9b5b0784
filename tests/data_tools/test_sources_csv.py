"""Tests of: data_tools.sources: quoting, headers and misfits of CSV and TSV files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.sources import BadInput, Document, open_sources


def delivered(file: Path, **options: Any) -> list[Document | BadInput]:
    return list(open_sources(str(file), **options).documents())


def brief(file: Path, **options: Any) -> list[str]:
    items = delivered(file, **options)
    return [item.text if isinstance(item, Document) else f"[{item.kind}]" for item in items]


@pytest.mark.parametrize("block_bytes", [1, 5, 1 << 20])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_quotes_line_ends_and_a_byte_order_mark(
    tmp_path: Path, suffix: str, block_bytes: int
) -> None:
    file = tmp_path / f"a.{suffix}"
    comma = "," if suffix == "csv" else "\t"
    rows = ["id,text", '1,"two\nlines, ""quoted"""', "", "2,plain", '3,""', "4,é"]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).replace(",", comma).encode())
    assert delivered(file, block_bytes=block_bytes) == [
        Document(f'two\nlines{comma} "quoted"', f"{file}:2"),
        Document("plain", f"{file}:5"),
        Document("", f"{file}:6"),
        Document("é", f"{file}:7"),
    ]


def test_rows_that_do_not_fit_cost_themselves(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"id,text\n1,one\n2,with, comma\n3\n4,na\xefve\n5,a\0b\n6,six\n")
    wrong = ["[ragged row]", "[ragged row]", "[not UTF-8]", "[not text]"]
    assert brief(file) == ["one", *wrong, "six"]
    problem = delivered(file)[1]
    assert isinstance(problem, BadInput)
    assert str(problem.error).startswith(f"{file}:3: the row has 3 fields — expected 2")


def test_header_decides(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    for content, kind, message in (
        (b"id,body\n1,one\n", "no text field", "one of its columns: 'id', 'body'"),
        (b"id;text\n1;one\n", "no text field", "one of its columns: 'id;text'"),
        (b"text,text\n1,one\n", "no text field", "names 2 columns 'text'"),
        (b"text,na\xefve\n1,one\n", "not UTF-8", "byte 0xef"),
        (b"", "empty file", "has no content"),
    ):
        file.write_bytes(content)
        [problem] = delivered(file)
        assert isinstance(problem, BadInput) and problem.kind == kind
        assert message in str(problem.error)
    file.write_text("id,body\n1,one\n")
    assert brief(file, text_field="body") == ["one"]
    file.write_text("text\n")
    assert brief(file) == []


def test_quote_that_is_never_closed(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('text\none\n"two\nthree\n')
    one, problem = delivered(file)
    assert one == Document("one", f"{file}:2")
    assert isinstance(problem, BadInput) and problem.error.where == f"{file}:3"
    assert problem.kind == "damaged file"


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.text(), st.text()), max_size=8),
    block_bytes=st.sampled_from([1, 3, 1000]),
)
def test_what_python_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    block_bytes: int,
) -> None:
    rows = [tuple(cell.replace("\0", "") for cell in row) for row in rows]  # type: ignore[misc]
    file = tmp_path_factory.getbasetemp() / "written.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("text", "id"), *rows])
    assert brief(file, block_bytes=block_bytes) == [text for text, _ in rows]
