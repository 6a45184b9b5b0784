"""Tests of: data_tools.sources: which files are found, in which order, what is refused."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any, TypeGuard

import pytest

from data_tools.sources import BadInput, Document, open_sources
from dualtrain.common.errors import UserError


def texts(*sources: Path | str, **options: Any) -> list[str]:
    found = open_sources([str(source) for source in sources], **options).documents()
    return [item.text for item in found if isinstance(item, Document)]


def is_problem(item: Document | BadInput) -> TypeGuard[BadInput]:
    return isinstance(item, BadInput)


def fill(directory: Path, *names: str) -> None:
    """Text files that hold their own names."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)


def test_directory_and_pattern_are_read_in_order_of_paths(tmp_path: Path) -> None:
    fill(tmp_path, "b.txt", "a.txt", "deep/c.txt", "notes.md")
    assert texts(tmp_path) == ["a.txt", "b.txt", "deep/c.txt"]
    assert texts(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert texts(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "deep/c.txt"]
    assert texts(tmp_path / "d*") == ["deep/c.txt"]
    source = open_sources(str(tmp_path))
    assert list(source.documents()) == list(source.documents()), "a source can be read again"
    assert source.repeatable
    assert [file.bytes for file in source.files] == [5, 5, 10] and source.bytes == 20
    assert [file.path for file in source.files][0] == str(tmp_path / "a.txt")


def test_several_sources_are_read_in_the_order_given(tmp_path: Path) -> None:
    fill(tmp_path, "b/1.txt", "b/2.txt", "a.txt", "c[1].txt")
    assert texts(tmp_path / "b", tmp_path / "a.txt") == ["b/1.txt", "b/2.txt", "a.txt"]
    assert texts(tmp_path / "c[1].txt", tmp_path / "b") == ["c[1].txt", "b/1.txt", "b/2.txt"]


def test_what_a_directory_holds_besides_is_listed(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "b.pdf", "sub/c.md", ".hidden.txt", ".git/config.json", "d.parquet.gz")
    fill(tmp_path, "dataset_info.json", "e.txt.lz4")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    names = (".git/", ".hidden.txt", "b.pdf", "d.parquet.gz", "dataset_info.json", "e.txt.lz4")
    expected = [f"{tmp_path}/{name}" for name in (*names, "gone.txt", "sub/c.md")]
    assert list(open_sources(str(tmp_path)).ignored) == expected


def test_links_to_directories_are_followed_once(tmp_path: Path) -> None:
    fill(tmp_path, "elsewhere/a.txt", "here/b.txt")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "here")
    assert texts(tmp_path / "here") == ["elsewhere/a.txt", "here/b.txt"]


def test_format_tells_what_a_file_without_suffix_is(tmp_path: Path) -> None:
    fill(tmp_path, "README", "notes.v2", "a.txt")
    assert texts(tmp_path / "README", format="txt") == ["README"]
    assert texts(tmp_path / "*", format="txt") == ["README", "a.txt", "notes.v2"]
    (tmp_path / "part-00000").write_text('{"text": "x"}')
    both = (tmp_path / "part-00000", tmp_path / "a.txt")
    assert texts(*both, format="jsonl") == ["x", "a.txt"], "a known suffix says more"
    with pytest.raises(UserError, match="--format"):
        open_sources(str(tmp_path / "README"))


def test_format_reaches_into_directories(tmp_path: Path) -> None:
    fill(tmp_path, "one.train", "deep/two.train", "a.txt", ".hidden.train", ".git/config")
    assert texts(tmp_path, format="txt") == ["a.txt", "deep/two.train", "one.train"]
    (tmp_path / "part-0").write_bytes(gzip.compress(b"packed"))
    assert texts(tmp_path, format="txt")[-1] == "packed"
    (tmp_path / "z.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    problems = [x for x in open_sources(str(tmp_path), format="txt").documents() if is_problem(x)]
    assert [problem.error.where for problem in problems] == [f"{tmp_path / 'z.png'}:1"]


def test_nothing_is_read_twice(tmp_path: Path) -> None:
    fill(tmp_path, "sub/a.txt", "b.txt")
    (tmp_path / "alias.txt").symlink_to(tmp_path / "b.txt")
    folder, file = str(tmp_path / "sub"), str(tmp_path / "sub" / "a.txt")
    doubles = [
        [folder, file],
        [file, file],
        [folder, folder + "/../sub/*.txt"],
        [str(tmp_path)],
        ["-", "-"],
    ]
    for sources in doubles:
        with pytest.raises(UserError, match="named twice"):
            open_sources(sources)
    with pytest.raises(UserError) as caught:
        open_sources(str(tmp_path))
    names = f"{tmp_path}/b.txt: is named twice among the sources: it is the same file as {tmp_path}"
    assert str(caught.value).startswith(f"{names}/alias.txt")


def test_empty_name_is_not_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "private.txt")
    monkeypatch.chdir(tmp_path)
    for sources in ("", ["private.txt", ""]):
        with pytest.raises(UserError, match="empty name.*variable of the shell is not set"):
            open_sources(sources)
    assert texts(".") == ["private.txt"]


def test_names_that_are_not_utf8_are_read_and_shown(tmp_path: Path) -> None:
    file = os.fsencode(tmp_path) + b"/na\xefve.jsonl"
    Path(os.fsdecode(file)).write_text('{"text": "one"}\n{"body": "two"}\n')
    Path(os.fsdecode(file) + ".pdf").touch()
    source = open_sources(str(tmp_path))
    shown = f"{tmp_path}/na\\xefve.jsonl"
    assert [found.name for found in source.files] == [shown]
    assert source.ignored == (f"{shown}.pdf",)
    one, two = source.documents()
    assert isinstance(one, Document) and one == Document("one", f"{shown}:1")
    assert isinstance(two, BadInput) and two.error.where == f"{shown}:2"


def test_places_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="File name too long"):
        open_sources(str(tmp_path / ("x" * 300)))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    (tmp_path / "b.parquet.gz").touch()
    (tmp_path / "empty").mkdir()
    cases = {
        "nowhere.txt": "no such file",
        "*.json": "no such file",
        "a.pdf": "cannot read '.pdf' files",
        "*.pdf": "cannot read '.pdf' files",
        "b.parquet.gz": "cannot read '.parquet.gz' files",
        "empty": "has no text",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            open_sources(str(tmp_path / name))
    with pytest.raises(UserError, match="builtin:python-docs"):
        open_sources("builtin:wikipedia")
    with pytest.raises(UserError, match="no source"):
        open_sources([])


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "b.jsonl")
    for name, option, value in (
        ("a.txt", "text_field", "body"),
        ("b.jsonl", "separator", "|"),
        ("b.jsonl", "format", "txt"),
    ):
        with pytest.raises(UserError, match=f"--{option.replace('_', '-')}: .*has no effect"):
            open_sources(str(tmp_path / name), **{option: value})
    assert texts(tmp_path / "a.txt", format="txt") == ["a.txt"], "true, if known already"
