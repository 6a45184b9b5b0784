"""Tests of: data_tools.convert: what a dataset holds, and that nothing half-made looks like one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers.conversions import Said, StopAt, files_of
from typer.testing import CliRunner

from data_tools import convert, train_tokenizer
from data_tools.command import app
from data_tools.convert import build_dataset
from data_tools.reporting import Report, StageProgress
from data_tools.tokenizers.tokenizer import SPECIAL_TOKENS, Tokenizer
from data_tools.verify import verify_dataset
from dualtrain.common.errors import UserError
from dualtrain.data.dataset import DatasetInfo, TokenDataset
from dualtrain.recipe.schema import BuildSection

TEXTS = [f"Document {i} says " + "the quick brown fox " * (i % 7 + 1) for i in range(60)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, "", " \n"]))
    return file


def section(source: Path, **changes: object) -> BuildSection:
    values = {"source": str(source), "vocab_size": 300, "val_fraction": 0.2} | changes
    return BuildSection.model_validate(values)


def tokens_of(path: Path, split: str) -> list[np.ndarray]:
    """The documents of a split through plain streaming, without any code of ours."""
    from streaming import LocalDataset

    return [sample["tokens"] for sample in LocalDataset(str(path), split)[:]]


def texts_of(path: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    return [tokenizer.decode(tokens) for tokens in tokens_of(path, split)]


def test_every_document_is_in_one_split_and_readable_by_streaming(
    tmp_path: Path, corpus: Path
) -> None:
    out = tmp_path / "data"
    info = build_dataset(section(corpus), out, shard_bytes=2000)
    train, val = texts_of(out, "train"), texts_of(out, "val")
    assert sorted(train + val) == sorted(TEXTS)
    assert 3 <= len(val) <= 25 and len(info.splits) == 2
    assert len(list((out / "train").glob("*.mds"))) > 1
    for name, texts in {"train": train, "val": val}.items():
        split = info.splits[name]
        assert split.documents == len(texts)
        assert split.bytes == sum(len(text.encode()) for text in texts)
        assert split.words == sum(len(text.split()) for text in texts)
        lengths = np.load(out / name / "lengths.npy")
        assert split.tokens == lengths.sum()
        assert lengths.tolist() == [len(tokens) for tokens in tokens_of(out, name)]
    assert info.skipped_documents == 2 and info.left_out == {"empty": 2}
    assert info.dtype == "uint16" and info.special_ids == tuple(range(16))
    assert info == DatasetInfo.load(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "data"]
    assert verify_dataset(out) == info


def test_split_depends_on_the_text_only(tmp_path: Path) -> None:
    """Equal texts are never on both sides, and neither order nor company moves a document."""
    many = [*TEXTS, *TEXTS[:20]]
    for name, texts in {"a": many, "b": many[::-1]}.items():
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
        build_dataset(section(tmp_path / f"{name}.jsonl"), tmp_path / name)
    assert sorted(texts_of(tmp_path / "a", "val")) == sorted(texts_of(tmp_path / "b", "val"))
    assert not set(texts_of(tmp_path / "a", "val")) & set(texts_of(tmp_path / "a", "train"))


def test_order_on_disk(tmp_path: Path, corpus: Path) -> None:
    orders = {}
    for name, seed in {"kept": None, "zero": 0, "again": 0, "one": 1}.items():
        build_dataset(section(corpus, shuffle_seed=seed), tmp_path / name)
        orders[name] = texts_of(tmp_path / name, "train")
    assert orders["kept"] == [text for text in TEXTS if text in set(orders["kept"])]
    assert orders["zero"] == orders["again"]
    assert len({tuple(order) for order in orders.values()}) == 3
    assert sorted(orders["zero"]) == sorted(orders["one"]) == sorted(orders["kept"])


def test_held_out_text_does_not_shape_the_tokenizer(tmp_path: Path, corpus: Path) -> None:
    build_dataset(section(corpus), tmp_path / "data")
    train = set(texts_of(tmp_path / "data", "train"))
    expected = Tokenizer.train([text for text in TEXTS if text in train], 300)
    assert DatasetInfo.load(tmp_path / "data").tokenizer_sha256 == expected.sha256


def test_large_vocabulary_is_stored_in_32_bits(tmp_path: Path, corpus: Path) -> None:
    words = sorted({word for text in TEXTS for word in text.split()})
    names = [*SPECIAL_TOKENS, *(f"unused{i}" for i in range(70_000)), *words]
    model = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(tmp_path / "words.json"))
    out = tmp_path / "data"
    info = build_dataset(section(corpus, tokenizer=str(tmp_path / "words.json")), out)
    assert info.dtype == "uint32" and info.special_ids == (0, 1, 2, 3, 4)
    tokens = TokenDataset.open(out).read(0)
    assert tokens.dtype == np.uint32 and tokens.min() >= 70_005


def test_special_tokens_made_of_ordinary_text_are_refused(tmp_path: Path) -> None:
    """A word-level tokenizer knows no other way to write "<s>"; in a document it would split it."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a b"}\n{"text": "a <s> b"}\n')
    model = tokenizers.models.WordLevel({n: i for i, n in enumerate(SPECIAL_TOKENS)}, "<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match="makes special tokens of this text") as caught:
        build_dataset(section(corpus, tokenizer=str(tmp_path / "words.json")), tmp_path / "data")
    assert caught.value.where == f"{corpus}:2"
    assert not (tmp_path / "data").exists()


def test_same_settings_accept_the_dataset_others_are_refused(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "data"
    info = build_dataset(section(corpus), out)
    written = (out / "dataset.json").stat().st_mtime_ns
    assert build_dataset(section(corpus), out) == info
    assert (out / "dataset.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="vocab_size is 300 there and 400 here; shuffle_seed is 0"):
        build_dataset(section(corpus, vocab_size=400, shuffle_seed=5), out)
    with corpus.open("a") as stream:
        stream.write('{"text": "more"}\n')
    with pytest.raises(UserError, match="1 source files changed since, first .*corpus.jsonl"):
        build_dataset(section(corpus), out)
    corpus.unlink()
    assert build_dataset(section(corpus), out) == info, "the source need not stay"


def test_change_that_keeps_the_size_is_noticed(tmp_path: Path, corpus: Path) -> None:
    info = build_dataset(section(corpus), tmp_path / "data")
    text = corpus.read_text()
    corpus.write_text(text)  # another time of change, the same content
    assert build_dataset(section(corpus), tmp_path / "data") == info
    corpus.write_text(text.replace("quick", "QUICK"))
    with pytest.raises(UserError, match="1 source files changed since"):
        build_dataset(section(corpus), tmp_path / "data")


def test_dataset_is_accepted_where_nothing_can_be_written(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = build_dataset(section(corpus), tmp_path / "data")
    monkeypatch.setattr(convert, "reserved", lambda *_, **__: pytest.fail("wrote a lock file"))
    assert build_dataset(section(corpus), tmp_path / "data") == info


def test_anything_else_in_the_way_is_left_alone(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("the only copy")
    with pytest.raises(UserError, match=r"is not empty and has no dataset\.json"):
        build_dataset(section(corpus), tmp_path / "data")
    assert (tmp_path / "data" / "thesis.txt").read_text() == "the only copy"
    (tmp_path / "empty").mkdir()
    build_dataset(section(corpus), tmp_path / "empty")


STAGES = ["looking through the text", "training the tokenizer", "encoding", "writing train"]


@pytest.mark.parametrize("stage", [*STAGES, "writing val"])
def test_interrupted_conversion_leaves_no_dataset_and_the_same_command_goes_on(
    tmp_path: Path, corpus: Path, stage: str
) -> None:
    build_dataset(section(corpus), tmp_path / "expected")
    with pytest.raises(KeyboardInterrupt):
        build_dataset(section(corpus), tmp_path / "data", report=StopAt(stage))
    assert not (tmp_path / "data").exists()
    said = Said()
    build_dataset(section(corpus), tmp_path / "data", report=said)
    assert "going on with an interrupted conversion" in said.lines[0]
    if stage.startswith("writing"):
        assert said.lines[1] == "60 documents are encoded already"
        assert "training the tokenizer" not in said.stages and "encoding" not in said.stages
    assert files_of(tmp_path / "data") == files_of(tmp_path / "expected")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["corpus.jsonl", "data", "expected"], "nothing is left beside it"


def test_rest_of_another_conversion_is_never_used(tmp_path: Path, corpus: Path) -> None:
    changes: dict[str, dict] = {"settings": {"vocab_size": 310}, "files": {}}
    for name, options in changes.items():
        with pytest.raises(KeyboardInterrupt):
            build_dataset(section(corpus), tmp_path / name, report=StopAt("writing val"))
        if name == "files":
            corpus.write_text(corpus.read_text().replace("quick", "swift"))
        said = Said()
        build_dataset(section(corpus, **options), tmp_path / name, report=said)
        assert "starting again" in said.lines[0] and "other settings" in said.lines[0]
        build_dataset(section(corpus, **options), tmp_path / f"{name}-expected")
        assert files_of(tmp_path / name) == files_of(tmp_path / f"{name}-expected")


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_damaged_rest_is_not_used(tmp_path: Path, corpus: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_dataset(section(corpus), tmp_path / "data", report=StopAt("writing val"))
    spool = tmp_path / ".data.partial" / "work" / "tokens.spool"
    if damage == "cut":
        spool.write_bytes(spool.read_bytes()[:-2])
    else:
        spool.unlink()
    said = Said()
    build_dataset(section(corpus), tmp_path / "data", report=said)
    assert "encoding" in said.stages
    verify_dataset(tmp_path / "data")


def test_killed_conversion_leaves_no_dataset_and_a_rerun_works(
    tmp_path: Path, corpus: Path
) -> None:
    code = f"""
import time
from data_tools import convert
from data_tools.reporting import Report
from dualtrain.recipe.schema import BuildSection
class Stop(Report):
    def show(self, progress):
        if progress.stage == "writing val":
            print("now", flush=True)
            time.sleep(60)
build = BuildSection(source={str(corpus)!r}, vocab_size=300, val_fraction=0.2)
convert.build_dataset(build, {str(tmp_path / "data")!r}, report=Stop())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "data").exists()
    build_dataset(section(corpus), tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "data"]


def test_two_processes_build_once(tmp_path: Path, corpus: Path) -> None:
    code = f"""
from data_tools.convert import build_dataset
from data_tools.reporting import Report
from dualtrain.recipe.schema import BuildSection
stages = []
class Stages(Report):
    def show(self, progress):
        stages.append(progress.stage)
build = BuildSection(source={str(corpus)!r}, vocab_size=300, val_fraction=0.2)
build_dataset(build, {str(tmp_path / "data")!r}, report=Stages())
print("encoding" in stages)
"""
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = sorted(process.communicate()[0].strip() for process in started)
    assert outputs == ["False", "False", "True"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no content"),
        (["", "  "], "no documents are left: 2 empty"),
        (["alone"], "one document cannot be divided"),
        (["same", "same"], "all documents are the same"),
    ],
)
def test_too_little_text(tmp_path: Path, lines: list[str], message: str) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    with pytest.raises(UserError, match=message):
        build_dataset(section(source), tmp_path / "data")


def test_source_that_changes_meanwhile(tmp_path: Path, corpus: Path) -> None:
    class Grow(Report):
        def show(self, progress: StageProgress) -> None:
            if progress.stage == "training the tokenizer":
                with corpus.open("a") as stream:
                    stream.write('{"text": "late"}\n')

    with pytest.raises(UserError, match="changed while it was read"):
        build_dataset(section(corpus), tmp_path / "data", report=Grow())
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_place_may_be_a_link(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    info = build_dataset(section(corpus), tmp_path / "data")
    assert DatasetInfo.load(tmp_path / "disk") == info == DatasetInfo.load(tmp_path / "data")
    assert build_dataset(section(corpus), tmp_path / "data") == info


def test_place_where_a_volume_is_mounted(corpus: Path) -> None:
    with pytest.raises(UserError, match="a volume is mounted there"):
        build_dataset(section(corpus), "/dev")


def test_mistake_in_the_same_command_keeps_what_is_done(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_dataset(section(corpus), tmp_path / "data", report=StopAt("writing val"))
    corpus.rename(tmp_path / "away")
    with pytest.raises(UserError, match="no such file"):
        build_dataset(section(corpus), tmp_path / "data")
    with pytest.raises(UserError):
        build_dataset(section(corpus, tokenizer="nowhere"), tmp_path / "data")
    (tmp_path / "away").rename(corpus)
    said = Said()
    build_dataset(section(corpus), tmp_path / "data", report=said)
    assert "encoded already" in said.lines[1]


def test_place_that_cannot_be_written(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file — expected a new or empty directory"):
        build_dataset(section(corpus), tmp_path / "file" / "data")


def test_verify_finds_one_flipped_byte(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "data"
    build_dataset(section(corpus), out)
    shard = out / "train" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="does not match its hash") as caught:
        verify_dataset(out)
    assert caught.value.where == str(shard)


def test_commands(tmp_path: Path, corpus: Path) -> None:
    runner, out = CliRunner(), str(tmp_path / "data")
    made = runner.invoke(app, ["convert", str(corpus), "--out", out, "--vocab-size", "300"])
    assert made.exit_code == 0, made.output
    assert "bytes/token" in made.output and "left out: 2 empty" in made.output
    assert DatasetInfo.load(out).arguments["vocab_size"] == 300
    again = runner.invoke(app, ["convert", str(corpus), "--out", out, "--vocab-size", "300"])
    assert "is there already" in again.output and "bytes/token" not in again.output
    assert "as it should be" in runner.invoke(app, ["verify", out]).output
    shown = runner.invoke(app, ["inspect", out, "--documents", "1"])
    assert "quick brown fox" in shown.output
    refused = runner.invoke(app, ["convert", str(corpus), "--out", out, "--val-fraction", "3"])
    assert isinstance(refused.exception, UserError)
    assert "--val-fraction: 3.0 is not allowed" in str(refused.exception)


def test_only_part_of_a_large_corpus_trains_the_tokenizer(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[str] = []
    train = Tokenizer.train.__func__

    def spy(cls: type[Tokenizer], texts: object, vocab_size: int) -> Tokenizer:
        trained_on.extend(texts)  # type: ignore[arg-type]
        return train(cls, trained_on, vocab_size)

    monkeypatch.setattr(Tokenizer, "train", classmethod(spy))
    monkeypatch.setattr(train_tokenizer, "TRAINING_BYTES", sum(map(len, TEXTS)) // 4)
    build_dataset(section(corpus), tmp_path / "data")
    assert 0 < len(trained_on) < 30
