"""Tests of: all commands and readers, given anything: code 0 or 2, one message, nothing half-made.

In the suite these are some hundreds of examples, always the same. ``DUALTRAIN_FUZZ=100 pytest
tests/test_fuzz.py`` tries a hundred times as many, others each time, for about an hour.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers.fuzz import (
    NUMBERS,
    SCALARS,
    TEXTS,
    VALUES,
    WORDS,
    call,
    changed,
    damaged,
    examples,
    refuses_or_returns,
)
from helpers.models import save_model
from helpers.runs import TINY
from helpers.tasks import SPEC, question, write_task
from helpers.texts import random_model
from hypothesis import given
from hypothesis import strategies as st

from data_tools.sources import BadInput, Document, open_sources
from data_tools.tokenizers.tokenizer import Tokenizer
from dualtrain.common.file_kinds import parse_tokenizer
from dualtrain.evaluate.tasks import load_tasks
from dualtrain.generate.files import read_prompts
from dualtrain.generate.prompts import encode_prompt, has_gap, parse_gaps
from dualtrain.launch.hostfile import read_hostfile
from dualtrain.launch.world import (
    current_world,
    launched_ranks,
)
from dualtrain.recipe.describe import fields
from dualtrain.recipe.yaml_source import dump, is_unicode, parse

TEXT = "The cat sat on the mat. " * 3


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The current directory of all of these: what is written somewhere is written here."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def recipe(folder, tiny_dataset) -> dict:
    """A recipe whose dry run is in order, as plain data."""
    tree, _ = parse(TINY.format(data=tiny_dataset), "tiny")
    Path("recipe.yaml").write_text(dump(tree.plain()))
    assert call("run", "recipe.yaml", "--dry-run").code == 0
    return tree.plain()


KEYS = [field.path.replace("[]", ".0") for field in fields() if not field.path.endswith("remote")]


@st.composite
def overrides(draw) -> list[str]:
    """Changes to a recipe, most of them to keys that it has."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(KEYS) | TEXTS)
        value = draw(SCALARS | VALUES)
        text = value if isinstance(value, str) else json.dumps(value)
        found.append(f"{key}={text}")
    return found


@examples(150)
@given(changes=overrides())
def test_overrides(recipe, changes):
    call("run", "recipe.yaml", "--dry-run", "--", *changes)


@examples(60)
@given(data=st.data())
def test_recipe_values(recipe, data):
    values = data.draw(changed(recipe | {"name": "run"}))
    Path("changed.yaml").write_bytes(json.dumps(values).encode("utf-8", "surrogatepass"))
    call("run", "changed.yaml", "--dry-run")


@examples(60)
@given(data=st.data())
def test_recipe_files(recipe, data):
    content = data.draw(damaged(Path("recipe.yaml").read_bytes()))
    Path("damaged.yaml").write_bytes(content)
    call("run", "damaged.yaml", "--dry-run")


@st.composite
def json_lines(draw, record: dict) -> bytes:
    """Lines of which most are like a record, in one of the encodings that exist."""
    line = changed(record) | st.just(record) | VALUES
    lines = draw(st.lists(line.map(json.dumps) | TEXTS, max_size=5))
    text = draw(st.sampled_from(["\n", "\r\n"])).join([*lines, draw(st.sampled_from(["", " "]))])
    if draw(st.booleans()):
        text = json.dumps(record) + "\n" + text
    encoding = draw(st.sampled_from(["utf-8"] * 4 + ["utf-8-sig", "utf-16", "utf-16-le"]))
    return text.encode(encoding, "surrogatepass")


NAMES = st.sampled_from(["a.txt", "a.jsonl", "a.JSONL", "a.json", "a.ndjson", "a.gz", "a.jsonl.gz"])


@examples(120)
@given(
    name=NAMES | st.sampled_from(["a.parquet", "a.arrow", "a.jsonl.zst", "a.txt.xz", "a.data"]),
    content=json_lines({"text": TEXT, "meta": {"id": 1}}) | st.binary(max_size=200),
    field=st.sampled_from(["text", "text", "meta", "meta.id", ""]) | WORDS,
    format=st.none() | st.sampled_from(["txt", "jsonl", "json", "parquet", "arrow", "csv"]),
    separator=st.none() | st.sampled_from(["blank-line", "\n", "\\n", "x"]) | WORDS,
)
def test_corpora(folder, name, content, field, format, separator):
    Path(name).write_bytes(content)

    def read() -> list[Document | BadInput]:
        source = open_sources(name, text_field=field, format=format, separator=separator)
        return [document for block in source.blocks() for document in block.documents()]

    for found in refuses_or_returns(read) or []:
        if isinstance(found, Document):
            assert found.text.encode() or found.text == ""
        else:
            assert found.kind and str(found.error)


@pytest.fixture(scope="module")
def tokenizer(folder):
    Tokenizer.train([TEXT, "One more text, and another one."], 300).save("tokenizer.json")
    return parse_tokenizer(Path("tokenizer.json"))


@examples(15)
@given(
    content=json_lines({"text": TEXT}),
    options=st.fixed_dictionaries(
        {},
        optional={
            "--min-characters": NUMBERS,
            "--max-characters": NUMBERS,
            "--val-fraction": NUMBERS,
            "--val-tokens": NUMBERS,
            "--max-tokens": NUMBERS,
            "--shuffle-seed": NUMBERS,
            "--on-error": st.sampled_from(["skip", "stop", "ignore"]),
            "--text-field": WORDS,
            "--separator": WORDS,
        },
    ),
)
def test_conversions(tokenizer, folder, content, options):
    lines = "".join(json.dumps({"text": f"{TEXT} {number}"}) + "\n" for number in range(4))
    Path("corpus.jsonl").write_bytes(lines.encode() + content)
    out = folder / f"data-{abs(hash((content, str(options))))}"
    given = [f"{option}={value}" for option, value in options.items()]
    ended = call(
        *("data", "convert", "corpus.jsonl", "--out", str(out), "--workers", "1"),
        *("--tokenizer", "tokenizer.json", *given),
    )
    assert out.exists() == (ended.code == 0)
    if ended.code == 0:
        assert call("data", "verify", str(out)).code == 0


@pytest.fixture(scope="module")
def dataset(tokenizer, folder) -> dict:
    lines = "".join(json.dumps({"text": f"{TEXT} {number}"}) + "\n" for number in range(30))
    Path("whole.jsonl").write_text(lines)
    made = ("data", "convert", "whole.jsonl", "--out", "whole", "--tokenizer", "tokenizer.json")
    assert call(*made, "--workers", "1", "--val-fraction", "0.3").code == 0
    return json.loads(Path("whole/dataset.json").read_text())


@examples(60)
@given(data=st.data())
def test_facts_of_a_dataset(dataset, recipe, data):
    file = Path("whole/dataset.json")
    before = file.read_bytes()
    values = data.draw(changed(dataset))
    try:
        file.write_bytes(json.dumps(values).encode("utf-8", "surrogatepass"))
        for command in ("verify", "inspect"):
            call("data", command, "whole")
        call("run", "recipe.yaml", "--dry-run", "data.path=whole", "unique_tokens=50")
    finally:
        file.write_bytes(before)


@examples(40)
@given(data=st.data())
def test_files_of_a_dataset(dataset, data):
    names = sorted(str(path) for path in Path("whole").rglob("*") if path.is_file())
    file = Path(data.draw(st.sampled_from(names)))
    before = file.read_bytes()
    try:
        file.write_bytes(data.draw(damaged(before)))
        for command in ("verify", "inspect"):
            call("data", command, "whole")
    finally:
        file.write_bytes(before)


EXPRESSIONS = st.sampled_from(
    ["gold", "choices", "gold | int", "label | string", "[a, b]", "['a', 'b']", "3", "choices[9]"]
    + ["question.x", "1 / 0", "nothing", "gold + 1", "choices | length", "{{ gold }}", "'a' * 3"]
    + ["question | regex_replace('(', '')", "dict(a=1)", "true", "none", "choices | join", "(", ""]
    + ["''.__class__", "question | upper", "loop", "self", "range(3) | list", "{% for x in y %}"]
)


@examples(120)
@given(data=st.data())
def test_tasks(folder, data):
    spec = data.draw(
        st.just(SPEC)
        | changed(SPEC)
        | st.fixed_dictionaries({}, optional={key: EXPRESSIONS for key in SPEC}).map(SPEC.__or__)
    )
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    text = json.dumps(spec).encode("utf-8", "surrogatepass")
    (tasks / "quiz.yaml").write_bytes(data.draw(st.just(text) | damaged(text)))
    record = question(2, 1) | {"label": "1", "a": None, "b": 2.5}
    (tasks / "quiz.jsonl").write_bytes(data.draw(json_lines(record)))
    for task in refuses_or_returns(lambda: load_tasks(None, tasks)) or []:
        if task.data_file() is not None:
            refuses_or_returns(task.read)


@examples(100)
@given(
    name=st.sampled_from(["p.txt", "p.jsonl", "p.ndjson", "p.JSONL", "p.json", "p"]),
    content=json_lines({"prompt": "The <mask:3> sat"}) | st.binary(max_size=80),
)
def test_prompt_files(folder, tokenizer, name, content):
    Path(name).write_bytes(content)
    prompts, places = refuses_or_returns(lambda: read_prompts(Path(name))) or ([], [])
    for prompt, place in zip(prompts, places, strict=True):
        check_prompt(tokenizer, prompt, place)


PROMPTS = st.lists(TEXTS | st.sampled_from(["<mask>", " <mask:2>", "<mask:", ":9>", "<"]))


@examples(100)
@given(parts=PROMPTS)
def test_prompts(tokenizer, parts):
    check_prompt(tokenizer, "".join(parts), "prompt")


def check_prompt(tokenizer, prompt: str, place: str) -> None:
    """A prompt becomes ids, or is refused with its place."""
    if not is_unicode(prompt):
        return  # refused before a model is loaded
    if has_gap(prompt):
        refuses_or_returns(lambda: parse_gaps(prompt, tokenizer, bos_id=1, mask_id=4, where=place))
    else:
        refuses_or_returns(lambda: encode_prompt(prompt, tokenizer, bos_id=1))


@pytest.fixture(scope="module")
def model(tokenizer) -> Path:
    """A tiny model that generates and answers at once."""
    save_model(random_model(tokenizer.get_vocab_size()), Path("model"))
    shutil.copy("tokenizer.json", "model")
    return Path("model")


SMALL = st.sampled_from([0, 1, 2, 3, -1, 0.5, float("nan")])


@examples(30)
@given(
    name=st.sampled_from(["", "", "p.txt", "p.jsonl"]),
    content=json_lines({"prompt": "The <mask:3> sat"}),
    parts=PROMPTS,
    options=st.fixed_dictionaries(
        {"--tokens": SMALL},
        optional={
            "--mode": st.sampled_from(["ar", "prefix", "diffusion", "all"]),
            "--temperature": NUMBERS,
            "--top-k": NUMBERS,
            "--top-p": NUMBERS,
            "--repetition-penalty": NUMBERS,
            "--seed": NUMBERS,
            "--samples": SMALL,
            "--steps": SMALL,
            "--block": SMALL,
            "--batch": NUMBERS,
            "--order": WORDS,
        },
    ),
)
def test_texts_of_a_model(model, name, content, parts, options):
    given = [f"{option}={value}" for option, value in options.items()]
    if name:
        Path(name).write_bytes(content)
        given += ["--file", name]
    else:
        given += ["--", "".join(parts)]
    out = Path("texts.jsonl")
    out.unlink(missing_ok=True)
    ended = call("generate", str(model), "--out", str(out), *given)
    assert out.exists() == (ended.code == 0)
    if ended.code == 0:
        # Not splitlines, which divides at U+2028 within a string as well.
        assert all(json.loads(line) for line in out.read_text().removesuffix("\n").split("\n"))


@examples(20)
@given(data=st.data())
def test_tasks_of_a_model(model, data):
    record = question(2, 1) | {"label": "1", "a": None, "b": 2.5}
    spec = st.just(SPEC) | st.fixed_dictionaries(
        {}, optional={key: EXPRESSIONS for key in ("prompt", "choices", "gold", "group", "metric")}
    ).map(SPEC.__or__)
    write_task(Path("asked"), **data.draw(spec))
    Path("asked/quiz.jsonl").write_bytes(data.draw(json_lines(record)))
    shutil.rmtree("answers", ignore_errors=True)
    ended = call(
        *("eval", str(model), "--tasks-dir", "asked", "--tasks", "quiz", "--out", "answers")
    )
    assert Path("answers").exists() == (ended.code == 0)
    if ended.code == 0:
        assert "quiz" in json.dumps(json.loads(Path("answers/results.json").read_text()))


VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
SLURM = (
    *("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    *("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_JOB_ID"),
    *("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
)
SETTINGS = st.sampled_from(["0", "1", "2", "-1", "8", "2(x2),1", "a[01-02]", "[", "", "1.5", "x"])


@examples(200)
@given(
    environment=st.dictionaries(st.sampled_from(VARIABLES + SLURM), SETTINGS | WORDS, min_size=4),
    complete=st.booleans(),
    srun=st.booleans(),
)
def test_environments(environment, complete, srun):
    whole = dict.fromkeys(VARIABLES, "1") | {"RANK": "0", "LOCAL_RANK": "0"} if complete else {}
    step = dict.fromkeys(SLURM[:9], "1") | {"SLURM_PROCID": "0"} if srun else {}
    world = refuses_or_returns(lambda: current_world({**whole, **step, **environment}))
    if world is not None:
        assert 0 <= world.rank < world.world_size
        assert 0 <= world.local_rank < world.local_world_size <= world.world_size
    refuses_or_returns(lambda: launched_ranks({**whole, **step, **environment}))


SURROUNDINGS = (
    *("COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "HOME", "XDG_CACHE_HOME", "TMPDIR"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONIOENCODING", "PATH"),
)
WHAT_CAN_BE_SET = (SETTINGS | WORDS).filter(lambda value: "\0" not in value and is_unicode(value))


@examples(60)
@given(
    environment=st.dictionaries(
        st.sampled_from(VARIABLES + SLURM + SURROUNDINGS), WHAT_CAN_BE_SET, min_size=2
    ),
    command=st.sampled_from(
        ["run recipe.yaml --dry-run", "sweep recipe.yaml --dry-run", "recipes", "fit junk"]
        + ["data verify whole", "data inspect whole", "generate junk", "eval junk", "export junk"]
    ),
)
def test_commands_in_any_environment(places, environment, command):
    with patch.dict(os.environ, environment):
        call(*command.split())


@examples(60)
@given(data=st.data())
def test_hostfiles(folder, data):
    content = data.draw(damaged(b"gpu01 slots=8\nme@10.0.0.2  slots=4  # the old one\n"))
    Path("hosts").write_bytes(content)
    refuses_or_returns(
        lambda: read_hostfile(Path("hosts"), ranks=data.draw(st.none() | st.just(2)))
    )


COMMANDS: dict[str, dict[str, st.SearchStrategy | None]] = {
    "fit": {"--metric": WORDS, "--where": WORDS, "--out": WORDS, "--seed": NUMBERS},
    "alpha": {"--repetitions": NUMBERS, "--slots": NUMBERS, "--fit": WORDS},
    "compare": {"--metric": WORDS, "--where": WORDS, "--to": WORDS, "--sequences": NUMBERS},
    "export --to exported": {"--step": NUMBERS, "--dtype": WORDS, "--max-shard-size": WORDS},
    "generate": {
        "--mode": st.sampled_from(["ar", "prefix", "diffusion", "all"]),
        "--tokens": NUMBERS,
        "--temperature": NUMBERS,
        "--top-k": NUMBERS,
        "--top-p": NUMBERS,
        "--repetition-penalty": NUMBERS,
        "--seed": NUMBERS,
        "--samples": NUMBERS,
        "--steps": NUMBERS,
        "--order": WORDS,
        "--block": NUMBERS,
        "--batch": NUMBERS,
        "--file": WORDS,
        "--step": NUMBERS,
        "--device": WORDS,
        "--precision": WORDS,
        "--trace": None,
    },
    "eval": {
        "--tasks": WORDS,
        "--mode": WORDS,
        "--tasks-dir": WORDS,
        "--limit": NUMBERS,
        "--data": WORDS,
        "--sequences": NUMBERS,
        "--step": NUMBERS,
        "--precision": WORDS,
        "--elbo-samples": NUMBERS,
    },
    "sweep --dry-run": {
        "--dir": WORDS,
        "--parallel": NUMBERS,
        "--index": NUMBERS,
        "--shard": WORDS,
    },
    "run --dry-run": {"--ranks": NUMBERS, "--from": WORDS, "--hostfile": WORDS},
    "data verify": {},
    "data inspect": {"--documents": NUMBERS, "--characters": NUMBERS},
    "data merge --out merged": {"--shuffle-seed": NUMBERS},
    "data tokenizer train --vocab-size 300 --out t.json": {
        "--format": WORDS,
        "--text-field": WORDS,
    },
}


@st.composite
def commands(draw) -> list[str]:
    name = draw(st.sampled_from(list(COMMANDS)))
    options = draw(st.lists(st.sampled_from(list(COMMANDS[name]) or ["--help"]), max_size=3))
    line = name.split()
    for option in options:
        strategy = COMMANDS[name].get(option)
        line.append(option if strategy is None else f"{option}={draw(strategy)}")
    places = st.sampled_from(
        [".", "empty", "junk", "recipe.yaml", "whole", "whole.jsonl", "nowhere"]
    )
    return [*line, "--", *draw(st.lists(places | WORDS, min_size=1, max_size=2))]


@pytest.fixture(scope="module")
def places(recipe, dataset):
    """Directories that are nothing: an empty one, and one with the names of what others hold."""
    Path("empty").mkdir()
    names = ("state.json", "complete.json", "config.json", "sweep.json", "fit.json", "recipe.yaml")
    for name in (*names, "metrics.jsonl", "dataset.json", "tokenizer.json", "step-00000002/x"):
        file = Path("junk", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"a": 1}')


MADE = {"export": "exported", "merge": "merged", "tokenizer": "t.json"}


@examples(200)
@given(line=commands())
def test_command_lines(places, line):
    made = [Path(path) for word, path in MADE.items() if word in line[:2]]
    for path in made:
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    ended = call(*line)
    assert all(path.exists() == (ended.code == 0 and "--help" not in line) for path in made)
