"""Tests of: data_tools.sources.token_files, tables, data_tools.encode: documents that come as ids.

What is made of ids is compared with what is made of the text that they were made of.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from helpers.conversions import files_of, write_jsonl
from helpers.documents import documents
from pyarrow import parquet

from data_tools.convert import build_dataset
from data_tools.sources.cutting import Separator
from data_tools.sources.documents import Block, Document
from data_tools.sources.files import ReadingOptions
from data_tools.sources.token_files import token_parts
from data_tools.tokenizers.tokenizer import Tokenizer
from dualtrain.common.errors import UserError
from dualtrain.data.dataset import DATASET_FILE, DatasetInfo
from dualtrain.recipe.schema import BuildSection

TEXTS = [*documents()[:40], "ümlaut · 漢字 🙂", "a", " two  spaces\n\n"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, list[list[int]]]:
    """Its file, the id between documents, and the texts in its ids."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made = Tokenizer.train(TEXTS, 500)
    made.save(file)
    return file, made.special_tokens["</s>"], [made.encode(text) for text in TEXTS]


def stream(ids: Sequence[list[int]], separator: int, *, first: bool) -> np.ndarray:
    """All documents, each with the separator before it or behind it."""
    parts = [[separator, *i] if first else [*i, separator] for i in ids]
    return np.concatenate([np.array(part, dtype=np.int64) for part in parts])


def header(magic: int, version: int, count: int) -> bytes:
    numbers = np.zeros(256, dtype="<i4")
    numbers[:3] = magic, version, count
    return numbers.tobytes()


def npy(ids: np.ndarray, dtype: str) -> bytes:
    sink = io.BytesIO()
    np.save(sink, ids.astype(dtype))
    return sink.getvalue()


KINDS: dict[str, Callable[[np.ndarray], bytes]] = {
    "nanogpt": lambda ids: ids.astype("<u2").tobytes(),
    "modded-nanogpt": lambda ids: header(20240520, 1, len(ids)) + ids.astype("<u2").tobytes(),
    "llm.c, llama 3": lambda ids: header(20240801, 7, len(ids)) + ids.astype("<u4").tobytes(),
    "npy of int64": lambda ids: npy(ids, "<i8"),
    "npy of big-endian uint16": lambda ids: npy(ids, ">u2"),
    "packed": lambda ids: gzip.compress(ids.astype("<u2").tobytes()),
}


def shards(dataset: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(dataset).items() if name != DATASET_FILE}


def build(source: Path, tokenizer: Path, **more: object) -> BuildSection:
    given = {"source": str(source), "tokenizer": str(tokenizer), "val_fraction": 0.2}
    return BuildSection.model_validate(given | more)


@pytest.fixture(scope="module")
def of_text(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    corpus = write_jsonl(folder / "corpus.jsonl", TEXTS)
    build_dataset(build(corpus, tokenizer[0]), folder / "data")
    return folder / "data"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_ids_make_the_dataset_that_their_text_makes(tokenizer, of_text, kind, first, tmp_path):
    file, separator, ids = tokenizer
    (tmp_path / "ids.bin").write_bytes(KINDS[kind](stream(ids, separator, first=first)))
    of_ids = build(tmp_path / "ids.bin", file, format="tokens", separator=str(separator))
    made = build_dataset(of_ids, tmp_path / "data", workers=1)
    assert shards(tmp_path / "data") == shards(of_text)
    assert made.splits == DatasetInfo.load(of_text).splits


@pytest.mark.parametrize("separated", [True, False])
def test_a_row_of_ids_is_a_document_or_several(tokenizer, of_text, separated, tmp_path):
    file, separator, ids = tokenizer
    rows = ids
    if separated:
        rows = [[*a, separator, *b] for a, b in zip(ids[:-1:2], ids[1::2], strict=True)] + ids[-1:]
    table = pyarrow.table({"input_ids": pyarrow.array(rows, pyarrow.list_(pyarrow.int32()))})
    parquet.write_table(table, tmp_path / "ids.parquet", row_group_size=7)
    more = {"separator": str(separator)} if separated else {}
    of_ids = build(tmp_path / "ids.parquet", file, text_field="input_ids", **more)
    build_dataset(of_ids, tmp_path / "data")
    assert shards(tmp_path / "data") == shards(of_text)


@pytest.mark.parametrize("block_bytes", [1, 30, 10**6])
@pytest.mark.parametrize("chunk", [1, 3, 10**6])
def test_documents_are_whole_whatever_the_blocks(block_bytes, chunk):
    rng = np.random.default_rng(block_bytes + chunk)
    ids = rng.integers(0, 5, 400).astype("<u2")
    data = ids.tobytes()
    chunks = iter([data[i : i + chunk] for i in range(0, len(data), chunk)])
    options = ReadingOptions(text_field="text", separator=Separator("3"), block_bytes=block_bytes)
    parts = tuple(token_parts(chunks, "x", options))
    found = [item for item in Block(0, parts).documents() if isinstance(item, Document)]
    # By plain strings: 0 to 4 are digits.
    text = "".join(map(str, ids))
    written = ["".join(map(str, d.ids)) for d in found if d.ids is not None]
    assert written == [part for part in text.split("3") if part]
    for document, digits in zip(found, written, strict=True):
        start = int(document.where.removeprefix("x: from token ").removesuffix(" on"))
        assert text[start - 1 :].startswith(digits)


LONG = np.arange(300, dtype=np.int64) % 200 + 20
WRONG = {
    "odd length": (KINDS["nanogpt"](LONG) + b"\0", "601 bytes, which are not whole ids of 2"),
    "another version": (header(20240520, 2, 300) + b"\0" * 600, "a header of version 2"),
    "another count": (
        header(20240520, 1, 301) + KINDS["nanogpt"](LONG),
        "300 tokens, and its header says 301",
    ),
    "an array": (npy(LONG.reshape(3, 100), "<i8"), "shape (3, 100)"),
    "floats": (npy(LONG, "<f4"), "an array of float32"),
    "half a header": (npy(LONG, "<i8")[:20], "damaged header"),
    "a pickle": (npy(np.array([None]), "O"), "an array of object"),
    "32 bits without a header": (LONG.astype("<u4").tobytes(), "looks like ids of 32 bits"),
    "nothing": (b"", "has no content"),
    "beyond the vocabulary": (
        KINDS["nanogpt"](LONG + 40_000),
        "from token 1 on: holds the id 40020",
    ),
    "negative": (npy(LONG - 21, "<i8"), "holds the id -1,"),
    "special": (npy(np.r_[LONG, 4, LONG], "<i8"), "holds the id 4,"),
    "no separator": (npy(LONG, "<i8"), "'2' occurs nowhere"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_file_of_ids_is_refused(tokenizer, kind, tmp_path):
    data, message = WRONG[kind]
    (tmp_path / "ids.bin").write_bytes(data)
    of_ids = build(tmp_path / "ids.bin", tokenizer[0], format="tokens", separator="2")
    with pytest.raises(UserError) as refused:
        build_dataset(of_ids, tmp_path / "data")
    assert message in str(refused.value), refused.value
    assert kind == "no separator" or str(tmp_path / "ids.bin") in str(refused.value)
    assert refused.value.expected or kind == "nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"separator": None}, "--separator: is not given"),
        ({"separator": "x"}, "'x' is no token id"),
        ({"tokenizer": None}, "name it with --tokenizer"),
    ],
)
def test_options_that_ids_need(tokenizer, options, message, tmp_path):
    (tmp_path / "ids.bin").write_bytes(KINDS["nanogpt"](LONG))
    given = {"format": "tokens", "separator": "20"} | options
    of_ids = build(tmp_path / "ids.bin", tokenizer[0]).model_copy(update=given)
    with pytest.raises(UserError) as refused:
        build_dataset(of_ids, tmp_path / "data")
    assert message in str(refused.value)


def test_a_missing_id_in_a_row_is_refused_with_its_place(tokenizer, tmp_path):
    rows = pyarrow.array([[20, 21], None, [22, None]], pyarrow.list_(pyarrow.int32()))
    parquet.write_table(pyarrow.table({"ids": rows}), tmp_path / "ids.parquet")
    of_ids = build(tmp_path / "ids.parquet", tokenizer[0], text_field="ids", on_error="skip")
    with pytest.raises(UserError, match="one document cannot be divided"):
        build_dataset(of_ids, tmp_path / "data")
    of_ids = of_ids.model_copy(update={"on_error": "stop"})
    with pytest.raises(UserError, match=r"row 2: column 'ids' is null — expected a list of ids"):
        build_dataset(of_ids, tmp_path / "data")


def test_a_directory_of_other_things_is_not_taken_for_ids(tmp_path):
    (tmp_path / "model.bin").write_bytes(KINDS["nanogpt"](LONG))
    write_jsonl(tmp_path / "text.jsonl", ["one", "two"])
    made = build_dataset(
        BuildSection(source=str(tmp_path), vocab_size=272, val_fraction=0.5), tmp_path / "data"
    )
    assert [Path(file.path).name for file in made.sources] == ["text.jsonl"]
    assert json.loads((tmp_path / "data" / DATASET_FILE).read_text())["skipped_documents"] == 0
