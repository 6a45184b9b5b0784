"""Tests of: dualtrain.evaluate.tasks, task_data, templates: tasks, their data, every mistake."""

import bz2
import gzip
import hashlib
import json
import lzma
import sys
from dataclasses import replace

import pytest
import yaml
import zstandard
from helpers.tasks import SPEC, load_one, question, write_lines, write_task

from dualtrain.common.errors import UserError
from dualtrain.evaluate.command import EvalOptions
from dualtrain.evaluate.evaluate import choose_tasks
from dualtrain.evaluate.task_data import read_hub
from dualtrain.evaluate.tasks import load_tasks
from dualtrain.evaluate.templates import (
    Templates,
    as_json,
    compile_expression,
    compile_template,
)

SHIPPED = {
    "arc_challenge": {"query": "Question: Q?", "choices": ["a", "b"], "gold": 1},
    "arc_easy": {"query": "Question: Q?", "choices": ["a", "b"], "gold": 1},
    "blimp": {"sentence_good": "A b.", "sentence_bad": "A c.", "UID": "island"},
    "commonsense_qa": {
        "question": "Q?",
        "choices": {"label": ["A", "B"], "text": ["a", "b"]},
        "answerKey": "B",
    },
    "blimp_supplement": {"sentence_good": "A b.", "sentence_bad": "A c."},
    "ewok": {"Context1": "Q", "Target1": "a", "Target2": "b", "Domain": "agents"},
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
    "blimp_supplement": "",
    "ewok": "Q",
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
    answers = dict.fromkeys(("blimp", "blimp_supplement"), ("A b.", "A c."))
    answers["social_iqa"] = (" a", " b", " c")
    assert item.choices == answers.get(name, (" a", " b"))
    assert item.gold == (0 if name in ("blimp", "blimp_supplement", "ewok") else 1)
    assert item.characters == tuple(len(answer.strip()) for answer in item.choices)
    groups = {"blimp": "island", "mmlu": "law", "ewok": "agents", "blimp_supplement": "supplement"}
    assert item.group == groups.get(name)


def test_of_all_tasks_those_are_scored_whose_data_can_be_had(tmp_path):
    write_lines(tmp_path / "ewok.jsonl", [SHIPPED["ewok"]])
    options = EvalOptions(path=tmp_path, tasks="all", tasks_dir=tmp_path)
    found = {task.name for task in choose_tasks(options, [])}
    assert found == SHIPPED.keys() - {"blimp_supplement"}
    named = choose_tasks(replace(options, tasks="blimp_supplement"), [])
    with pytest.raises(UserError, match="blimp_supplement.jsonl is not there in"):
        named[0].read()


def test_all_are_shipped_and_say_where_they_come_from():
    tasks = load_tasks()
    assert [task.name for task in tasks] == sorted(SHIPPED)
    for task in tasks:
        assert task.spec.description and task.spec.source and task.spec.licence
        assert task.spec.hub or task.name in ("blimp_supplement", "ewok")
        assert task.data_file() is None
    plain = [task.name for task in tasks if task.spec.metric == "accuracy"]
    assert plain == ["blimp", "blimp_supplement", "commonsense_qa", "ewok"]


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


def test_a_null_of_the_hub_is_named_where_it_is_used(tmp_path):
    fields = {"question": "stem", "choices": "options", "gold": "key | int"}
    hub = {"path": "somebody/quiz", "split": "test", "fields": fields}
    task = load_one(write_task(tmp_path, hub=hub, group=None))
    row = {"stem": "Why?", "options": ["x", "y"], "key": "1", "unused": None}
    assert task.file.hub_fields is not None
    with pytest.raises(UserError, match="hub:1: question of .* fails: 'stem' is null"):
        task.file.hub_fields.record(row | {"stem": None}, where="hub:1")
    made = task.file.hub_fields.record(row | {"options": ["x", None]}, where="hub:2")
    record = json.loads(as_json(made))
    with pytest.raises(UserError, match=r"hub:2: choices of .* gives \['x', null\]"):
        task.file.templates.item(record, where="hub:2", line=2)


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
        (GOOD | {"gold": True}, "gives true — expected a number"),
        (GOOD | {"question": "\ud800"}, "has the half of a character, \\ud800, at position 1"),
        (GOOD | {"topic": "a\udfff"}, "has the half of a character"),
        (GOOD | {"question": None}, "prompt of {file} fails: 'question' is null"),
        (GOOD | {"question": ["a", "b"]}, "prompt of {file} fails: 'question' is a list and no"),
        (GOOD | {"question": {"text": "a"}}, "fails: 'question' is a section and no text"),
        (GOOD | {"question": True}, "prompt of {file} fails: 'question' is true and no text"),
        (GOOD | {"question": float("nan")}, "'question' is nan"),
        (GOOD | {"choices": None}, "choices of {file} fails: 'choices' is null"),
        (GOOD | {"choices": ["a", None]}, "gives ['a', null] — expected texts"),
        (GOOD | {"choices": [1, 2]}, "(`| map('string') | list` makes text of numbers)"),
        (GOOD | {"gold": None}, "gold of {file} fails: 'gold' is null"),
        (GOOD | {"gold": 1.0}, "gives 1.0 — expected a number from 0 to 1 (`| int`"),
        (GOOD | {"gold": 0.5}, "gives 0.5 — expected a number from 0 to 1"),
        (GOOD | {"gold": "B"}, "gives 'B' — expected a number from 0 to 1 (`['A', 'B'].index("),
        (GOOD | {"topic": None}, "group of {file} fails: 'topic' is null"),
        (GOOD | {"topic": ["a"]}, "group of {file} gives ['a'] — expected text or a number"),
        ('{"gold": 0, "gold": 1}', "is not JSON: the key 'gold' is there twice"),
        ('{"question": ' + "[" * 90_000 + "]" * 90_000 + "}", "is not JSON: it is nested too"),
        ('{"question": ' + "[" * 900 + "]" * 900 + "}", "nested too deeply|'choices' is undefined"),
        ('{"question": "a\0"}', "has a zero byte"),
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
    possible = expected.replace("{file}", str(tmp_path / "quiz.yaml")).split("|")
    possible = possible if "deeply|" in expected else ["|".join(possible)]
    assert any(text in str(caught.value) for text in possible)


FIELDS = {
    "text": "abc",
    "gone": None,
    "empty": "",
    "letter": "B",
    "digits": " 1 ",
    "point": "1.0",
    "half": "0.5",
    "list": ["x", "y"],
    "numbers": [1, 2],
    "holes": ["x", None],
    "year": 1999,
    "yes": True,
    "nan": float("nan"),
    "deep": {"text": "inner", "items": "mine", "gone": None, "list": [{"a": "b"}]},
}


def rendered(text):
    templates = Templates({"prompt": compile_template(text)}, "quiz.yaml")
    return templates.record(FIELDS, where="line")["prompt"]


def evaluated(text):
    templates = Templates({"gold": compile_expression(text)}, "quiz.yaml")
    return templates.record(FIELDS, where="line")["gold"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ gone }}", "'gone' is null"),
        ("{{ gone | trim }}", "'gone' is null"),
        ("{{ gone | string }}", "'gone' is null"),
        ("{{ 'a' ~ gone }}", "'gone' is null"),
        ("{{ gone | replace('a', 'b') }}", "'gone' is null"),
        ("{{ gone | regex_replace('a', 'b') }}", "'gone' is null"),
        ("{{ gone | tojson }}", "'gone' is null"),
        ("{{ gone | length }}", "'gone' is null"),
        ("{{ '%s' | format(gone) }}", "'gone' is null"),
        ("{{ holes | join(' ') }}", "'holes[1]' is null"),
        ("{{ holes[1] }}", "'holes[1]' is null"),
        ("{{ deep.gone }}", "'deep.gone' is null"),
        ("{{ gone.text }}", "'gone' is null"),
        ("{{ deep.txt }}", "'deep' has no 'txt'"),
        ("{{ deep['txt'] }}", "'deep' has no 'txt'"),
        ("{{ list[5] }}", "'list' has no 5"),
        ("{{ nan }}", "'nan' is nan"),
        ("{{ list }}", "'list' is a list and no text"),
        ("{{ list | trim }}", "'list' is a list and no text"),
        ("{{ 'a' ~ deep }}", "'deep' is a section and no text"),
        ("{{ list | map('upper') | list }}", "a list is no text"),
        ("{{ yes }}", "'yes' is true and no text"),
        ("{{ yes | string }}", "'yes' is true and no text"),
        ("{{ yes | lower }}", "'yes' is true and no text"),
        ("{{ yes | replace('a', 'b') }}", "'yes' is true and no text"),
        ("{{ 'a' ~ yes }}", "'yes' is true and no text"),
        ("{{ '%s' | format(yes) }}", "'yes' is true and no text"),
        ("{{ '{}'.format(yes) }}", "'yes' is true and no text"),
        ("{{ [yes, yes] | join }}", "'yes' is true and no text"),
        ("{{ 'a' ~ (year == 1999) }}", "true is no text"),
        ("{{ (year == 1999) | upper }}", "true is no text"),
        ("{{ list | map('upper') | string }}", "is no text"),
        ("{{ deep.get('txt') ~ '' }}", "'deep' has no 'txt'"),
        ("{{ text.title }}", "is no text"),
        ("{{ range }}", "is no text"),
        ("{{ text | regex_replace('(', '') }}", "missing ), unterminated subpattern"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include 'x' %}", "loader"),
        ("{{ text | truncate(1) }}", "expected length >= 3"),
    ],
)
def test_a_template_shows_nothing_but_text_and_numbers(text, expected):
    with pytest.raises(UserError) as caught:
        rendered(text)
    assert expected in str(caught.value) and caught.value.where == "line"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ year }}", "1999"),
        ("{{ list | join(', ') }}", "x, y"),
        ("{{ numbers | join('+') }}", "1+2"),
        ("{{ gone or 'nothing' }}", "nothing"),
        ("{{ gone | default('nothing') }}", "nothing"),
        ("{{ 'nothing' if gone is none else gone }}", "nothing"),
        ("{{ 'yes' if yes else 'no' }}", "yes"),
        ("{{ 'yes' if yes is true and yes == true and yes is boolean else 'no' }}", "yes"),
        ("{{ {true: 'right', false: 'wrong'}[yes] }}", "right"),
        ("{{ yes | tojson }} {{ yes + 1 }}", "true 2"),
        ("{{ 'year ' ~ year }}", "year 1999"),
        ("{{ deep.text }} {{ deep['text'] }} {{ deep.list[0].a }}", "inner inner b"),
        # A field of a section and not the method of Python's.
        ("{{ deep.items }}", "mine"),
        ("{{ list | tojson }}", '["x", "y"]'),
    ],
)
def test_a_template_can_say_what_stands_in(text, expected):
    assert rendered(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("digits | int", 1),
        ("point | int", 1),
        ("yes | int", 1),
        ("'0x1f' | int(base=16)", 31),
        ("letter | int(-1)", -1),
        ("digits | float", 1.0),
        ("letter | float(0)", 0),
        ("empty | int", "'' is not a whole number"),
        ("letter | int", "'B' is not a whole number"),
        ("half | int", "'0.5' is not a whole number|0.5 is not a whole number"),
        ("list | int", "a list is not a whole number"),
        ("gone | int", "'gone' is null"),
        ("nan | int", "'nan' is nan"),
        ("letter | float", "'B' is not a number"),
        ("gone + 1", "'gone' is null"),
        ("list.index(letter)", "'B' is not in list"),
        ("holes.index('y')", "'holes[1]' is null"),
    ],
)
def test_what_is_no_number_is_never_0(text, expected):
    if not isinstance(expected, str):
        assert evaluated(text) == expected
        return
    with pytest.raises(UserError) as caught:
        evaluated(text)
    assert any(part in str(caught.value) for part in expected.split("|"))


def test_labels_may_be_text_or_numbers(tmp_path):
    lines = [GOOD | {"gold": gold} for gold in ("1", 1, " 1", 1.0, True)]
    task = load_one(write_task(tmp_path, lines, gold="gold | int"))
    assert [item.gold for item in task.items()] == [1] * 5
    write_lines(tmp_path / "quiz.jsonl", [GOOD, GOOD | {"gold": ""}])
    with pytest.raises(UserError, match="quiz.jsonl:2: gold of .* fails: '' is not a whole number"):
        task.items()


def test_a_number_is_an_expression(tmp_path):
    write_task(tmp_path, [GOOD], gold=1, group=2020)
    (item,) = load_one(tmp_path).items()
    assert (item.gold, item.group) == (1, "2020")
    write_task(tmp_path, [GOOD], gold=3)
    with pytest.raises(UserError, match="gold of .* gives 3 — expected a number from 0 to 1"):
        load_one(tmp_path).items()


def test_data_may_be_an_array(tmp_path):
    lines = [question(2, number % 2, text=f"Q{number}?") for number in range(5)]
    write_task(tmp_path, data="quiz.json")
    path = tmp_path / "quiz.json"
    for indent in (None, 2):
        path.write_text("\ufeff" + json.dumps(lines, indent=indent), encoding="utf-8")
        items = load_one(tmp_path).items()
        assert [item.prompt for item in items] == [line["question"] for line in lines]
    assert [item.line for item in items][:2] == [2, 11]
    path.write_text(json.dumps([*lines, lines[0] | {"gold": 7}], indent=0))
    with pytest.raises(UserError, match=r"quiz.json:\d+: gold of .* gives 7"):
        load_one(tmp_path).items()
    path.write_text("[\n{},\n{]")
    with pytest.raises(UserError, match="quiz.json:3: is not JSON"):
        load_one(tmp_path).items()
    path.write_text("[]")
    with pytest.raises(UserError, match="quiz.json: is empty"):
        load_one(tmp_path).items()


def test_lines_may_end_as_on_windows_and_must_be_utf_8(tmp_path):
    write_task(tmp_path)
    path, line = tmp_path / "quiz.jsonl", json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n")
    assert [item.line for item in load_one(tmp_path).items()] == [1, 3]
    path.write_bytes(line + b"\n" + line.replace(b"Why", b"caf\xe9"))
    with pytest.raises(UserError, match="quiz.jsonl:2: byte 0xe9 is not UTF-8"):
        load_one(tmp_path).items()
    path.write_bytes(line.decode().encode("utf-16-le"))
    with pytest.raises(UserError, match="quiz.jsonl:1: has a zero byte"):
        load_one(tmp_path).items()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metrc": "x"}, "{file}:9: metrc: unknown key"),
        ({"prompt": None}, "{file}:1: prompt: is missing"),
        ({"metric": "acuracy"}, "{file}:8: metric: 'acuracy' is not known — expected accuracy or"),
        ({"name": 0}, '{file}:1: name: is 0 — expected text (write "0", in quotes)'),
        ({"gold": True}, "{file}:6: gold: is true — expected text"),
        ({"choices": ["a", "b"]}, "{file}:5: choices: is a list — expected text (an expression st"),
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
    write_task(tmp_path, metric="x", gold=True, colour="red")
    with pytest.raises(UserError) as caught:
        load_tasks(["quiz"], tmp_path)
    assert len(str(caught.value).splitlines()) == 3
    (tmp_path / "quiz.yaml").write_text("name: [")
    with pytest.raises(UserError, match="quiz.yaml:1: not valid YAML"):
        load_tasks(["quiz"], tmp_path)
    (tmp_path / "quiz.yaml").write_text("")
    with pytest.raises(UserError, match="quiz.yaml:1: is empty"):
        load_tasks(["quiz"], tmp_path)


HARNESS = """
task: blimp_local
dataset_path: json
output_type: multiple_choice
doc_to_text: ""
process_docs: !function utils.process
"""


def test_a_file_of_another_tool_is_passed_over_and_named(tmp_path):
    write_task(tmp_path, [GOOD])
    (tmp_path / "blimp.yaml").write_text(HARNESS)
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "folder.yaml").mkdir()
    notes = []
    tasks = load_tasks(["quiz", "blimp"], tmp_path, on_note=notes.append)
    assert [task.file.path.parent.name for task in tasks] == [tmp_path.name, "tasks"]
    assert not notes
    assert len(load_tasks(None, tmp_path, on_note=notes.append)) == len(SHIPPED) + 1
    assert len(notes) == 2
    assert "blimp.yaml:2: is no task file: it has the keys task, dataset_path" in notes[0]
    assert "list.yaml:1: holds a list" in notes[1]
    with pytest.raises(UserError, match="(?s)'blimp_local' is no task.*blimp.yaml:2: is no task"):
        load_tasks(["blimp_local"], tmp_path)


def test_a_broken_task_stops_only_what_asks_for_it(tmp_path):
    write_task(tmp_path, [GOOD])
    write_task(tmp_path, name="other", metric="x")
    (tmp_path / "other.yaml").rename(tmp_path / "mine.yml")
    (tmp_path / "piqa.yaml").write_text("name: [")
    assert [task.name for task in load_tasks(["quiz", "blimp"], tmp_path)] == ["quiz", "blimp"]
    with pytest.raises(UserError, match="mine.yml:8: metric: 'x' is not known"):
        load_tasks(["other"], tmp_path)
    # The shipped task must not take the place of the one that is meant.
    with pytest.raises(UserError, match="piqa.yaml:1: not valid YAML"):
        load_tasks(["piqa"], tmp_path)
    with pytest.raises(UserError, match="(?s)mine.yml:8: metric.*piqa.yaml:1: not valid YAML"):
        load_tasks(None, tmp_path)


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
