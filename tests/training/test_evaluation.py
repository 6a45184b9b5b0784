"""Tests of: dualtrain.training.evaluation.

Tasks during a run: the same on any ranks, leaving training alone, refused before it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from helpers.runs import records, results, rewind, tiny_loader, train_on

from dualtrain.common.errors import UserError
from dualtrain.common.file_kinds import parse_tokenizer
from dualtrain.data.dataset import DatasetInfo
from dualtrain.evaluate.request import MODES
from dualtrain.evaluate.scoring import Scorer
from dualtrain.model.handle import ModelHandle
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM
from dualtrain.recipe.load import LoadedRecipe
from dualtrain.recipe.schema import EvalSection
from dualtrain.training.evaluation import TaskScoring, read_tasks
from dualtrain.training.start import start

PAIRS = """
name: pairs
description: Which of two sentences is grammatical
data: pairs.jsonl
prompt: ""
choices: "[good, bad]"
choice: "{{ choice }}"
gold: "0"
metric: accuracy
"""
CHOICES = """
name: choices
description: How a sentence goes on
data: choices.jsonl
prompt: "{{ question }}"
choices: choices
gold: gold
metric: accuracy_norm
"""
WORDS = ["list", "dict", "class", "value", "string", "number", "module", "object", "file", "error"]
OFTEN = (
    "eval={sequences: 10, tasks: [pairs, choices], tasks_dir: TASKS, modes: [ar, prefix, pll], "
    "limit: 9, task_interval_steps: 2}"
)

SAMPLES = "sample.at_evaluations=true"


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory) -> Path:
    """Two tasks that a model of 512 tokens can be asked, and one that no context has room for."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "pairs.yaml").write_text(PAIRS)
    (folder / "choices.yaml").write_text(CHOICES)
    pairs = [{"good": f"The {word} is here.", "bad": f"The {word} are here."} for word in WORDS]
    choices = [
        {"question": f"A {word} is a", "choices": [other, WORDS[n - 3], "thing"], "gold": n % 3}
        for n, (word, other) in enumerate(zip(WORDS, reversed(WORDS), strict=True))
    ]
    choices[4]["question"] = "What is longer than the context? " * 9 + "It is a"
    huge = [{"good": "word " * 50, "bad": "words " * 50}]
    (folder / "huge.yaml").write_text(PAIRS.replace("pairs", "huge"))
    (folder / "gone.yaml").write_text(PAIRS.replace("pairs", "gone"))
    for name, lines in (("pairs", pairs), ("choices", choices), ("huge", huge)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def pair(tiny_dataset, tasks_dir, tmp_path_factory) -> dict[str, LoadedRecipe]:
    """Runs on 2 ranks."""
    folder = tmp_path_factory.mktemp("pair")
    load = tiny_loader(tiny_dataset, folder)
    often = OFTEN.replace("TASKS", str(tasks_dir))
    keeper = "algorithms=[{use: helpers.algorithms:Keeper}]"
    stop = "algorithms=[{use: helpers.algorithms:Signal, args: {step: 1}}]"
    changes = {
        "without": ["eval={sequences: 10, interval_steps: 2}"],
        "with": [often, keeper, SAMPLES],
        "zero3": [often, "engine.deepspeed=zero3", SAMPLES],
        "stopped": [often, stop],
    }
    runs = {name: load("steps=4", *change, name=name) for name, change in changes.items()}
    assert train_on(2, folder, *runs.values()) == [0, 0, 0, 75]
    return runs


@dataclass
class Alone:
    """A run on one rank, what it had before it went on from a checkpoint, and what bad ones say."""

    recipe: LoadedRecipe
    before: list[list]
    messages: list


@pytest.fixture(scope="module")
def alone(tiny_dataset, tasks_dir, tmp_path_factory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    load = tiny_loader(tiny_dataset, folder)
    often = OFTEN.replace("TASKS", str(tasks_dir))
    recipe = load("steps=4", often, SAMPLES, "checkpoint.interval_steps=2", name="alone")
    assert train_on(1, folder, recipe) == [0]
    before = [scores(recipe), results(recipe)]
    rewind(recipe, 2)
    bad = [load(often, change, name=f"bad-{n}") for n, change in enumerate(REFUSED.values())]
    outcome, *messages = train_on(1, folder, recipe, *bad)
    assert outcome == 0
    return Alone(recipe, before, messages)


REFUSED = {
    "eval.tasks: 'pears' is no task — expected one of .*pairs.* \\(did you mean pairs\\?\\)": (
        "eval.tasks=[pears]"
    ),
    "gone.yaml: its data file gone.jsonl is not there in ": "eval.tasks=[pairs, gone]",
    "/nowhere: does not exist": "eval.tasks_dir=/nowhere",
    "huge: every item of 1 has an answer longer": "eval.tasks=[huge]",
}


def scores(recipe: LoadedRecipe) -> list[dict]:
    """The records of tasks without their clock."""
    return [{k: v for k, v in r.items() if k != "elapsed_s"} for r in records(recipe, "tasks")]


def test_every_mode_is_recorded_when_due(pair):
    found = scores(pair["with"])
    expected = [(step, mode) for step in (2, 4) for mode in ("ar", "prefix", "pll")]
    assert [(record["step"], record["mode"]) for record in found] == expected
    assert [record["step"] for record in records(pair["with"], "eval")] == [2, 4]
    for record in found:
        tasks = record["tasks"]
        assert {name: task["items"] for name, task in tasks.items()} == {"pairs": 9, "choices": 9}
        assert tasks["pairs"]["score"] == pytest.approx(200 * (tasks["pairs"]["accuracy"] - 0.5))
        norm = tasks["choices"]["accuracy_norm"]
        assert tasks["choices"]["score"] == pytest.approx(150 * (norm - 1 / 3))
        mean = (tasks["pairs"]["score"] + tasks["choices"]["score"]) / 2
        assert record["average"] == pytest.approx(mean)
        assert record["average_low"] < record["average"] < record["average_high"]
    assert len({json.dumps(record["tasks"]) for record in found}) > 1


def test_training_is_the_same_to_the_bit_with_and_without(pair):
    assert results(pair["with"]) == results(pair["without"])
    assert records(pair["without"], "tasks") == []


def test_any_number_of_ranks_and_any_stage_score_the_same(pair, alone):
    assert alone.before[0] == scores(pair["with"]) == scores(pair["zero3"])


def test_a_resumed_run_scores_again_what_is_to_come_and_nothing_twice(alone):
    assert [scores(alone.recipe), results(alone.recipe)] == alone.before


def test_samples_are_records_of_every_evaluation_where_asked_for(pair, alone):
    found = records(pair["with"], "sample")
    expected = [(step, title) for step in (2, 4) for title in ("AR sample", "infilled")]
    assert [(record["step"], record["title"]) for record in found] == expected
    assert all(record["text"].count("[") == 1 for record in found[1::2])
    assert found == records(pair["zero3"], "sample") == records(alone.recipe, "sample")
    assert records(pair["without"], "sample") == []


def test_algorithms_see_the_scores(pair):
    file = pair["with"].recipe.directory / "found.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in found] == [2, 4]
    for line in found:
        kept = {r["mode"]: r for r in scores(pair["with"]) if r["step"] == line["step"]}
        for mode, record in kept.items():
            assert line[f"{mode}/average"] == record["average"]
            assert line[f"{mode}/choices"] == record["tasks"]["choices"]["score"]
        losses = next(r for r in records(pair["with"], "eval") if r["step"] == line["step"])
        assert line["prefix_nll"] == losses["prefix_nll"]


def test_after_a_stop_signal_tasks_are_left_out_and_losses_are_not(pair):
    recipe = pair["stopped"]
    assert scores(recipe) == []
    assert [record["step"] for record in records(recipe, "eval")] == [2]
    events = [(r["event"], r["step"]) for r in records(recipe, "event")]
    assert ("tasks_left_out", 2) in events and events[-1] == ("checkpoint", 3)


def test_a_signal_ends_a_task_between_two_batches(tiny_dataset, tasks_dir):
    """And leaves the model as it was."""
    config = DualConfig(
        512, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = DualLM(config).train()
    model.initialize(0)
    vocabulary = DatasetInfo.load(tiny_dataset).vocabulary
    handle = ModelHandle(model=model, vocabulary=vocabulary, context=32)
    scorer = Scorer(handle, tokens_per_batch=64)
    tasks = read_tasks(EvalSection(tasks=["pairs", "choices"], tasks_dir=str(tasks_dir)))
    tokenizer = parse_tokenizer(tiny_dataset / "tokenizer.json")
    scoring = TaskScoring(tasks, ["pll"], scorer=scorer, tokenizer=tokenizer)
    assert scoring.warnings == [
        "choices: of 10 items 1 whose prompt is longer than the context, and loses its beginning"
    ]
    shown: list[str] = []
    found = scoring.score("pll", on_status=shown.append, is_stopping=lambda: len(shown) == 4)
    assert found is None
    assert len(shown) == 4 and shown[0] == "scoring pairs, pll: 0/10"
    assert all(re.fullmatch(r"scoring pairs, pll: \d+/20", line) for line in shown[1:])
    assert model.training and torch.is_grad_enabled()
    found = scoring.score("pll", on_status=shown.append, is_stopping=lambda: False)
    assert found is not None and [result.task for result in found] == ["pairs", "choices"]


def test_what_cannot_be_scored_is_refused_before_the_first_step(alone):
    for expected, message in zip(REFUSED, alone.messages, strict=True):
        assert isinstance(message, str)
        assert re.search(expected, message), message


def test_a_mistake_in_tasks_does_not_wait_for_the_dataset(tiny_dataset, tmp_path):
    load = tiny_loader(tiny_dataset, tmp_path)
    data = f"data={{path: {tmp_path / 'new'}, build: {{source: 'builtin:python-docs'}}}}"
    with pytest.raises(UserError, match=r"eval\.tasks: 'blimpp' is no task .*did you mean blimp"):
        start(load(data, "eval.tasks=[blimpp]"), ranks=1, hostfile=None, plain=True)
    assert not (tmp_path / "new").exists()


def test_the_recipe_knows_the_modes():
    modes = EvalSection.model_fields["modes"].annotation
    assert get_args(get_args(modes)[0]) == MODES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("eval.task_interval_steps=5", "5 has no effect without tasks"),
        ("eval.tasks=[a, b, a]", "a is listed twice"),
        ("eval.modes=[ar, ar]", "ar is listed twice"),
        ("eval.modes=[prefixes]", "did you mean prefix?"),
        ("eval.limit=0", "eval.limit"),
        ("eval.modes=[]", "eval.modes"),
    ],
)
def test_mistakes_in_the_recipe(tiny, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        tiny(change)
