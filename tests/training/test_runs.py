"""Tests of: dualtrain.training.start, assemble, train, run, summary.

Whole runs with real DeepSpeed, shards and processes: data, losses, resume, launchers.
"""

from __future__ import annotations

import io
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from fractions import Fraction

import pytest
from helpers.ranks import environment
from helpers.runs import command, records, results, run, said, slots, train_on

from dualtrain.common.errors import UserError
from dualtrain.launch.world import free_port
from dualtrain.recipe.load import load_recipe
from dualtrain.training.prepare import lock_run_directory
from dualtrain.training.start import show, start


def test_any_number_of_ranks_and_any_stage_train_the_same(tiny, tmp_path):
    """The same slots to the bit; the same losses up to the order of float32 additions."""
    record = "algorithms=[{use: helpers.algorithms:Recorder}]"
    alone = tiny(record, "engine.deepspeed=zero0", name="alone")
    assert train_on(1, tmp_path, alone) == [0]
    pair = [tiny(record, f"engine.deepspeed=zero{s}", name=f"pair-{s}") for s in range(4)]
    assert train_on(2, tmp_path, *pair) == [0] * 4
    expected = slots(alone)
    assert len(expected) == 8 * 8
    assert sum(objective == "ar" for _, _, objective, *_ in expected) == 8 * 8 * Fraction(3, 8)
    for other in pair:
        assert slots(other) == expected
        for mine, theirs in zip(records(alone), records(other), strict=True):
            # 5 digits: two orders of adding 8 float32 gradients, then Newton-Schulz, 8 times.
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
            assert mine["ar_slots"] == theirs["ar_slots"]
        held_out = records(other, "eval")[-1]
        assert records(alone, "eval")[-1]["ar_nll"] == pytest.approx(held_out["ar_nll"], rel=2e-5)
    # It learns: better than guessing among 512 tokens.
    assert records(alone, "eval")[-1]["ar_nll"] < math.log(512)


def test_bf16_trains_like_fp32_at_every_stage(tiny, tmp_path):
    exact = tiny(name="exact")
    cast = [
        tiny("engine.precision=bf16", f"engine.deepspeed=zero{s}", name=f"bf16-{s}")
        for s in range(4)
    ]
    assert train_on(2, tmp_path, exact, *cast) == [0] * 5
    for recipe in cast:
        for mine, theirs in zip(records(exact), records(recipe), strict=True):
            # bf16 keeps 8 bits: 0.4 % a product.
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
            assert mine["loss"] != theirs["loss"]


def test_refused_before_the_first_step(tiny, tmp_path):
    bad = {
        "there is no dataset": tiny("data.path=/nowhere"),
        "unique tokens, but the train split": tiny("unique_tokens=99999999"),
        "but the tokenizer of .* has 512 tokens": tiny("model.vocab_size=100"),
        "no algorithm `input_maskin`": tiny("algorithms=[{use: input_maskin}]"),
        "it needs a CUDA device": tiny("model.attention=varlen"),
        "sample.infill: 101 tokens — expected at most 32": tiny("sample.infill='a <mask:99>'"),
    }
    outcomes = train_on(1, tmp_path, *bad.values())
    for expected, outcome in zip(bad, outcomes, strict=True):
        assert isinstance(outcome, str)
        assert re.search(expected, outcome), outcome


ABLATIONS = ("adamw", "cosine", "weighted-sum", "span-masking", "in-place", "alpha-curriculum")


def test_every_ablation_and_the_released_code_train(tiny_dataset, tmp_path):
    small = [
        f"data={{path: {tiny_dataset}, build: null}}",
        "steps=4",
        "unique_tokens=2000",
        "repetitions=null",
        "sequence_length=32",
        "global_batch=8",
        "micro_batch=2",
        "model={layers: 1, width: 16, heads: 2, mlp_width: 24, vocab_size: null}",
        "engine={deepspeed: zero1, precision: fp32}",
        "progress.interval_steps=2",
        "sample={tokens: 2, infill: 'a <mask:2>', prompt: ''}",
        "eval={sequences: 4, interval_steps: 0}",
    ]
    names = [*(f"ablations/{name}" for name in ABLATIONS), "quickstart", "paper/470m-released-code"]
    recipes = [load_recipe(name, [*small, f"run_dir={tmp_path / name}"]) for name in names]
    assert train_on(1, tmp_path, *recipes) == [0] * len(recipes)
    assert all(len(records(recipe)) == 2 for recipe in recipes)
    assert all(records(recipe, "eval")[-1]["diffusion_nll"] > 0 for recipe in recipes)


def test_golden_losses(tiny, tmp_path):
    """A change that is meant to change nothing changes none of these."""
    recipe = tiny(name="golden")
    assert train_on(1, tmp_path, recipe) == [0]
    losses = [round(record["loss"], 3) for record in records(recipe)]
    assert losses == pytest.approx(GOLDEN, abs=3e-3)


GOLDEN = [6.298, 6.413, 6.52, 6.358, 6.311, 6.691, 6.199, 6.828]


def test_not_finite_loss_stops_with_code_3_and_saves_nothing(tiny, tmp_path):
    spoilt = tiny(
        "algorithms=[{use: helpers.algorithms:Spoil, args: {step: 3}}]",
        "checkpoint.interval_steps=2",
        "progress.interval_steps=100",
    )
    assert train_on(2, tmp_path, spoilt) == [3]
    saved = sorted(path.name for path in spoilt.recipe.directory.glob("step-*"))
    assert saved == ["step-00000002"]
    assert records(spoilt, "event")[-1]["event"] == "non_finite_loss"


def test_signal_saves_and_the_same_command_continues(tiny, tmp_path):
    algorithms = "{use: helpers.algorithms:Slow, args: {seconds: 0.15}}"
    algorithms += ", {use: helpers.algorithms:Recorder}"
    whole, stopped = (tiny(f"algorithms=[{algorithms}]", name=n) for n in ("whole", "stopped"))
    process = subprocess.Popen(
        [sys.executable, *command(stopped, "--ranks", "2")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = stopped.recipe.directory / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"train"') < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 75, errors
    assert "stopped by a signal" in output
    assert 2 <= len(records(stopped)) < 8
    assert train_on(2, tmp_path, stopped, whole) == [0, 0]
    assert results(stopped) == results(whole)
    assert slots(stopped) == slots(whole)  # none of them twice


def test_failing_rank_is_shown_once_and_ends_the_run(tiny):
    recipe = tiny("algorithms=[{use: helpers.algorithms:Fail, args: {rank: 1, step: 2}}]")
    finished = run(command(recipe, "--ranks", "2"))
    assert finished.returncode == 1
    assert finished.stderr.count("AlgorithmError: Fail failed at STEP_START of step 2") == 1
    assert "closed by peer" not in finished.stderr


def test_torchrun(tiny):
    recipe = tiny("steps=1")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    finished = run(command(recipe), launcher)
    assert finished.returncode == 0, finished.stderr
    assert "2 ranks" in finished.stdout and finished.stdout.count("checkpoint at") == 1


def test_deepspeed_launcher(tiny):
    recipe = tiny("steps=1")
    layout = "eyJsb2NhbGhvc3QiOiBbMCwgMV19"  # {"localhost": [0, 1]}, as the runner encodes it
    launcher = ("-m", "deepspeed.launcher.launch", f"--world_info={layout}")
    finished = run(command(recipe)[1:], (*launcher, f"--master_port={free_port()}", "--module"))
    assert finished.returncode == 0, finished.stderr
    assert "2 ranks" in finished.stdout


def test_second_run_in_one_directory_is_refused(tiny):
    recipe = tiny(name="shared")
    recipe.recipe.directory.mkdir()
    with lock_run_directory(recipe.recipe):
        finished = run(command(recipe))
        assert finished.returncode == 2
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        assert f"is in use by another run ({owner})" in finished.stderr
    lock_run_directory(recipe.recipe).close()


def test_dry_run_sees_what_the_run_refuses(tiny, tmp_path, monkeypatch, capsys):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}')
    cases = {
        f"engine.deepspeed={file}": "gradient_clipping",
        "algorithms=[{use: nope}]": "no algorithm `nope`",
    }
    for change, message in cases.items():
        arguments = [*command(tiny(change))[2:], "--dry-run"]
        code, error = said(monkeypatch, capsys, *arguments)
        assert code == 2 and message in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run_dir=/proc/x", "run_dir: cannot write to /proc/x: No such file or directory"),
        (f"run_dir=new/{300 * 'x'}", "File name too long"),
        ("data={path: nowhere, build: {source: nowhere.txt}}", "nowhere.txt"),
        ("data.path=nowhere", "there is no dataset"),
    ],
)
def test_what_is_refused_leaves_nothing_and_the_dry_run_says_so(tiny, tmp_path, change, message):
    loaded = tiny(change)
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        start(loaded, ranks=1, hostfile=None, plain=True)
    assert set(tmp_path.iterdir()) == before
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            show(loaded, ranks=1, hostfile=None)
    except UserError as error:
        out.write(str(error))
    assert message in out.getvalue()


def test_mistake_is_one_line_and_exit_code_2(tiny):
    recipe = tiny("data.path=/nowhere")
    finished = run(command(recipe))
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: /nowhere: there is no dataset")
    assert "Traceback" not in finished.stderr
