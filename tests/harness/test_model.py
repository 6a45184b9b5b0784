"""Tests of: dualtrain.harness.model: agreement with our scorer, windows, texts, mistakes."""

import importlib.util
import json
import multiprocessing
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import lm_eval
import pytest
import yaml
from helpers.models import add_noise, save_model
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import dualtrain.harness.model
from dualtrain.checkpoint.trained import open_trained
from dualtrain.common.errors import UserError
from dualtrain.data.dataset import DatasetInfo
from dualtrain.evaluate.scoring import Request, Scorer, encode_pair
from dualtrain.evaluate.tasks import load_tasks, score_task
from dualtrain.generate.settings import Settings
from dualtrain.generate.texts import generate_texts, prepare
from dualtrain.harness.model import DualtrainLM
from dualtrain.launch.world import free_port
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM

CONTEXT = 48
STORY = "The function takes a list of names and returns what is in it. It may raise an error. "
PAIRS = [
    {"sentence_good": "This function returns a list.", "sentence_bad": "This function return a."},
    {"sentence_good": "Names are strings.", "sentence_bad": "Names is strings."},
    {"sentence_good": "Who has called it?", "sentence_bad": "Who have called it?"},
    {"sentence_good": "The same text.", "sentence_bad": "The same text."},
]
QUESTIONS = [
    {"query": "Question: What holds values?", "choices": ["a list", "no", "seven"], "gold": 0},
    {"query": "Question: What is an error?", "choices": ["ça, 日本", "an exception"], "gold": 1},
    {"query": "Question: Two equal ones?", "choices": ["bad", "good", "good"], "gold": 2},
]
ENDINGS = [
    {"query": STORY * n, "choices": ["then it ends", "and so on and so forth"], "gold": n % 2}
    for n in range(1, 6)
]
TASKS = {
    "pairs": (PAIRS, "", "[sentence_good, sentence_bad]", "0", ""),
    "questions": (QUESTIONS, "{{ query }}\nAnswer:", "choices", "gold", " "),
    "endings": (ENDINGS, "{{ query | trim }}", "choices", "gold", " "),
}
"""Lines of data, prompt, answers, number of the right one, what stands in front of an answer."""


def export_noisy_model(dataset: Path, directory: Path) -> Path:
    """A tiny model whose every weight is noise, so that each token looks at what it sees."""
    info = DatasetInfo.load(dataset)
    config = DualConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        head="linear",
        max_position_embeddings=CONTEXT,
        bos_token_id=info.bos_id,
        eos_token_id=info.eos_id,
        mask_token_id=info.mask_id,
    )
    save_model(add_noise(DualLM(config, seed=0), 0.3), directory)
    shutil.copy(dataset / "tokenizer.json", directory)
    return directory


def harness(tasks_dir: Path, tasks: list[str], model: Path, **options: object) -> dict | None:
    """Results of lm-evaluation-harness on its own task files, one model."""
    return lm_eval.simple_evaluate(
        model="dualtrain",
        model_args={"path": str(model), "device": "cpu", **options},
        tasks=tasks,
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )


def on_forks(
    function: Callable[..., object], *arguments: object, ranks: int, tmp_path: Path
) -> list[object]:
    """Call a function in forks of this process that share a process group's address.

    New processes would spend seconds on importing the harness.

    Returns:
        What it returned, by rank.
    """
    port = free_port()

    def call(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        result = function(*arguments)
        (tmp_path / f"result-{rank}.pickle").write_bytes(pickle.dumps(result))

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=call, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks
    return [
        pickle.loads((tmp_path / f"result-{rank}.pickle").read_bytes()) for rank in range(ranks)
    ]


@pytest.fixture(scope="module")
def model(tiny_dataset, tmp_path_factory):
    return export_noisy_model(tiny_dataset, tmp_path_factory.mktemp("lm_eval") / "model")


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    """The same three tasks in our files and, below ``harness``, in the harness's."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "harness").mkdir()
    for name, (lines, prompt, choices, gold, space) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        ours = {
            "name": name,
            "description": "A test",
            "data": data.name,
            "prompt": prompt,
            "choices": choices,
            "choice": space + "{{ choice }}",
            "gold": gold,
            "metric": "accuracy",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(ours))
        theirs = task_file(name, data, "multiple_choice", ["acc", "acc_norm"]) | {
            "doc_to_text": prompt,
            "doc_to_choice": "{{" + choices + "}}",
            "doc_to_target": "{{" + gold + "}}",
            "target_delimiter": space,
        }
        (folder / "harness" / f"{name}.yaml").write_text(yaml.safe_dump(theirs))
    return folder


def task_file(name, data, output_type, metrics):
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(data.parent)},
        "test_split": "test",
        "output_type": output_type,
        "metric_list": [{"metric": metric} for metric in metrics],
    }


@pytest.fixture
def lm(model):
    return lambda **options: DualtrainLM(str(model), device="cpu", **options)


def ask(*arguments):
    return [
        Instance("loglikelihood", {}, values, 0, ("task", number, 1))
        for number, values in enumerate(arguments)
    ]


def write(model, *arguments):
    return model.generate_until([Instance("generate_until", {}, values, 0) for values in arguments])


@pytest.mark.parametrize("mode", ["ar", "prefix", "pll", "chain", "elbo"])
def test_every_answer_gets_what_our_own_scorer_gives_it(mode, model, tasks_dir):
    results = harness(tasks_dir / "harness", list(TASKS), model, mode=mode, elbo_samples=3)
    trained = open_trained(model, device="cpu")
    scorer = Scorer(trained, elbo_samples=3)

    def encode(prompt, choice):
        return encode_pair(trained.tokenizer, prompt, choice, bos_id=trained.vocabulary.bos_id)

    cut = 0
    for task in load_tasks(list(TASKS), tasks_dir):
        ours = score_task(task, task.items(), scorer, encode, mode)
        theirs = results["samples"][task.name]
        assert len(theirs) == len(ours.items) == len(TASKS[task.name][0])
        for item, sample in zip(ours.items, theirs, strict=True):
            values = [answer[0] for answer in sample["filtered_resps"]]
            assert values == pytest.approx(item.log_likelihoods, rel=1e-6)
            for metric, credit in (("acc", "accuracy"), ("acc_norm", "accuracy_norm")):
                # Where the right answer shares the best place, the harness takes the first one.
                expected = item.credit(credit)
                assert sample[metric] == (expected if expected in (0, 1) else item.item.gold == 0)
        cut += ours.cut
    assert cut > 0  # a prompt longer than the context is among them
    assert results["config"]["dualtrain_mode"] == mode


def test_spaces_behind_a_context_are_scored_with_the_answer(lm):
    plain, spaced, empty = lm().loglikelihood(
        ask(("A list", " of names"), ("A list ", "of names"), ("", "A list")), disable_tqdm=True
    )
    assert plain == spaced
    trained = lm().trained
    whole = Request((trained.vocabulary.bos_id,), tuple(trained.encode("A list")))
    assert empty[0] == pytest.approx(lm().scorer.score([whole], "ar")[0].log_likelihood, rel=1e-6)
    with pytest.raises(UserError, match="continuation: '' has no tokens"):
        lm().loglikelihood(ask(("A list", "")), disable_tqdm=True)


@pytest.mark.parametrize("mode", ["ar", "prefix", "chain"])
def test_a_text_longer_than_the_context_is_scored_in_windows(lm, mode):
    model = lm(mode=mode)
    trained = model.trained
    ids = trained.encode(STORY * 6)
    assert len(ids) > 2 * CONTEXT
    rolled, short = model.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (STORY * 6, "A list")]
    )
    width = CONTEXT - (mode == "chain")  # there the last token is an input, too
    expected, done = 0.0, 0
    while done < len(ids):
        end = min(done + width, len(ids))
        before = [trained.vocabulary.bos_id, *ids][max(0, end - width) : done + 1]
        request = Request(tuple(before), tuple(ids[done:end]))
        expected += model.scorer.score([request], mode)[0].log_likelihood
        done = end
    assert rolled == pytest.approx(expected, rel=1e-6)
    if mode != "prefix":
        assert short == pytest.approx(model.loglikelihood(ask(("", "A list")))[0][0], rel=1e-6)


def test_what_a_mode_cannot_do(lm, caplog):
    text = [Instance("loglikelihood_rolling", {}, ("A list",), 0)]
    with pytest.raises(UserError, match="mode: 'pll' gives no likelihood of a text — expected ar"):
        lm(mode="pll").loglikelihood_rolling(text)
    asked = [Instance("generate_until", {}, ("A list", {"until": ["."]}), 0)]
    with pytest.raises(UserError, match="'elbo' writes no texts"):
        lm(mode="elbo").generate_until(asked)
    answer = lm(mode="pll").loglikelihood(ask(("A", " list")), disable_tqdm=True)[0]
    assert answer[1] is False and "acc of task would be 0" in caplog.text


@pytest.mark.parametrize("mode", ["ar", "prefix"])
def test_texts_are_those_of_the_samplers_up_to_where_they_end(lm, mode):
    model = lm(mode=mode)
    settings = Settings(mode=mode, tokens=12, temperature=0)
    prompts = prepare(["A list", "It may raise"], settings, model.trained)
    expected = [
        model.trained.decode(text.new_ids)
        for text in generate_texts(prompts, settings, model.trained)
    ]
    until = expected[0][3:5]  # in the middle of the text, and perhaps of a token
    greedy = {"until": [until], "max_gen_toks": 12, "do_sample": False}
    asked = ("A list", greedy), ("It may raise", greedy), ("A list", {"max_gen_toks": 12})
    written = write(model, *asked)
    assert written == [expected[0][:3], expected[1].split(until)[0], expected[0]]


def test_diffusion_fills_what_follows_as_the_sampler_does(lm):
    model = lm(mode="diffusion", steps=5, block=4)
    settings = Settings(mode="diffusion", tokens=12, temperature=0, steps=5, block=4)
    prompts = prepare(["A list", "It may raise"], settings, model.trained)
    expected = [
        model.trained.decode(text.new_ids)
        for text in generate_texts(prompts, settings, model.trained)
    ]
    until = expected[0][3:5]
    greedy = {"until": [until], "max_gen_toks": 12, "do_sample": False}
    asked = ("A list", greedy), ("It may raise", greedy), ("A list", {"max_gen_toks": 12})
    written = write(model, *asked)
    assert written == [expected[0][:3], expected[1].split(until)[0], expected[0]]
    assert expected[0] != write(lm(), asked[2])[0]
    drawn = ("A list", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})
    texts = write(model, drawn, drawn)
    assert texts == write(model, drawn, drawn) and texts[0] != texts[1]


def test_what_diffusion_cannot_do(lm):
    model = lm(mode="diffusion", steps=2, block=4)
    with pytest.raises(UserError, match="mode: 'diffusion' writes, and scores nothing"):
        model.loglikelihood(ask(("A", " list")), disable_tqdm=True)
    with pytest.raises(UserError, match="mode: 'diffusion' writes, and scores nothing"):
        model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("A list",), 0)])
    with pytest.raises(UserError, match="steps: 2 for 12 tokens in blocks of 4 — expected 3 or"):
        write(model, ("A", {"max_gen_toks": 12}))
    with pytest.raises(UserError, match="generation_kwargs.repetition_penalty: 1.5 is not avail"):
        write(model, ("A", {"repetition_penalty": 1.5}))


def test_drawn_texts_repeat_and_differ(lm):
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 50, "max_gen_toks": 8}
    texts = write(lm(), ("A list", drawn), ("A list", drawn), ("It", drawn))
    assert texts == write(lm(), ("A list", drawn), ("A list", drawn), ("It", drawn))
    assert texts[:1] == write(lm(), ("A list", drawn))
    assert texts[0] != texts[1]
    assert texts[:1] != write(lm(seed=1), ("A list", drawn))


def test_texts_that_do_not_fit_and_settings_that_do_not_exist(lm, caplog):
    assert len(write(lm(), (STORY * 6, {"max_gen_toks": 1000}))) == 1
    assert "1 of 1 texts end after 24 tokens, half of the context" in caplog.text
    assert "1 of 1 prompts lost their beginning" in caplog.text
    write(lm(), ("A", {"num_beams": 1, "max_gen_toks": 1}))
    with pytest.raises(UserError, match="generation_kwargs.num_beams: 4 is not available"):
        write(lm(), ("A", {"num_beams": 4}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "prefx"}, "mode: 'prefx' — expected one of ar, .* .did you mean prefix"),
        ({"tokens_per_bach": 5}, "tokens_per_bach: no such option .* .did you mean tokens_per_b"),
        ({"elbo_samples": 0}, "elbo_samples: 0 — expected a whole number, at least 1"),
        ({"elbo_samples": 10**12}, "elbo_samples: 1000000000000 — expected at most 10000"),
        ({"seed": "one"}, "seed: 'one' — expected a whole number, at least 0"),
        ({"step": 1.5}, "step: 1.5 — expected a whole number, at least 0"),
        ({"steps": 4}, "steps: has no say in mode ar — expected mode=diffusion"),
        ({"mode": "diffusion", "block": 0}, "block: 0 — expected a whole number, at least 1"),
        ({"precision": "fp16"}, "precision: 'fp16' — expected one of fp32, bf16"),
        ({"path": None}, "path: not given"),
        ({"path": "nowhere"}, "nowhere: does not exist"),
    ],
)
def test_options_that_are_wrong(model, options, message):
    with pytest.raises(UserError, match=message):
        DualtrainLM(**{"path": str(model), "device": "cpu", **options})


def test_ranks_divide_the_items(model, tasks_dir, tmp_path):
    folder = tasks_dir / "harness"
    alone = harness(folder, ["endings"], model)
    results = on_forks(harness, folder, ["endings"], model, ranks=2, tmp_path=tmp_path)
    assert results[1] is None
    assert results[0]["results"] == alone["results"]
    scored = {s["doc_id"]: s["filtered_resps"] for s in results[0]["samples"]["endings"]}
    assert sorted(scored) == list(range(len(ENDINGS)))
    for sample in alone["samples"]["endings"]:
        together = [answer[0] for answer in scored[sample["doc_id"]]]
        assert together == pytest.approx([a[0] for a in sample["filtered_resps"]], rel=1e-6)


def test_the_command_knows_the_model(model, tasks_dir, monkeypatch, capsys):
    # Its own twelve thousand task files take seconds to list.
    without = partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", without)

    def command(mode):
        options = [
            *("--model", "dualtrain", "--model_args", f"path={model},mode={mode}"),
            *("--tasks", "questions"),
            *("--include_path", str(tasks_dir / "harness")),
        ]
        monkeypatch.setattr(sys, "argv", ["lm-eval", "run", *options])
        return dualtrain.harness.model.main(), capsys.readouterr()

    code, output = command("ar")
    assert code == 0 and "|questions|" in output.out and "acc_norm" in output.out
    code, output = command("arr")
    assert code == 2
    assert "error: --model_args mode: 'arr' — expected one of ar, prefix" in output.err


def test_the_harness_is_not_installed(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    spec = importlib.util.spec_from_file_location("copy", dualtrain.harness.model.__file__)
    with pytest.raises(UserError, match=r"not installed \(pip install 'dualtrain\[eval\]'\)"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
