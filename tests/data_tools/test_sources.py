"""Tests of: data_tools.sources: what is read, in what order, how bad content is delivered."""

from __future__ import annotations

import io
import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from data_tools.sources import PYTHON_DOCS, BadInput, Corpus, Document, open_sources
from dualtrain.common.errors import UserError


def delivered(source: Any, **options: Any) -> list[Document | BadInput]:
    sources = source if isinstance(source, list) else str(source)
    return list(open_sources(sources, **options).documents())


def texts(source: Any, **options: Any) -> list[str]:
    found = delivered(source, **options)
    assert all(isinstance(item, Document) for item in found), found
    return [item.text for item in found if isinstance(item, Document)]


def brief(items: list[Document | BadInput]) -> list[str]:
    """Texts, and kinds of problems in brackets."""
    return [item.text if isinstance(item, Document) else f"[{item.kind}]" for item in items]


def read(source: Any, **options: Any) -> list[str]:
    return brief(delivered(source, **options))


def only_problem(source: Any, **options: Any) -> BadInput:
    [problem] = [item for item in delivered(source, **options) if isinstance(item, BadInput)]
    return problem


# --- .txt


def test_txt_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes("\ufeffÀ first\r\nline\n\nsecond".encode())
    assert delivered(file) == [Document("À first\nline\n\nsecond", str(file))]


def test_txt_divided_at_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"\n \none\r\nmore\r\n\r\ntwo\n \t\n\n\n  three\n\n")
    assert texts(file, separator="blank-line") == ["one\nmore", "two", "  three"]
    found = delivered(file, separator="blank-line")
    wheres = [item.where for item in found if isinstance(item, Document)]
    assert wheres == [f"{file}:3", f"{file}:6", f"{file}:10"]


def test_txt_divided_at_a_separator(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("one\n<|endoftext|>\n\ntwo\nlines<|endoftext|><|endoftext|>three\n")
    assert delivered(file, separator="<|endoftext|>") == [
        Document("one", f"{file}:1"),
        Document("two\nlines", f"{file}:4"),
        Document("three", f"{file}:5"),
    ]


def test_bad_byte_costs_one_divided_document(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"one\n\ntwo\nna\xefve\n\nthree")
    items = delivered(file, separator="blank-line")
    assert brief(items) == ["one", "[not UTF-8]", "three"]
    assert only_problem(file, separator="blank-line").error.where == f"{file}:4"


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 5, 1 << 20])
def test_separator_that_is_nowhere_is_refused(tmp_path: Path, block_bytes: int) -> None:
    (tmp_path / "a.txt").write_text("line one\nline two\n" * 100)
    (tmp_path / "b.txt").write_text("another")
    options = {"block_bytes": block_bytes}
    with pytest.raises(UserError, match=r"occurs nowhere.*type \$'\\n' in bash"):
        read(tmp_path, separator="\\n", **options)
    with pytest.raises(UserError, match="occurs nowhere.*leave it out"):
        read(tmp_path, separator="blank-line", **options)
    assert len(read(tmp_path, separator="\n", **options)) == 201
    (tmp_path / "b.txt").write_text("another\n\nand another")
    assert len(read(tmp_path, separator="blank-line", **options)) == 3, (
        "one file may be one document"
    )


def test_binary_content_is_no_text(tmp_path: Path) -> None:
    text = "a text in UTF-16\nof two lines"
    (tmp_path / "a.txt").write_bytes(text.encode("utf-16-le"))
    (tmp_path / "b.txt").write_bytes(b"one\n\n\0\0two\n\nthree")
    (tmp_path / "c.jsonl").write_text('{"text": "a\\u0000"}\n{"text": "b"}')
    [problem] = open_sources(str(tmp_path / "a.txt")).documents()
    assert isinstance(problem, BadInput) and problem.kind == "not text"
    assert "NUL character" in str(problem.error) and "iconv" in str(problem.error)
    for name, content in (("d.jsonl", '{"text": "a"}'), ("e.json", "[{}]"), ("f.csv", "text\na")):
        (tmp_path / name).write_bytes(content.encode("utf-16-le"))
        assert read(tmp_path / name)[0] == "[not text]"
    assert read(tmp_path / "b.txt", separator="blank-line") == ["one", "[not text]", "three"]
    assert read(tmp_path / "c.jsonl") == ["[not text]", "b"]


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 5, 1 << 20])
def test_separator_that_overlaps_itself(tmp_path: Path, block_bytes: int) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x---y----z-----")
    assert texts(file, separator="--", block_bytes=block_bytes) == ["x", "-y", "z", "-"]


def test_txt_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"one\ntwo\nna\xefve")
    problem = only_problem(file)
    assert (problem.kind, problem.error.where) == ("not UTF-8", f"{file}:3")
    assert "byte 0xef is not UTF-8" in str(problem.error)


# --- JSON


def test_jsonl_is_one_document_a_line(tmp_path: Path) -> None:
    lines = ['{"text": "one\u2028still one"}', "", '{"text": "two\\nlines", "id": 3}', "  "]
    for name in ("a.jsonl", "a.ndjson", "a.json", "A.JSONL"):
        file = tmp_path / name
        file.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
        expected = [
            Document("one\u2028still one", f"{file}:1"),
            Document("two\nlines", f"{file}:3"),
        ]
        assert delivered(file) == expected


def test_other_text_field(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"content": "x"}\n')
    assert texts(file, text_field="content") == ["x"]


def test_json_array_and_single_object(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"text": "one"}, {"id": 1, "text": "two]"}], indent=2))
    assert delivered(file) == [Document("one", f"{file}:2"), Document("two]", f"{file}:5")]
    file.write_text(' [{"text": "a"},{"text": "b"}]\n')
    assert texts(file) == ["a", "b"]
    file.write_text("[]")
    assert texts(file) == []
    file.write_text(json.dumps({"meta": {"id": 1}, "text": "alone"}, indent=2))
    assert delivered(file) == [Document("alone", f"{file}:1")]


def test_json_with_a_bad_first_line_is_still_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"text": \n{"text": "two"}\n{"text": "three"}\n')
    assert brief(delivered(file)) == ["[not JSON]", "two", "three"]


@pytest.mark.parametrize(
    ("content", "texts_before", "line"),
    [
        ('[\n{"text": "a"},\n{"text": "b"\n', ["a"], 4),
        ('[{"text": "a"}\n{"text": "b"}]', ["a"], 2),
        ('[{"text": "a"}]\n\n,', ["a"], 3),
        ('{\n"text": "a"\n"id": 1}', [], 3),
        ("\n \n", [], 3),
    ],
)
def test_broken_json_document(
    tmp_path: Path, content: str, texts_before: list[str], line: int
) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    assert brief(delivered(file)) == [*texts_before, "[not JSON]"]
    assert only_problem(file).error.where == f"{file}:{line}"


@pytest.mark.parametrize(
    ("content", "line", "kind", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', 2, "not JSON", "is not JSON"),
        (b'{"text": "a"}\n\n{"body": "b"}', 3, "no text field", "has no field 'text'"),
        (b'{"text": 7}', 1, "text is not a string", "field 'text' is 7"),
        (b'["text"]', 1, "no text field", "is a JSON list"),
        (b'{"text": "a"}\n{"text": "\xff"}', 2, "not UTF-8", "byte 0xff is not UTF-8"),
        (b'{"text": "\\ud800"}', 1, "lone surrogate", "half a surrogate pair"),
        (b"[" * 100_000, 1, "not JSON", "recursion"),
        (b'{"text": ' + b"1" * 5000 + b"}", 1, "not JSON", "is not JSON"),
    ],
)
def test_bad_line_is_named_and_the_others_are_read(
    tmp_path: Path, content: bytes, line: int, kind: str, message: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content + b'\n{"text": "behind"}')
    problem = only_problem(file)
    assert (problem.kind, problem.error.where) == (kind, f"{file}:{line}")
    assert message in str(problem.error)
    assert brief(delivered(file))[-2:] == [f"[{kind}]", "behind"]


def test_missing_field_shows_the_fields_there_are(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"body": "b", "id": 1}))
    assert "'body', 'id'" in str(only_problem(file).error)


def test_text_in_nested_fields_and_lists(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    record = {"meta": {"text": "one"}, "list": ["a", "b"], "turns": [{"text": "x"}, {}], "a.b": "1"}
    file.write_text(json.dumps(record))
    assert read(file, text_field="meta.text") == ["one"]
    assert read(file, text_field="list[]") == ["a", "b"]
    assert read(file, text_field="a.b") == ["1"]
    x, problem = open_sources(str(file), text_field="turns[].text").documents()
    assert x == Document("x", f"{file}:1: item 1")
    assert isinstance(problem, BadInput) and problem.error.where == f"{file}:1: item 2"
    for field, message in (
        ("list", r"a string.*give --text-field 'list\[\]'"),
        ("turns", "field 'turns' is"),
        ("meta.body", "one of its fields: 'meta.text'"),
        ("list.text", "expected an object with 'text'"),
        ("meta[]", "expected a list"),
    ):
        [problem] = open_sources(str(file), text_field=field).documents()
        assert isinstance(problem, BadInput)
        with pytest.raises(UserError, match=message):
            raise problem.error


def test_surrogate_pairs_are_joined_and_empty_texts_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "\\ud83d\\ude00"}\n{"text": ""}\n{"text": " "}\n')
    assert texts(file) == ["😀", "", " "]


def test_json_that_must_be_parsed_at_once_is_refused_when_huge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.sources.cutting.WHOLE_LIMIT", 1000)
    record = {"text": "x" * 100}
    (tmp_path / "array.json").write_text(json.dumps([record] * 20))
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(record) for _ in range(20)))
    assert brief(delivered(tmp_path)) == ["[file too large]"] + ["x" * 100] * 20
    assert "JSON lines" in str(only_problem(tmp_path).error)


# --- Blocks


def test_hundred_megabytes_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    text = "0123456789" * 10_000_000
    file.write_text("\n".join(json.dumps({"text": item}) for item in ("small", text, "last")))
    assert [len(found) for found in texts(file)] == [5, 100_000_000, 4]


def test_reading_takes_no_more_memory_for_a_larger_file(tmp_path: Path) -> None:
    peaks = []
    for count in (4_000, 16_000):
        (tmp_path / "a.jsonl").write_text((json.dumps({"text": "x" * 1000}) + "\n") * count)
        tracemalloc.start()
        assert sum(1 for _ in open_sources(str(tmp_path)).documents()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 8_000_000, peaks  # the files have 4 and 16 MB


def test_blocks_are_of_even_size_and_show_how_far_they_are(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        lines = (json.dumps({"text": f"{name} {number} " + "x" * 80}) for number in range(2000))
        (tmp_path / name).write_text("\n".join(lines))
    source = open_sources(str(tmp_path), block_bytes=10_000)
    blocks = list(source.blocks())
    positions = [block.position for block in blocks]
    assert positions == sorted(positions) and positions[-1] == source.bytes
    assert source.bytes / 10_000 * 0.8 < len(blocks) < source.bytes / 10_000 * 1.3
    copies = [pickle.loads(pickle.dumps(block)) for block in blocks]
    again = [item for block in copies for item in block.documents()]
    assert again == list(source.documents()) and len(again) == 4000


@pytest.mark.parametrize("separator", ["blank-line", "<|endoftext|>"])
def test_divided_text_is_cut_into_blocks(tmp_path: Path, separator: str) -> None:
    file = tmp_path / "a.txt"
    paragraphs = [f"{number}\n" + "x" * (number % 97) for number in range(4000)]
    file.write_text(("\n\n" if separator == "blank-line" else separator).join(paragraphs))
    source = open_sources(str(file), separator=separator, block_bytes=10_000)
    assert source.bytes / 10_000 * 0.8 < len(list(source.blocks())) < source.bytes / 10_000 * 1.3
    assert brief(list(source.documents())) == [item.rstrip("\n") for item in paragraphs]


def test_small_files_share_blocks(tmp_path: Path) -> None:
    for number in range(500):
        (tmp_path / f"{number:03}.txt").write_text(f"text {number}")
    (tmp_path / "250.txt").write_text("")
    source = open_sources(str(tmp_path))
    assert len(list(source.blocks())) == 1
    expected = [f"text {number}" for number in range(500)]
    expected[250] = "[empty file]"
    assert brief(list(source.documents())) == expected


def test_problems_can_be_sent_to_another_process(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    [block] = open_sources(str(tmp_path)).blocks()
    [problem] = pickle.loads(pickle.dumps(block)).documents()
    assert problem.kind == "empty file"
    assert problem.error.where == str(tmp_path / "a.txt")
    assert problem.error.what == "has no content"


def test_file_that_goes_away_is_a_problem_in_its_place(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.parquet", "d.txt"):
        (tmp_path / name).write_text(name)
    source: Corpus = open_sources(str(tmp_path))
    (tmp_path / "b.txt").unlink()
    (tmp_path / "c.parquet").unlink()
    expected = ["a.txt", "[unreadable file]", "[unreadable file]", "d.txt"]
    assert brief(list(source.documents())) == expected
    assert list(source.blocks())[-1].position == source.bytes


# --- Standard input and the embedded corpus


def test_standard_input_is_json_lines_unless_told(tmp_path: Path) -> None:
    stream = io.BytesIO(b'{"text": "a"}\n\n{"text": "b"}')
    source = open_sources("-", stdin=stream)
    assert (source.repeatable, source.bytes) == (False, 0)
    expected = [Document("a", "standard input:1"), Document("b", "standard input:3")]
    assert list(source.documents()) == expected
    with pytest.raises(UserError, match="only once"):
        list(source.documents())
    assert texts("-", stdin=io.BytesIO(b"one\ntwo"), format="txt") == ["one\ntwo"]
    assert brief(delivered("-", stdin=io.BytesIO(b""))) == ["[empty file]"]
    with pytest.raises(UserError, match="parquet cannot be read from a stream"):
        open_sources("-", stdin=stream, format="parquet")


def test_embedded_corpus() -> None:
    source = open_sources(PYTHON_DOCS)
    items = list(source.documents())
    assert len(items) > 300 and all(isinstance(item, Document) for item in items)
    assert isinstance(items[0], Document) and items[0].where.startswith("builtin:python-docs: ")
    assert list(source.blocks())[-1].position == source.bytes > 1_000_000


# --- what goes through readers without a word


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "array.json"])
def test_a_key_that_is_there_twice_is_named(tmp_path: Path, name: str) -> None:
    """Python would take the last one."""
    twice = '{"text": "b", "text": "c"}'
    lines = [' {"text": "a"}', f" {twice}"]
    content = "[\n" + ",\n".join(lines) + "]" if name == "array.json" else "\n".join(lines)
    (tmp_path / name).write_text(content)
    first, bad = delivered(tmp_path / name)
    assert isinstance(first, Document) and first.text == "a"
    line = 3 if name == "array.json" else 2
    assert isinstance(bad, BadInput) and bad.error.where == f"{tmp_path / name}:{line}"
    assert "the key 'text' is there twice" in bad.error.what


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz", "a.csv", "a.parquet", "a.arrow"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    problem = only_problem(tmp_path / name)
    assert str(problem.error).startswith(f"{tmp_path / name}: is a pointer of Git LFS")
    assert "git lfs pull" in problem.error.hint
