"""Sources of text: what is read, in what order, and how bad input is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.readers import open_source
from dualtrain.errors import UserError


def texts(source: object, **options: str) -> list[str]:
    return [document.text for document in open_source(str(source), **options)]


def test_txt_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes("\ufeffÀ first\r\nline\n\nsecond".encode())
    assert texts(file) == ["À first\nline\n\nsecond"]


def test_jsonl_is_one_document_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = ['{"text": "one\u2028still one"}', "", '{"text": "two\\nlines", "id": 3}', "  "]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert texts(file) == ["one\u2028still one", "two\nlines"]
    assert [d.where for d in open_source(str(file))] == [f"{file}:1", f"{file}:3"]


def test_other_text_field(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"content": "x"}\n')
    assert texts(file, text_field="content") == ["x"]


def test_directory_and_pattern_are_read_in_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "notes.md"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b.txt", "deep/c.txt"]
    assert texts(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    source = open_source(str(tmp_path))
    assert list(source) == list(source), "a source can be read again"
    assert [file.bytes for file in source.files] == [5, 5, 10]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', 2, "is not JSON"),
        (b'{"text": "a"}\n\n{"body": "b"}', 3, "has no field 'text'"),
        (b'{"text": 7}', 1, "field 'text' is 7"),
        (b'["text"]', 1, "is a JSON list"),
        (b'{"text": "a"}\n{"text": "\xff"}', 2, "byte 0xff is not UTF-8"),
        (b'{"text": "\\ud800"}', 1, "half a surrogate pair"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, content: bytes, line: int, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts(file)
    assert caught.value.where == f"{file}:{line}"


def test_missing_field_shows_the_fields_there_are(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"body": "b", "id": 1}))
    with pytest.raises(UserError, match="'body', 'id'"):
        texts(file)


def test_txt_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"one\ntwo\nna\xefve")
    with pytest.raises(UserError) as caught:
        texts(file)
    assert caught.value.where == f"{file}:3"


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    (tmp_path / "empty").mkdir()
    cases = {
        "nowhere.txt": "no such file",
        "*.json": "no such file",
        "a.pdf": "cannot read '.pdf' files",
        "empty": "has no text",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / name))
    with pytest.raises(UserError, match="builtin:python-docs"):
        open_source("builtin:wikipedia")
