"""Tests of: data_tools.sources: Parquet and Arrow, and what Hugging Face datasets saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_tools.sources import BadInput, Document, open_sources
from dualtrain.common.errors import UserError

TEXTS = [f"text {number} " + "é" * (number % 50) for number in range(1000)]
COLUMN_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
]
if hasattr(pa, "string_view"):
    COLUMN_TYPES.append(pa.string_view())


def table(texts: Sequence[str | None], column_type: Any = None) -> Any:
    column = pa.array(texts, pa.string())
    if isinstance(column_type, pa.DictionaryType):
        column = column.cast(column_type.value_type).dictionary_encode()
    elif column_type is not None:
        column = column.cast(column_type)
    return pa.table({"id": pa.array(range(len(texts))), "text": column})


def write(file: Path, content: Any, *, stream: bool = False, rows: int = 300) -> Path:
    if file.suffix == ".parquet":
        parquet.write_table(content, file, row_group_size=rows)
        return file
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(file), "wb") as sink, new(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=rows)
    return file


def brief(source: Path, **options: Any) -> list[str]:
    items = open_sources(str(source), **options).documents()
    return [item.text if isinstance(item, Document) else f"[{item.kind}]" for item in items]


def only_problem(source: Path, **options: Any) -> BadInput:
    items = open_sources(str(source), **options).documents()
    [problem] = [item for item in items if isinstance(item, BadInput)]
    return problem


@pytest.mark.parametrize("column_type", COLUMN_TYPES, ids=str)
@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
@pytest.mark.parametrize("block_bytes", [1000, 1 << 20])
def test_every_kind_of_table(tmp_path: Path, kind: str, column_type: Any, block_bytes: int) -> None:
    file = tmp_path / f"a.{kind.split()[0]}"
    write(file, table(TEXTS, column_type), stream=kind == "arrow stream")
    source = open_sources(str(file), block_bytes=block_bytes)
    expected = [Document(text, f"{file}: row {row}") for row, text in enumerate(TEXTS, start=1)]
    assert list(source.documents()) == expected
    blocks = list(source.blocks())
    assert (len(blocks) > 20) == (block_bytes == 1000)
    positions = [block.position for block in blocks]
    assert positions == sorted(positions)
    assert positions[-1] == source.bytes or kind == "arrow stream"


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_rows_without_text(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"a{suffix}", table(["one", None, ""]))
    assert brief(file) == ["one", "[text is not a string]", ""]
    assert only_problem(file).error.where == f"{file}: row 2"
    bad = pa.array([b"one", b"na\xefve", b"two"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, bad.buffers())
    write(file, pa.table({"text": text}))
    assert brief(file) == ["one", "[not UTF-8]", "two"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_column_of_text_is_missing_or_of_another_type(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"a{suffix}", table(["one"]))
    problem = only_problem(file, text_field="content")
    assert problem.kind == "no text field" and "'id', 'text'" in str(problem.error)
    problem = only_problem(file, text_field="id")
    assert problem.kind == "text is not a string" and "int64" in str(problem.error)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_binary_column_of_utf8(tmp_path: Path, suffix: str) -> None:
    values = [b"one", "zwölf".encode(), "na\xefve".encode("latin-1"), "u".encode("utf-16")]
    for kind in (pa.binary(), pa.large_binary()):
        file = write(tmp_path / f"a{suffix}", pa.table({"text": pa.array(values, kind)}))
        assert brief(file) == ["one", "zwölf", "[not UTF-8]", "[not UTF-8]"]
    file = write(tmp_path / f"a{suffix}", pa.table({"text": pa.array(["o\0n\0e\0"])}))
    assert brief(file) == ["[not text]"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_text_in_nested_columns_and_lists(tmp_path: Path, suffix: str, block_bytes: int) -> None:
    rows = [
        {"meta": {"text": "one"}, "list": ["a", "b"], "turns": [{"text": "x"}]},
        {"meta": None, "list": [], "turns": None},
        {"meta": {"text": "two"}, "list": [None, "c"], "turns": [{"text": "y"}, {"text": "z"}]},
    ]
    content = pa.Table.from_pylist(rows).append_column("a.b", [["1", "2", "3"]])
    file = write(tmp_path / f"a{suffix}", content, rows=2)
    options = {"block_bytes": block_bytes}
    assert brief(file, text_field="meta.text", **options) == [
        "one",
        "[text is not a string]",
        "two",
    ]
    assert brief(file, text_field="a.b", **options) == ["1", "2", "3"]
    source = open_sources(str(file), text_field="list[]", **options)
    found = [d if isinstance(d, Document) else d.error for d in source.documents()]
    assert [item.where.rpartition(": ")[2] for item in found] == [
        "row 1",
        "row 1",
        "row 3",
        "row 3",
    ]
    expected = ["a", "b", "[text is not a string]", "c"]
    assert brief(file, text_field="list[]", **options) == expected
    assert brief(file, text_field="turns[].text", **options) == ["x", "y", "z"]
    for field, message in (
        ("list", r"strings.*give --text-field 'list\[\]'"),
        ("meta", "column 'meta' holds struct"),
        ("meta.body", "one of its columns: 'meta.text'"),
        ("turns.text", r"one of its columns: 'turns\[\]'"),
        ("meta[]", "no column 'meta\\[\\]'"),
    ):
        with pytest.raises(UserError, match=message):
            raise only_problem(file, text_field=field).error


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_what_is_no_table(tmp_path: Path, suffix: str) -> None:
    for number, content in enumerate((b"", b"x", b"neither of them" * 10)):
        (tmp_path / f"{number}{suffix}").write_bytes(content)
    (tmp_path / "z.txt").write_text("read all the same")
    expected = ["[empty file]", "[damaged file]", "[damaged file]", "read all the same"]
    assert brief(tmp_path) == expected


def test_damaged_arrow_file_is_noticed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.arrow", table(["one", "two", "three"]), stream=True)
    content = file.read_bytes()
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 3, 6, 11))
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, offsets[:4] + b"\xff" * 4 + offsets[8:]))
    assert brief(file) == ["[damaged file]"]


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_truncated_table(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"a.{kind.split()[0]}"
    write(file, table(TEXTS), stream=kind == "arrow stream")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    *texts, problem = brief(file)
    assert problem == "[truncated file]"
    # What is in a Parquet file stands at its end; an Arrow file has its batches of 300 rows.
    assert texts == ([] if kind == "parquet" else TEXTS[:300])


def saved(directory: Path, texts: list[str], *, files: int = 2, **state: Any) -> Path:
    """Lay out a directory as ``Dataset.save_to_disk`` does."""
    directory.mkdir(parents=True)
    size = -(-len(texts) // files)
    names = [f"data-{number:05}-of-{files:05}.arrow" for number in range(files)]
    for number, name in enumerate(names):
        part = table(list(texts[number * size : (number + 1) * size]))
        write(directory / name, part, stream=True)
    content = {"_data_files": [{"filename": name} for name in names], "_split": None, **state}
    (directory / "state.json").write_text(json.dumps(content))
    (directory / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return directory


def test_saved_dataset_is_read_in_the_order_of_its_state(tmp_path: Path) -> None:
    directory = saved(tmp_path / "set", TEXTS, files=3)
    assert brief(directory) == TEXTS
    state = json.loads((directory / "state.json").read_text())
    state["_data_files"].reverse()
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "cache-1f.arrow").write_bytes(b"left by a map()")
    assert brief(directory) == TEXTS[668:] + TEXTS[334:668] + TEXTS[:334]
    assert open_sources(str(directory)).ignored == (str(directory / "cache-1f.arrow"),)


def test_saved_dataset_within_a_directory(tmp_path: Path) -> None:
    saved(tmp_path / "b", ["from b", "too"])
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.txt").write_text("last")
    assert brief(tmp_path) == ["first", "from b", "too", "last"]


def test_dataset_dict_with_one_split_is_read(tmp_path: Path) -> None:
    saved(tmp_path / "train", ["one", "two"])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert brief(tmp_path) == ["one", "two"]
    saved(tmp_path / "test", ["three"], files=1)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert brief(tmp_path) == ["one", "two"]
    source = open_sources(str(tmp_path))
    assert source.notes == (f"{tmp_path}: only the split train is read, not test",)
    assert source.ignored == ()
    assert brief(tmp_path / "test") == ["three"]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["en", "test"]}')
    with pytest.raises(UserError) as caught:
        open_sources(str(tmp_path))
    assert f"give {tmp_path / 'en'} or {tmp_path / 'test'}" in str(caught.value)


def test_saved_datasets_that_cannot_be_read(tmp_path: Path) -> None:
    indices = [{"filename": "indices.arrow"}]
    saved(tmp_path / "shuffled", TEXTS, _indices_data_files=indices)
    saved(tmp_path / "incomplete", TEXTS)
    (tmp_path / "incomplete" / "data-00001-of-00002.arrow").unlink()
    saved(tmp_path / "broken", TEXTS)
    (tmp_path / "broken" / "state.json").write_text("{")
    saved(tmp_path / "stateless", TEXTS)
    (tmp_path / "stateless" / "state.json").write_text("{}")
    cases = {
        "shuffled": "flatten_indices",
        "incomplete": "data-00001-of-00002.arrow: is missing",
        "broken": "state.json: is not JSON",
        "stateless": "does not list",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            open_sources(str(tmp_path / name))
