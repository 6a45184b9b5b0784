"""Tests of: data_tools.sources: compressed files give the same texts, and no loss unreported."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tempfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.sources import BadInput, Document, open_sources

COMPRESS = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
SUFFIXES = sorted(COMPRESS)


def lines(count: int, *, start: int = 0) -> bytes:
    """JSON lines that compress badly, so that truncation anywhere loses documents."""
    noise = random.Random(start)
    records = ({"text": f"{start + n} {noise.randbytes(200).hex()}"} for n in range(count))
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def read(file: Path) -> tuple[list[str], list[BadInput]]:
    items = list(open_sources(str(file)).documents())
    problems = [item for item in items if isinstance(item, BadInput)]
    assert not problems or items[-1] is problems[-1], "the problem comes last"
    return [item.text for item in items if isinstance(item, Document)], problems


def numbers(texts: list[str]) -> list[int]:
    return [int(text.split()[0]) for text in texts]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_compression_under_a_plain_name_is_seen(tmp_path: Path, suffix: str) -> None:
    for name in ("a.jsonl", "b.csv"):
        content = b"text\none\n" if name.endswith("csv") else b'{"text": "one"}\n'
        (tmp_path / name).write_bytes(COMPRESS[suffix](content))
        assert read(tmp_path / name) == (["one"], [])
    (tmp_path / "a.txt").write_text("BZh is how a text may begin")
    assert read(tmp_path / "a.txt")[0] == ["BZh is how a text may begin"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_files(tmp_path: Path, suffix: str) -> None:
    for content in (b"", COMPRESS[suffix](b"")):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(content)
        texts, [problem] = read(tmp_path / f"a.jsonl{suffix}")
        assert problem.kind == "empty file" and not texts


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_several_members_are_one_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    compress = COMPRESS[suffix]
    parts = [lines(300), lines(1, start=300)[:-5], lines(1, start=300)[-5:], b"", lines(50)]
    file.write_bytes(b"".join(compress(part) for part in parts))
    texts, problems = read(file)
    assert numbers(texts) == [*range(301), *range(50)] and not problems
    source = open_sources(str(file))
    assert list(source.blocks())[-1].position == source.bytes == file.stat().st_size


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_file_delivers_what_is_whole_and_says_so(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    compress = COMPRESS[suffix]
    content = b"".join(compress(lines(100, start=start)) for start in (0, 100, 200))
    first = len(compress(lines(100)))
    for kept in (1, 3, first - 1, first + 1, first + 40, 2 * first + first // 2, len(content) - 1):
        file.write_bytes(content[:kept])
        texts, problems = read(file)
        assert [problem.kind for problem in problems] == ["truncated file"], kept
        assert problems[0].error.where == str(file)
        assert numbers(texts) == list(range(len(texts)))
        assert len(texts) >= kept // first * 100


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_truncated_single_stream_delivers_most_documents(tmp_path: Path, suffix: str) -> None:
    content = COMPRESS[suffix](lines(1500))
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(content[: len(content) // 2])
    texts, problems = read(file)
    assert problems[0].kind == "truncated file"
    assert numbers(texts) == list(range(len(texts))) and len(texts) > 450


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_is_reported(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    content = COMPRESS[suffix](lines(400))
    middle = len(content) // 2
    flipped = content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    cases = {
        "no compression": lines(3),
        "bytes flipped": flipped + content[middle + 64 :],
        "more behind": content + b"something else",
    }
    for name, data in cases.items():
        file.write_bytes(data)
        *others, problem = read(file)[1]
        assert problem.kind == "damaged file", name
        # gzip notices only at the end, so that damaged lines are met before.
        assert not others or (suffix == ".gz" and name == "bytes flipped")
    file.write_bytes(cases["more behind"])
    assert numbers(read(file)[0]) == list(range(400))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_in_it_is_an_empty_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    for content in (b"", COMPRESS[suffix](b"")):
        file.write_bytes(content)
        assert [problem.kind for problem in read(file)[1]] == ["empty file"]


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_zeros_may_follow(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    part = COMPRESS[suffix](lines(5)) + bytes(512)
    file.write_bytes(part + part)
    texts, problems = read(file)
    assert len(texts) == 10 and not problems


def test_zstandard_long_windows_and_skippable_frames(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    long = compressor.compress(lines(300)) + compressor.flush()
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(skippable + long + skippable + COMPRESS[".zst"](lines(3)) + skippable)
    texts, problems = read(file)
    assert len(texts) == 303 and not problems


def test_truncated_json_array(tmp_path: Path) -> None:
    records = [{"text": f"{n} {random.Random(n).randbytes(200).hex()}é"} for n in range(1000)]
    content = gzip.compress(json.dumps(records, indent=1, ensure_ascii=False).encode())
    file = tmp_path / "a.json.gz"
    for kept in (len(content) // 2, len(content) - 5):
        file.write_bytes(content[:kept])
        texts, problems = read(file)
        assert [problem.kind for problem in problems] == ["truncated file"]
        assert numbers(texts) == list(range(len(texts))) and len(texts) >= kept / len(content) * 900


def test_truncated_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt.gz"
    paragraphs = [random.Random(n).randbytes(200).hex() for n in range(100)]
    content = gzip.compress("\n\n".join(paragraphs).encode())
    file.write_bytes(content[: len(content) // 2])
    assert read(file)[0] == []
    items = list(open_sources(str(file), separator="blank-line").documents())
    texts = [item.text for item in items if isinstance(item, Document)]
    assert texts == paragraphs[: len(texts)] and len(texts) > 30
    assert isinstance(items[-1], BadInput) and items[-1].kind == "truncated file"


@pytest.mark.parametrize("suffix", ["", *SUFFIXES])
def test_standard_input_and_files_without_suffix_may_be_compressed(
    tmp_path: Path, suffix: str
) -> None:
    content = COMPRESS[suffix](lines(20)) if suffix else lines(20)
    items = list(open_sources("-", stdin=io.BytesIO(content)).documents())
    assert [item.where for item in items if isinstance(item, Document)] == [
        f"standard input:{line}" for line in range(1, 21)
    ]
    file = tmp_path / "downloaded"
    file.write_bytes(content)
    found = list(open_sources(str(file), format="jsonl").documents())
    assert len(found) == 20 and all(isinstance(item, Document) for item in found)


# Text that survives every kind: pieces of a .txt lose line ends around them, \r\n becomes \n.
plain_text = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40
)
divided_text = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\r\n\0"), min_size=1, max_size=40
).filter(lambda text: not text.isspace())


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(plain_text, min_size=1, max_size=12),
    kind=st.sampled_from(["jsonl", "json lines", "json array", "json indented"]),
    suffix=st.sampled_from(["", *SUFFIXES]),
    ascii_only=st.booleans(),
    block_bytes=st.integers(1, 300),
)
def test_any_json_in_any_compression_and_block_size_gives_the_texts(
    texts: list[str], kind: str, suffix: str, ascii_only: bool, block_bytes: int
) -> None:
    records = [{"id": number, "text": text} for number, text in enumerate(texts)]
    if kind in ("jsonl", "json lines"):
        content = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    else:
        indent = 1 if kind == "json indented" else None
        content = json.dumps(records, ensure_ascii=ascii_only, indent=indent)
    name = f"a.{kind.split()[0]}{suffix}"
    assert written_and_read(name, content.encode(), block_bytes, None) == texts


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(divided_text, min_size=2, max_size=12),
    separator=st.sampled_from(["blank-line", "<|endoftext|>", "§§", "\n#\n"]),
    newline=st.sampled_from(["\n", "\r\n"]),
    suffix=st.sampled_from(["", *SUFFIXES]),
    block_bytes=st.integers(1, 300),
)
def test_any_divided_text_in_any_compression_and_block_size_gives_the_texts(
    texts: list[str], separator: str, newline: str, suffix: str, block_bytes: int
) -> None:
    between = "\n \t\n" if separator == "blank-line" else separator
    if separator != "blank-line":  # no text may hold any of it
        texts = [text.replace(separator.strip()[0], "x") for text in texts]
    content = between.join(texts).replace("\n", newline).encode()
    assert written_and_read(f"a.txt{suffix}", content, block_bytes, separator) == texts


def written_and_read(
    name: str, content: bytes, block_bytes: int, separator: str | None
) -> list[str]:
    suffix = Path(name).suffix
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / name
        file.write_bytes(COMPRESS[suffix](content) if suffix in COMPRESS else content)
        source = open_sources(str(file), block_bytes=block_bytes, separator=separator)
        items = list(source.documents())
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items if isinstance(item, Document)]
