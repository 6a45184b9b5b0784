"""Tasks: the shipped files, a user's own, their data on disk and on the hub, and every mistake."""

import bz2
import gzip
import hashlib
import json
import lzma
import sys

import pytest
import yaml
import zstandard
from task_support import SPEC, load_one, question, write_lines, write_task

from dualtrain.errors import UserError
from dualtrain.evaluate.task_data import read_hub
from dualtrain.evaluate.tasks import load_tasks

SHIPPED = {
    "arc_challenge": {"query": "Question: Q?", "choices": ["a", "b"], "gold": 1},
    "arc_easy": {"query": "Question: Q?", "choices": ["a", "b"], "gold": 1},
    "blimp": {"sentence_good": "A b.", "sentence_bad": "A c.", "UID": "island"},
    "commonsense_qa": {
        "question": "Q?",
        "choices": {"label": ["A", "B"], "text": ["a", "b"]},
        "answerKey": "B",
    },
    "hellaswag": {"query": "Q", "choices": [" a", "b"], "gold": 1},
    "mmlu": {"question": " Q? ", "choices": ["a", "b "], "answer": 1, "subject": "law"},
    "openbookqa": {"query": "Q", "choices": ["a", "b"], "gold": 1},
    "piqa": {"goal": "Q?", "sol1": "a", "sol2": " b", "label": 1},
    "social_iqa": {
        "context": "C.",
        "question": "Q?",
        "answerA": "a",
        "answerB": "b",
        "answerC": "c",
        "label": "2",
    },
}
PROMPTS = {
    "blimp": "",
    "hellaswag": "Q",
    "openbookqa": "Q",
    "social_iqa": "Q: C. Q?\nA:",
}
HUB = {
    "arc_easy": {
        "question": "Q?",
        "choices": {"label": ["A", "B"], "text": ["a", "b"]},
        "answerKey": "B",
    },
    "hellaswag": {
        "activity_label": "Canoeing",
        "ctx_a": "Two [step] men  row.",
        "ctx_b": "they",
        "endings": ["stop [title] Then go.", " sink"],
        "label": "1",
    },
    "openbookqa": {
        "question_stem": "Q",
        "choices": {"label": ["A", "B"], "text": ["a", "b"]},
        "answerKey": "B ",
    },
}


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_task_asks_what_its_file_says(name, tmp_path):
    write_lines(tmp_path / f"{name}.jsonl", [SHIPPED[name]])
    (item,) = load_one(tmp_path, name).items()
    assert item.prompt == PROMPTS.get(name, "Question: Q?\nAnswer:")
    answers = {"blimp": ("A b.", "A c."), "social_iqa": (" a", " b", " c")}
    assert item.choices == answers.get(name, (" a", " b"))
    assert item.gold == (0 if name == "blimp" else 1)
    assert item.characters == tuple(len(answer.strip()) for answer in item.choices)
    assert item.group == {"blimp": "island", "mmlu": "law"}.get(name)


def test_all_nine_are_shipped_and_say_where_they_come_from():
    tasks = load_tasks()
    assert [task.name for task in tasks] == sorted(SHIPPED)
    for task in tasks:
        assert task.spec.description and task.spec.source and task.spec.licence and task.spec.hub
        assert task.data_file() is None
    plain = [task.name for task in tasks if task.spec.metric == "accuracy"]
    assert plain == ["blimp", "commonsense_qa"]


@pytest.fixture
def datasets_cache(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra [eval] brings it")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_the_hub_stands_in_for_a_missing_file(datasets_cache, tmp_path):
    """`datasets` reads local directories as it reads the hub's, several configurations too."""
    (tmp_path / "hub").mkdir()
    for topic in ("one", "two"):
        lines = [{"stem": f"{topic}?", "options": ["x", "y"], "key": "1"}] * 2
        write_lines(tmp_path / "hub" / f"{topic}.jsonl", lines)
    configs = [
        {"config_name": topic, "data_files": [{"split": "test", "path": f"{topic}.jsonl"}]}
        for topic in ("one", "two")
    ]
    card = yaml.safe_dump({"configs": configs})
    (tmp_path / "hub" / "README.md").write_text(f"---\n{card}---\n")
    hub = {
        "path": str(tmp_path / "hub"),
        "names": ["one", "two"],
        "split": "test",
        "fields": {"question": "stem", "choices": "options", "gold": "key | int"},
    }
    task = load_one(write_task(tmp_path / "own", hub=hub, group=None))
    found = task.read()
    assert [item.prompt for item in found.items] == ["one?", "one?", "two?", "two?"]
    assert found.items[0].choices == (" x", " y") and found.items[0].gold == 1
    assert (found.total, found.origin) == (4, str(tmp_path / "hub"))
    missing = {**hub, "split": "train"}
    task = load_one(write_task(tmp_path / "own", hub=missing))
    with pytest.raises(
        UserError, match=r"quiz.jsonl is not there, and .*cannot be fetched: .*train"
    ):
        task.read()


@pytest.mark.parametrize("name", HUB)
def test_fields_of_the_hub_become_those_of_the_file(name, tmp_path):
    task = load_one(tmp_path, name)
    assert task.file.hub_fields is not None
    record = task.file.hub_fields.record(HUB[name], where="hub:1")
    item = task.file.templates.item(record, where="hub:1", line=1)
    if name == "hellaswag":
        assert item.prompt == "Canoeing: Two men row. They"
        assert item.choices == (" stop. Then go.", " sink")
    else:
        assert item.choices == (" a", " b")
    assert item.gold == 1


def test_without_the_library_of_the_hub_both_ways_out_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError) as caught:
        load_one(tmp_path, "mmlu").read()
    assert "mmlu.jsonl is not there" in str(caught.value)
    assert "pip install datasets" in str(caught.value) and "--tasks-dir" in str(caught.value)


def test_an_unreachable_hub_is_no_traceback(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra [eval] brings it")

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    task = load_one(tmp_path, "blimp")
    assert task.spec.hub is not None
    with pytest.raises(
        UserError, match="adjunct_island, cannot be fetched: Couldn't reach the hub"
    ):
        read_hub(task.spec.hub, None, data="blimp.jsonl", where="blimp.yaml")


COMPRESSORS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
}


def test_data_may_be_compressed(tmp_path):
    lines = [question(3, number % 3, text=f"Q{number}?") for number in range(50)]
    write_task(tmp_path, lines)
    content = (tmp_path / "quiz.jsonl").read_bytes()
    (tmp_path / "quiz.jsonl").unlink()
    for suffix, compress in COMPRESSORS.items():
        path = tmp_path / f"quiz.jsonl{suffix}"
        path.write_bytes(compress(content))
        found = load_one(tmp_path).read()
        assert found.origin == str(path) and found.total == 50
        assert found.sha256 == hashlib.sha256(content).hexdigest()
        assert [item.prompt for item in found.items] == [line["question"] for line in lines]
        path.unlink()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("quiz.jsonl", b"", "quiz.jsonl: is empty"),
        ("quiz.jsonl", b"\n\n", "quiz.jsonl: is empty"),
        ("quiz.jsonl.xz", lzma.compress(b"{}" * 5000)[:-30], "truncated file"),
        ("quiz.jsonl.gz", b"{}", "cannot be decompressed as gzip"),
        ("quiz.jsonl.lz4", b"", "quiz.jsonl.lz4: is compressed in a way that is not known"),
        ("other.jsonl", b"{}", "its data file quiz.jsonl is not there in"),
    ],
)
def test_unreadable_data(name, content, expected, tmp_path):
    write_task(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_one(tmp_path).read()
    assert expected in str(caught.value)


GOOD = {"question": "Why?", "choices": ["a", "b"], "gold": 0, "topic": "x"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"question": ', "is not JSON: Expecting value"),
        ("[1]", "is a JSON list"),
        ({"question": "Why?"}, "choices of {file} fails: 'choices' is undefined"),
        (GOOD | {"choices": ["a"]}, "gives ['a'] — expected a list of two or more texts"),
        (GOOD | {"choices": "ab"}, "gives 'ab' — expected a list"),
        (GOOD | {"choices": ["a", ""]}, "expected texts that are not empty"),
        (GOOD | {"choices": ["a", 1]}, "expected texts that are not empty"),
        (GOOD | {"gold": 2}, "gold of {file} gives 2 — expected a number from 0 to 1 (`- 1`"),
        (GOOD | {"gold": -1}, "gives -1 — expected a number from 0 to 1"),
        (GOOD | {"gold": "1"}, "gives '1' — expected a number from 0 to 1 (`| int`"),
        (GOOD | {"gold": True}, "gives True — expected a number"),
        (GOOD | {"question": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_line_that_does_not_fit_is_named(line, expected, tmp_path):
    write_task(tmp_path)
    text = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / "quiz.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{text}\n")
    with pytest.raises(UserError) as caught:
        load_one(tmp_path).read()
    assert caught.value.where == f"{path}:3"
    assert expected.format(file=tmp_path / "quiz.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metrc": "x"}, "{file}:9: metrc: unknown key"),
        ({"prompt": None}, "{file}:1: prompt: is missing"),
        ({"metric": "acuracy"}, "{file}:8: metric: 'acuracy' is not known — expected accuracy or"),
        ({"gold": 0}, '{file}:6: gold: is 0 — expected text (write "0", in quotes)'),
        ({"name": "a b"}, "{file}:1: name: 'a b' is not allowed"),
        ({"hub": {"path": "x", "split": "y", "name": "z"}}, "{file}:9: hub.name: unknown key"),
        ({"prompt": "{{ question"}, "{file}:4: prompt: '{{ question': unexpected end of template"),
        ({"choices": "a b"}, "{file}:5: choices: 'a b': chunk after expression"),
        (
            {"hub": {"path": "x", "split": "y", "fields": {"q": "|"}}},
            "{file}:9: hub.fields.q: '|': unexpected",
        ),
    ],
)
def test_a_task_file_is_checked_by_line(changes, expected, tmp_path):
    spec = {key: value for key, value in (SPEC | changes).items() if value is not None}
    # One key a line.
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in spec.items())
    (tmp_path / "quiz.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_tasks(["quiz"], tmp_path)
    assert expected.replace("{file}", str(tmp_path / "quiz.yaml")) in str(caught.value)


def test_all_mistakes_of_a_task_file_are_shown_together(tmp_path):
    write_task(tmp_path, metric="x", gold=3, colour="red")
    with pytest.raises(UserError) as caught:
        load_tasks(["quiz"], tmp_path)
    assert len(str(caught.value).splitlines()) == 3
    (tmp_path / "quiz.yaml").write_text("name: [")
    with pytest.raises(UserError, match="quiz.yaml:1: not valid YAML"):
        load_tasks(["quiz"], tmp_path)
    (tmp_path / "quiz.yaml").write_text("")
    with pytest.raises(UserError, match="quiz.yaml:1: is empty"):
        load_tasks(["quiz"], tmp_path)


def test_templates_reach_nothing_but_the_line(tmp_path):
    write_task(tmp_path, [GOOD], prompt="{{ question.__class__.__mro__ }}")
    with pytest.raises(UserError, match=r"prompt of .*unsafe"):
        load_one(tmp_path).read()


def test_a_users_task_adds_to_the_shipped_ones_or_replaces_one(tmp_path):
    write_task(tmp_path, [GOOD])
    write_task(tmp_path, [GOOD], name="piqa", data="piqa.jsonl")
    names = [task.name for task in load_tasks(None, tmp_path)]
    assert sorted(names) == sorted([*SHIPPED, "quiz"])
    assert load_one(tmp_path, "piqa").items()[0].prompt == "Why?"
    (tmp_path / "again.yaml").write_text((tmp_path / "quiz.yaml").read_text())
    with pytest.raises(UserError, match="the name 'quiz' is that of .*again.yaml, too"):
        load_tasks(None, tmp_path)


def test_an_unknown_task_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"'hellswag' is no task .* \(did you mean hellaswag\?\)"):
        load_tasks(["hellswag"])
    with pytest.raises(UserError, match="does not exist"):
        load_tasks(["piqa"], tmp_path / "nowhere")


def test_a_limit_takes_items_evenly_spread(tmp_path):
    lines = [question(2, 0, text=f"Q{number}") for number in range(10)]
    task = load_one(write_task(tmp_path, lines))
    assert [item.line for item in task.items(4)] == [1, 3, 6, 8]
    assert len(task.items(10)) == len(task.items(50)) == len(task.items()) == 10
    assert task.read(4).total == 10
