"""Tests of: dualtrain.evaluate.command, result_files: what is shown, written and refused."""

import gzip
import hashlib
import json
import os
import resource
import shutil
import sys
from dataclasses import asdict, replace
from fractions import Fraction

import pytest
import torch
from helpers.runs import records, tiny_loader, train_on
from helpers.tasks import question, write_lines, write_task
from typer.testing import CliRunner

import dualtrain.evaluate.evaluate as evaluation
from dualtrain.checkpoint.trained import ModelSource, find_source
from dualtrain.cli import app
from dualtrain.common.errors import UserError
from dualtrain.data.dataset import DatasetInfo
from dualtrain.evaluate import result_files
from dualtrain.evaluate.command import EvalOptions
from dualtrain.evaluate.evaluate import choose_modes, evaluate_model
from dualtrain.export.command import ExportOptions
from dualtrain.export.export import export_checkpoint


@pytest.fixture(scope="module")
def recipe(tiny_dataset, tmp_path_factory):
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("eval")
    recipe = tiny_loader(tiny_dataset, folder)("checkpoint.interval_steps=4", "sample.tokens=0")
    assert train_on(1, folder, recipe) == [0]
    return recipe


@pytest.fixture(scope="module")
def run_dir(recipe):
    return recipe.recipe.directory


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    """A task of our own with prompts longer than the context of 32, and a shipped one."""
    folder = tmp_path_factory.mktemp("tasks")
    long = "Which of the functions of the module returns a list of names? " * 3
    lines = [
        question(3, n % 3, topic=f"topic {n % 2}", text=long[60 * (n % 2) :]) for n in range(6)
    ]
    write_task(folder, lines, metric="accuracy_norm")
    pairs = [
        {"sentence_good": f"It is {n}.", "sentence_bad": f"It are {n}.", "UID": "x"}
        for n in range(9)
    ]
    write_lines(folder / "blimp.jsonl", pairs)
    return folder


def results(directory):
    return json.loads((directory / "results.json").read_text())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_by_default_all_that_is_there_is_evaluated(run_dir, recipe, tasks_dir, capsys):
    arguments = ["eval", str(run_dir), "--tasks-dir", str(tasks_dir)]
    outcome = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0
    found = results(run_dir / "eval" / "step-00000008")
    assert found["settings"]["modes"] == ["ar", "prefix", "pll"]
    assert list(found["tasks"]) == ["blimp", "quiz"]
    assert found["model"]["step"] == 8 and found["model"]["name"] == "tiny at step 8"
    fingerprint = DatasetInfo.load(recipe.recipe.data.path).fingerprint
    assert found["held_out"]["dataset"] == found["model"]["trained_on"] == fingerprint
    assert found["versions"]["torch"]
    last = records(recipe, "eval")[-1]
    for name in ("ar_nll", "diffusion_nll", "prefix_nll", "ar_error"):
        assert found["held_out"][name] == pytest.approx(last[name], rel=1e-5)
    quiz = found["tasks"]["quiz"]
    assert quiz["data"]["items"] == quiz["items"] == 6
    data, file = tasks_dir / "quiz.jsonl", tasks_dir / "quiz.yaml"
    assert quiz["data"]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert quiz["task_file"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    for mode in ("ar", "prefix", "pll"):
        scored = quiz["modes"][mode]
        assert scored["chance"] == pytest.approx(1 / 3)
        score = 100 * (scored["accuracy_norm"]["value"] - 1 / 3) / (2 / 3)
        assert scored["score"]["value"] == pytest.approx(score)
        assert scored["score"]["low"] <= score <= scored["score"]["high"]
        assert scored["prompts_cut"] == 6 and scored["dropped_tokens"] > 0
        assert list(scored["groups"]) == ["topic 0", "topic 1"]
        both = [found["tasks"][name]["modes"][mode]["score"]["value"] for name in found["tasks"]]
        assert found["average"][mode]["value"] == pytest.approx(sum(both) / 2)
        assert found["average"][mode]["tasks"] == 2
    shown = outcome.stdout
    assert "held-out loss" in shown and f"{last['ar_nll']:.4f} ±" in shown
    assert "cut: items whose prompt lost its beginning" in shown and "average of 2" in shown
    assert f"written: {run_dir}/eval/step-00000008" in shown


def test_items_are_written_and_add_up(run_dir, tasks_dir, out):
    options = EvalOptions(
        path=run_dir, tasks_dir=tasks_dir, modes="elbo,ar", out=out, elbo_samples=2
    )
    evaluation = evaluate_model(options)
    found = results(out)
    assert sorted(os.listdir(out)) == sorted(
        [
            "results.json",
            *(f"{task}.{mode}.jsonl" for task in ("blimp", "quiz") for mode in ("ar", "elbo")),
        ]
    )
    for task in ("blimp", "quiz"):
        for mode in ("ar", "elbo"):
            scored = found["tasks"][task]["modes"][mode]
            lines = (out / scored["items_file"]).read_text().splitlines()
            items = [json.loads(line) for line in lines]
            assert sum(item["credit"] for item in items) / len(items) == pytest.approx(
                scored["accuracy"]["value"]
            )
            assert all(len(item["log_likelihoods"]) == len(item["choices"]) for item in items)
            assert (items[0]["greedy"] is None) == (mode == "elbo")
    assert [result.mode for result in evaluation.results] == ["elbo", "ar"] * 2
    assert not list(out.parent.glob("*.partial"))


def test_results_are_the_same_again_and_never_written_over(run_dir, tasks_dir, capsys):
    options = EvalOptions(path=run_dir, step=4, tasks="quiz", tasks_dir=tasks_dir, sequences=0)
    evaluate_model(options)
    assert "average" not in capsys.readouterr().out  # of a single task
    evaluate_model(options)
    first, second = (run_dir / "eval" / name for name in ("step-00000004", "step-00000004-2"))
    one, other = results(first), results(second)
    for found in (one, other):
        for scored in found["tasks"]["quiz"]["modes"].values():
            scored.pop("seconds")
    assert one == other
    assert (first / "quiz.pll.jsonl").read_bytes() == (second / "quiz.pll.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"--out: .*step-00000004 is there already"):
        evaluate_model(replace(options, out=first))


def test_a_limit_is_told(run_dir, tasks_dir, out, capsys):
    evaluate_model(
        EvalOptions(path=run_dir, tasks_dir=tasks_dir, modes="ar", limit=4, sequences=0, out=out)
    )
    shown = capsys.readouterr().out
    assert "4/6" in shown and "4/9" in shown and "--limit 4: at most 4 items" in shown
    assert results(out)["settings"]["limit"] == 4
    assert results(out)["held_out"] is None and "held-out" not in shown


def test_without_tasks_held_out_losses_are_all(run_dir, out, capsys):
    evaluate_model(EvalOptions(path=run_dir, sequences=4, out=out))
    shown = capsys.readouterr().out
    held_out = results(out)["held_out"]
    # 4 sequences of 32 targets, each of them scored.
    assert held_out["tokens"] == 128 and 1 <= held_out["documents"] <= held_out["tokens"]
    counted = f"held-out loss, 128 tokens of {held_out['documents']} documents"
    assert counted in shown and "zero-shot" not in shown
    assert "note: no tasks: put their data, such as arc_challenge.jsonl" in shown
    assert results(out)["tasks"] == {} and results(out)["average"] == {}
    with pytest.raises(UserError, match="there is nothing to do: neither"):
        evaluate_model(EvalOptions(path=run_dir, tasks="none", sequences=0))


def test_held_out_text_that_is_gone_is_noted_and_asked_for_refused(
    run_dir, tiny_dataset, tasks_dir, out, tmp_path, capsys
):
    checkpoint = shutil.copytree(run_dir / "step-00000008", tmp_path / "step-00000008")
    moved = tiny_dataset.rename(tiny_dataset.with_name("moved"))
    try:
        options = EvalOptions(path=checkpoint, tasks_dir=tasks_dir, modes="ar", out=out)
        evaluate_model(options)
        assert "note: no held-out losses: " in capsys.readouterr().out
        evaluate_model(
            replace(options, data=moved, out=tmp_path / "again", tasks="none", sequences=4)
        )
        assert results(tmp_path / "again")["held_out"]["data"] == str(moved)
        with pytest.raises(UserError, match="there is nothing to do: no held-out losses"):
            evaluate_model(replace(options, tasks="none"))
        with pytest.raises(UserError, match="there is no dataset"):
            evaluate_model(replace(options, data=tiny_dataset))
    finally:
        moved.rename(tiny_dataset)


def test_an_export_has_the_losses_of_its_checkpoint(run_dir, tiny_dataset, out, tmp_path, capsys):
    """Its tokenizer.json is another file, but encodes the same; documents end as in training."""
    export_checkpoint(ExportOptions(path=run_dir, to=tmp_path / "export"))
    own = tmp_path / "export" / "tokenizer.json"
    assert own.read_bytes() != (tiny_dataset / "tokenizer.json").read_bytes()
    options = EvalOptions(path=run_dir, tasks="none", sequences=10, out=out)
    expected = evaluate_model(options).held_out
    exported = replace(options, path=str(tmp_path / "export"), out=out.with_name("exported"))
    found = evaluate_model(replace(exported, data=tiny_dataset)).held_out
    assert found is not None and expected is not None
    for name, value in asdict(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5), name


def test_another_tokenizers_dataset_is_refused(run_dir, tiny_dataset, tmp_path):
    other = shutil.copytree(tiny_dataset, tmp_path / "other")
    file = other / "tokenizer.json"
    facts = json.loads((other / "dataset.json").read_text())

    def refused(**changes):
        content = json.loads((tiny_dataset / "tokenizer.json").read_text()) | changes
        file.write_text(json.dumps(content))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (other / "dataset.json").write_text(json.dumps(facts | {"tokenizer_sha256": digest}))
        options = EvalOptions(path=run_dir, data=other, tasks="none", sequences=2)
        try:
            evaluate_model(replace(options, out=tmp_path / f"out-{digest[:8]}"))
        except UserError as error:
            return str(error)
        return None

    model = json.loads(file.read_text())["model"]
    first, second, *_ = sorted(model["vocab"], key=model["vocab"].get)[-2:]
    swapped = model["vocab"] | {
        first: model["vocab"][second],
        second: model["vocab"][first],
    }
    assert refused(post_processor=None, truncation=None) is None
    assert "it differs in 2 of 512 tokens" in str(refused(model=model | {"vocab": swapped}))
    assert "it differs in the model" in str(
        refused(model=model | {"merges": model["merges"][::-1]})
    )
    assert "it differs in the normalizer" in str(refused(normalizer={"type": "NFC"}))
    message = str(refused(pre_tokenizer={"type": "Whitespace"}))
    assert f"{other}: has another tokenizer than {run_dir}" in message
    assert "tokenizer.json: it differs in the pre-tokenizer" in message


def test_names_that_are_not_utf_8(run_dir, tasks_dir, tmp_path, capsys):
    folder = shutil.copytree(tasks_dir, tmp_path / os.fsdecode(b"d\xf4nn\xe9es"))
    out = tmp_path / os.fsdecode(b"r\xe9sultats")
    sys.stdout.reconfigure(errors="backslashreplace")  # as the command line does
    options = EvalOptions(path=run_dir, tasks="quiz", tasks_dir=folder, modes="ar", out=out)
    evaluate_model(replace(options, sequences=0))
    assert results(out)["tasks"]["quiz"]["data"]["origin"] == str(folder / "quiz.jsonl")
    (folder / "quiz.jsonl").write_text("{")
    with pytest.raises(UserError, match="quiz.jsonl:1: is not JSON"):
        evaluate_model(replace(options, out=tmp_path / "again"))


def test_a_full_disk_leaves_nothing_that_looks_whole(run_dir, tasks_dir, out, capsys):
    """A limit of the size of files stands for it: what is written then fails half-way."""
    options = EvalOptions(path=run_dir, tasks_dir=tasks_dir, modes="ar", sequences=0, out=out)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        message = r"blimp.ar.jsonl: cannot be written: File too large \(make room; .*--out\)"
        with pytest.raises(UserError, match=message):
            evaluate_model(options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(out.parent) == []


def test_a_task_file_of_the_harness_beside_the_data(run_dir, tasks_dir, out, tmp_path, capsys):
    folder = shutil.copytree(tasks_dir, tmp_path / "tasks")
    (folder / "blimp_local.yaml").write_text("task: blimp_local\ndataset_path: json\n")
    options = EvalOptions(path=run_dir, tasks_dir=folder, modes="ar", sequences=0, out=out)
    evaluate_model(options)
    assert list(results(out)["tasks"]) == ["blimp", "quiz"]
    assert "note: passed over: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"modes": "ar,plll"}, r"--mode: 'plll' is not known .* \(did you mean pll\?\)"),
        ({"modes": "ar,,pll"}, "has an empty name"),
        ({"tasks": "blmp"}, r"'blmp' is no task .* \(did you mean blimp\?\)"),
        ({"precision": "fp16"}, "--precision: 'fp16' is not known — expected fp32 or bf16"),
        ({"device": "cuda:99"}, "--device: 'cuda:99' cannot be used"),
        ({"step": 5}, "has no checkpoint of step 5"),
        ({"path": "nowhere"}, "nowhere: does not exist"),
        ({"tasks": "quiz"}, "quiz.jsonl:2: is not JSON"),
    ],
)
def test_mistakes_leave_nothing_behind(changes, expected, run_dir, out, tmp_path):
    broken = write_task(tmp_path / "tasks")
    (broken / "quiz.jsonl").write_text(json.dumps(question(2, 0)) + "\n{\n")
    options = EvalOptions(path=run_dir, tasks="none", tasks_dir=broken, sequences=4, out=out)
    with pytest.raises(UserError, match=expected):
        evaluate_model(replace(options, **changes))
    assert os.listdir(tmp_path) == ["tasks"]


def test_an_interrupted_evaluation_is_never_taken_for_whole(
    run_dir, tasks_dir, out, monkeypatch, capsys
):
    score = evaluation.Scorer.score

    def interrupted(self, requests, mode, **options):
        if mode == "prefix":
            raise KeyboardInterrupt
        return score(self, requests, mode, **options)

    monkeypatch.setattr(evaluation.Scorer, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(EvalOptions(path=run_dir, tasks_dir=tasks_dir, sequences=0, out=out))
    assert not out.exists()
    partial = out.with_name("out.partial")
    assert os.listdir(partial) == ["blimp.ar.jsonl"]
    assert f"items scored so far: {partial}" in capsys.readouterr().err
    with pytest.raises(UserError, match="another evaluation is writing to .* or was killed"):
        evaluate_model(EvalOptions(path=run_dir, tasks="none", sequences=4, out=out))


def test_a_place_that_cannot_be_written_is_a_mistake(run_dir, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="out"):
        evaluate_model(EvalOptions(path=run_dir, tasks="none", out=tmp_path / "file" / "out"))


def test_large_files_of_items_are_compressed(run_dir, tasks_dir, out, monkeypatch):
    monkeypatch.setattr(result_files, "_LARGE_BYTES", 100)
    evaluate_model(
        EvalOptions(path=run_dir, tasks="quiz", tasks_dir=tasks_dir, modes="ar", out=out)
    )
    name = results(out)["tasks"]["quiz"]["modes"]["ar"]["items_file"]
    assert name == "quiz.ar.jsonl.gz"
    assert len(gzip.decompress((out / name).read_bytes()).splitlines()) == 6


def test_the_modes_are_those_of_the_training(run_dir, monkeypatch):
    source = find_source(run_dir)
    assert source.recipe is not None

    def at(alpha, asked=None):
        changed = source.recipe.model_copy(update={"alpha": Fraction(alpha)})
        notes = []
        return choose_modes(asked, replace(source, recipe=changed), notes), notes

    assert at("1/8") == (["ar", "prefix", "pll"], [])
    assert at(1) == (["ar", "prefix"], [])
    assert at(1, "pll, ar, pll") == (
        ["pll", "ar"],
        ["trained with alpha 1, never on masked text: pll says little"],
    )
    assert at(0)[1] == ["trained with alpha 0, never autoregressively: ar, prefix says little"]
    vocabulary = replace(source.vocabulary, mask=None)
    monkeypatch.setattr(ModelSource, "vocabulary", vocabulary)
    assert at("1/8")[0] == ["ar", "prefix"]
    with pytest.raises(UserError, match="has no mask token, without which there is no pll"):
        at("1/8", "ar,pll")


def test_an_exported_model_is_evaluated_with_a_dataset_of_its_tokenizer(
    run_dir, tiny_dataset, tasks_dir, tmp_path, capsys
):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(run_dir / "step-00000008" / name, model)
    shutil.copy(run_dir / "step-00000008" / "weights.safetensors", model / "model.safetensors")
    options = EvalOptions(path=model, tasks_dir=tasks_dir, modes="ar", data=tiny_dataset)
    exported = evaluate_model(options)
    of_run = evaluate_model(EvalOptions(path=run_dir, tasks_dir=tasks_dir, modes="ar"))
    assert results(model / "eval" / "model")["model"]["recipe"] is None
    for one, other in zip(exported.results, of_run.results, strict=True):
        assert one.score == other.score
    assert exported.held_out is not None and of_run.held_out is not None


def test_held_out_losses_take_smaller_batches_when_memory_runs_out(
    run_dir, out, monkeypatch, capsys
):
    options = EvalOptions(path=run_dir, sequences=4, tokens_per_batch=128, out=out)
    expected = evaluate_model(replace(options, out=out.with_name("before"))).held_out
    losses = evaluation.held_out_losses

    def small_machine(*arguments, micro_batch, **others):
        if micro_batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(*arguments, micro_batch=micro_batch, **others)

    monkeypatch.setattr(evaluation, "held_out_losses", small_machine)
    found = evaluate_model(options).held_out
    assert found is not None and expected is not None
    assert found.diffusion_nll == pytest.approx(expected.diffusion_nll, rel=1e-5)
    assert "memory ran out: held-out losses with 1 sequence at once" in capsys.readouterr().err
    assert len([note for note in results(out)["notes"] if "memory" in note]) == 2


def test_one_process_evaluates(run_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="was started on several ranks"):
        evaluate_model(EvalOptions(path=run_dir))


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--elbo-samples", ["0", "10001", str(10**12)]),
        ("--tokens-per-batch", ["0", str(10**12)]),
        ("--limit", ["0", "-1"]),
        ("--sequences", ["-1"]),
    ],
)
def test_numbers_beyond_reason_are_refused_at_once(option, values):
    for value in values:
        outcome = CliRunner().invoke(app, ["eval", "nowhere", option, value])
        assert outcome.exit_code == 2
        assert f"Invalid value for '{option}'" in outcome.output


def test_every_checkpoint_of_a_run_is_evaluated_once(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(run / "eval", ignore_errors=True)
    steps = {int(path.name[5:]) for path in run.glob("step-*")}
    assert len(steps) > 1
    for already in (0, len(steps)):
        done = CliRunner().invoke(app, ["eval", str(run), "--all", "--sequences", "2"])
        assert done.exit_code == 0 and done.output.count("there already:") == already
    found = [json.loads(file.read_text()) for file in run.glob("eval/*/results.json")]
    assert {result["model"]["step"] for result in found} == steps and len(found) == len(steps)
    assert len({result["held_out"]["ar_nll"] for result in found}) == len(steps)
