"""Tests of: dualtrain.checkpoint.resume, store, engine.optimizer_state, training.branch, origin.

Resuming: bit for bit on the same ranks, up to rounding on others, refused where it cannot be.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import zero_momentum
from helpers.runs import records, results, rewind, slots, train_on
from safetensors.torch import load_file

from dualtrain.common.errors import UserError
from dualtrain.data.corpus import CorpusFacts
from dualtrain.recipe.load import LoadedRecipe, load_recipe
from dualtrain.training.branch import check_branch, load_branch, read_parent

COMMON = (
    *("progress.interval_steps=3", "checkpoint.interval_steps=5", "eval.interval_steps=4"),
    "eval.sequences=4",
)

RESUMED: tuple[tuple[str, ...], ...] = (
    *((f"engine.deepspeed=zero{stage}",) for stage in range(4)),
    ("engine.precision=bf16", "optim.clip_norm=1"),
    ("optim.name=adamw", "optim.schedule={name: constant, warmup_steps: 7}"),
    ("optim.schedule={name: cosine, warmup_steps: 7}", "engine.deepspeed=zero2-offload"),
    ("alpha={name: linear, start: 1, phases: [{until: 1, alpha: 0}]}", "optim.clip_norm=0.5"),
    (
        "objective.mixing=weighted_sum",
        "objective.corruption={name: span}",
        "optim.schedule.shape=one_minus_sqrt",
    ),
    (
        "algorithms=[{use: helpers.algorithms:Average}, {use: input_masking}]",
        "alpha={name: phases, phases: [{until: 1/2, alpha: 1}, {until: 1, alpha: 1/4}]}",
    ),
)


def test_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path):
    """Bit for bit and twice in a row, in the middle of intervals, epochs, warm-up and cooldown."""
    recipes = [tiny(*COMMON, "steps=12", *change, name=f"r{i}") for i, change in enumerate(RESUMED)]
    assert train_on(2, tmp_path, *recipes) == [0] * len(recipes)
    uninterrupted = [results(recipe) for recipe in recipes]
    assert all(run == [*dict.fromkeys(run)] for run in uninterrupted)
    spoilt = [tiny(*COMMON, "steps=12", RESUMED[i][0], name=f"zeroed{i}") for i in range(4)]
    for recipe, copied in zip(recipes, spoilt, strict=False):
        copy_run(recipe, copied, 5)
        zero_momentum(copied.recipe.directory / "step-00000005")
    for step, more in ((5, spoilt), (10, [])):
        for recipe in recipes:
            rewind(recipe, step)
        assert train_on(2, tmp_path, *recipes, *more) == [0] * len([*recipes, *more])
        for change, recipe, expected in zip(RESUMED, recipes, uninterrupted, strict=True):
            assert sorted(results(recipe)) == sorted(expected), (step, change)
    # The test can fail: without Muon's momentum every stage ends elsewhere.
    for expected, recipe in zip(uninterrupted, spoilt, strict=False):
        assert sorted(results(recipe)) != sorted(expected)


@pytest.mark.slow
def test_frozen_parameters_buffers_and_steps_without_an_update_are_restored(tiny, tmp_path):
    """A run that takes weights from another, freezes some, and leaves its first steps out."""
    source = tiny("seed=7", "steps=2", name="source")
    assert train_on(2, tmp_path, source) == [0]
    start = f"checkpoint.resume=weights:{source.recipe.directory / 'step-00000002'}"
    spoilt = ", ".join(
        f"{{use: helpers.algorithms:Spoil, args: {{step: {step}}}}}" for step in range(2)
    )
    common = (*COMMON, "checkpoint.interval_steps=2", "engine.skip_non_finite=2", start)
    algorithms = f"algorithms=[{spoilt}, {{use: helpers.algorithms:Surgeon}}]"
    recipes = [
        tiny(*common, algorithms, f"engine.deepspeed={engine}", name=f"surgeon-{number}")
        for number, engine in enumerate(("zero0", "zero1", "zero3", without_persistence(tmp_path)))
    ]
    assert train_on(2, tmp_path, *recipes) == [0] * 4
    uninterrupted = [results(recipe) for recipe in recipes]
    for step in (4, 2):  # 2: before the first update, when there are no moments yet
        for recipe in recipes:
            rewind(recipe, step)
        assert train_on(2, tmp_path, *recipes) == [0] * 4
        for recipe, expected in zip(recipes, uninterrupted, strict=True):
            assert sorted(results(recipe)) == sorted(expected), (step, recipe.recipe.name)
    for recipe in recipes:
        frozen = "model.embed_tokens.weight"
        saved = load_file(recipe.recipe.directory / "step-00000008" / "weights.safetensors")
        before = load_file(source.recipe.directory / "step-00000002" / "weights.safetensors")
        assert torch.equal(saved[frozen], before[frozen])


def without_persistence(folder: Path) -> Path:
    """Stage 3 that keeps no small parameter whole."""
    zero = {"stage": 3, "reduce_scatter": False, "stage3_param_persistence_threshold": 0}
    file = folder / "small.json"
    settings = {"zero_optimization": zero, "communication_data_type": "fp32"}
    file.write_text(json.dumps(settings))
    return file


@pytest.mark.slow
def test_weights_are_taken_in_fp32_also_where_bf16_computes(tiny, tmp_path):
    source = tiny(name="source")
    assert train_on(1, tmp_path, source) == [0]
    saved = source.recipe.directory / "step-00000008"
    taken = [
        tiny(
            f"checkpoint.resume=weights:{saved}",
            "engine.precision=bf16",
            f"engine.deepspeed=zero{stage}",
            "steps=1",
            "optim.lr=1e-30",
            name=f"taken{stage}",
        )
        for stage in (1, 3)
    ]
    assert train_on(2, tmp_path, *taken) == [0, 0]
    expected = load_file(saved / "weights.safetensors")
    for recipe in taken:
        found = load_file(recipe.recipe.directory / "step-00000001" / "weights.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def copy_run(recipe: LoadedRecipe, to: LoadedRecipe, step: int) -> None:
    """Another run as it was when it had saved ``step``."""
    shutil.copytree(recipe.recipe.directory, to.recipe.directory)
    for file in to.recipe.directory.glob("slots-*.jsonl"):
        lines = file.read_text().splitlines()
        file.write_text("".join(f"{line}\n" for line in lines if json.loads(line)[0] < step))
    rewind(to, step)


# Ranks it goes on with: ZeRO stage that saved it on 2 ranks, and its stage there.
ELSEWHERE = {1: {0: 1, 3: 2}, 4: {1: 3, 2: 0}}


def test_run_goes_on_with_any_ranks_and_stage_and_back(tiny, tmp_path):
    """The data to the bit, the losses up to the order of additions."""
    common = (
        *COMMON,
        "checkpoint.interval_steps=2",
        "algorithms=[{use: helpers.algorithms:Recorder}]",
    )
    whole = [tiny(*common, f"engine.deepspeed=zero{s}", name=f"whole{s}") for s in range(4)]
    assert train_on(2, tmp_path, *whole) == [0] * 4
    back = []
    for ranks, stages in ELSEWHERE.items():
        moved = []
        for old, new in stages.items():
            moved.append(tiny(*common, f"engine.deepspeed=zero{new}", name=f"{old}to{new}"))
            copy_run(whole[old], moved[-1], 4)
        assert train_on(ranks, tmp_path, *moved) == [0] * 2
        for (old, new), there in zip(stages.items(), moved, strict=True):
            assert_same_run(there, whole[old])
            said = [r["message"] for r in records(there, "event") if r["event"] == "resume"]
            assert f"by 2 ranks at ZeRO stage {old}, now {ranks} at stage {new}" in said[0]
            back.append(tiny(*common, f"engine.deepspeed=zero{old}", name=f"back{old}"))
            copy_run(there, back[-1], 6)
    assert train_on(2, tmp_path, *back) == [0] * 4
    for recipe in back:
        assert_same_run(recipe, whole[int(recipe.recipe.engine.deepspeed[-1])])


def assert_same_run(one: LoadedRecipe, other: LoadedRecipe) -> None:
    assert slots(one) == slots(other)
    for kind, names in (("train", ("loss", "grad_norm")), ("eval", ("ar_nll", "diffusion_nll"))):
        for mine, theirs in zip(records(one, kind), records(other, kind), strict=True):
            assert mine["step"] == theirs["step"]
            for name in names:
                # Two orders of adding float32 gradients, then Newton-Schulz, 4 times.
                assert mine[name] == pytest.approx(theirs[name], rel=2e-5), (kind, name)


def test_what_would_be_another_run_is_refused(tiny, tmp_path):
    first, other_state = tiny(name="first"), "algorithms=[{use: helpers.algorithms:RankState}]"
    stateful = tiny(other_state, name="stateful")
    assert train_on(2, tmp_path, first, stateful) == [0, 0]
    checkpoint = tmp_path / "first" / "step-00000008"
    start = f"checkpoint.resume=weights:{checkpoint}"
    weights = tiny("optim.lr=1e-9", start, "steps=1", name="weights")
    outcomes = train_on(
        1,
        tmp_path,
        tiny("optim.lr=1e-3", "seed=4", name="first"),
        tiny("optim.lr=1e-3", "objective.corruption={name: uniform, rate: {}}", name="first"),
        tiny(other_state, name="stateful"),
        weights,
        tiny("model.width=16", start, "steps=1", name="narrow"),
    )
    assert "optim.lr: checkpoint 0.002, recipe 0.001; seed: checkpoint 3, recipe 4" in outcomes[0]
    assert "--from" not in outcomes[0] and "--from 8 to branch off" in outcomes[1]
    assert "objective.corruption.rate.end: checkpoint None, recipe 0.15" in outcomes[1]
    assert "RankState has a state of its own on each of the 2 ranks" in outcomes[2]
    assert outcomes[3] == 0
    assert "weights do not fit the model" in outcomes[4]
    expected = records(first, "eval")[-1]["ar_nll"]
    assert records(weights, "eval")[-1]["ar_nll"] == pytest.approx(expected, rel=1e-6)


def test_damage_is_said_and_passed_over_only_under_auto(tiny, tmp_path):
    common = (*COMMON, "checkpoint.interval_steps=3")
    whole, altered = tiny(*common, name="whole"), tiny(*common, name="altered")
    assert train_on(2, tmp_path, whole) == [0]
    copy_run(whole, altered, 6)
    file = next((altered.recipe.directory / "step-00000006" / "deepspeed").glob("*optim*"))
    flip_a_bit(file)
    must = tiny(*common, "checkpoint.resume=must", name="altered")
    start = f"checkpoint.resume=weights:{altered.recipe.directory / 'step-00000006'}"
    outcomes = train_on(2, tmp_path, must, tiny(*common, start, name="new"), altered)
    for refused in outcomes[:2]:
        assert f"deepspeed/{file.name} is not as it was saved" in refused
    assert "checkpoint.resume=auto goes back to step-00000003" in outcomes[0]
    assert outcomes[2] == 0
    said = [r["message"] for r in records(altered, "event") if r["event"] == "resume"]
    assert "step-00000006 is damaged and passed over: deepspeed/" in said[0]
    assert sorted(results(altered)) == sorted(results(whole))
    for checkpoint in altered.recipe.directory.glob("step-*"):
        flip_a_bit(checkpoint / "weights.safetensors")
    lost = train_on(2, tmp_path, altered)[0]
    assert "every checkpoint of this run is damaged: step-00000003: weights.safetensors" in lost


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_branch_goes_on_with_the_data_and_only_then_differs(tiny, tmp_path):
    """A run of 8 steps is extended to 12 from before its cooldown, and ends as one of 12 does."""
    record = "algorithms=[{use: helpers.algorithms:Recorder}]"
    common = (*COMMON, "checkpoint.interval_steps=3", record, "optim.schedule.cooldown=0.25")
    parent = tiny(*common, "steps=8", name="parent")
    longer = tiny(*common, "steps=12", name="longer")
    assert train_on(2, tmp_path, parent, longer) == [0, 0]
    file = tmp_path / "parent.yaml"
    file.write_text(parent.text)
    branch = load_branch(str(file), ["steps=12"], "6")
    assert branch.recipe.directory == tmp_path / "parent-from-00000006"
    late = load_branch(str(file), ["steps=12", "optim.lr=1e-4"], f"{tmp_path}/parent/step-00000008")
    falling = ["steps=12", "objective.corruption={name: span, rate: {start: 0.4}}"]
    falling.append(f"run_dir={tmp_path}/spans")
    spans = load_branch(str(file), falling, f"{tmp_path}/parent/step-00000006")
    assert train_on(2, tmp_path, branch, late, spans) == [0, 0, 0]
    # The same sequences, and other masks: AR slots are as they were, diffusion slots are not.
    for one, other in zip(slots(spans), slots(branch), strict=True):
        assert one[:5] == other[:5] and (one == other) == (one[2] == "ar")
    assert slots(branch) == [slot for slot in slots(longer) if slot[0] >= 6]
    # The metrics begin with the parent's; 6 steps are the same in both, and so is the rest.
    assert sorted(without_steps(branch)) == sorted(without_steps(longer))
    said = [r["message"] for r in records(late, "event") if r["event"] == "resume"]
    assert "lies in the cooldown" in said[1] and "began after step 6" in said[1]
    assert without_steps(late) != without_steps(longer)
    # The same command goes on with the branch, once it has begun.
    again = load_branch(str(file), ["steps=12"], "6")
    rewind(again, 9)
    assert train_on(2, tmp_path, again) == [0]
    assert sorted(without_steps(again)) == sorted(without_steps(longer))


def without_steps(recipe: LoadedRecipe) -> list[tuple]:
    """The results without the planned length, which a parent's records have otherwise."""
    return [tuple(pair for pair in row if pair[0] != "steps") for row in results(recipe)]


def test_branch_is_refused_where_the_data_would_be_other(tiny, tmp_path):
    linear = "alpha={name: linear, start: 1, phases: [{until: 1, alpha: 0}]}"
    parent, curriculum = tiny(name="parent"), tiny(linear, name="curriculum")
    assert train_on(1, tmp_path, parent, curriculum) == [0, 0]
    for recipe in (parent, curriculum):
        (tmp_path / f"{recipe.recipe.directory.name}.yaml").write_text(recipe.text)
    file = str(tmp_path / "parent.yaml")
    with pytest.raises(UserError, match="--from: '5': there is no .*checkpoints of .*: 8"):
        load_branch(file, [], "5")
    with pytest.raises(UserError, match="9, but a branch goes on with those .*expected 1500"):
        load_branch(file, ["unique_tokens=9"], "8")
    with pytest.raises(UserError, match="there is no runs/other/step-00000008"):
        load_branch(file, ["name=other", "run_dir=null"], "8")
    named = load_branch(file, ["unique_tokens=1500", f"run_dir={tmp_path}/curriculum"], "8")
    assert named.recipe.run_dir == f"{tmp_path}/curriculum-from-00000008"
    stretched = load_branch(str(tmp_path / "curriculum.yaml"), ["steps=12"], "8")
    refused = train_on(
        1,
        tmp_path,
        load_branch(file, [], "8"),
        load_branch(file, ["steps=12", "alpha=1/2"], "8"),
        stretched,
    )
    assert "steps: 8, and the branch begins after 8 — expected more" in refused[0]
    assert "alpha: checkpoint '3/8', recipe '1/2'" in refused[1]
    assert "its schedule is stretched over 12 steps instead of 8" in refused[2]


PHASES = "alpha={name: phases, phases: [{until: %s, alpha: 1/4}, {until: 1, alpha: 3/4}]}"


@pytest.mark.parametrize(
    ("step", "until", "refused"),
    [
        # 16 steps, two passes of 8; alpha changes in step 12, in the second one.
        (4, "3/4", False),
        (8, "3/4", False),
        (10, "3/4", False),
        (4, "1/4", True),
        (8, "1/4", True),
        (4, "5/16", True),
        (8, "5/16", True),
        (4, "3/8", True),
        (4, "1/2", False),
        (10, "11/16", True),
    ],
)
def test_a_branch_keeps_how_the_objectives_share_the_pass_it_begins_in(
    tmp_path, step, until, refused
):
    """The checkpoint's alpha changes at 3/4 of 16 steps; the branch's at `until`, also of 16."""
    length = ["steps=16", "unique_tokens=4096", "repetitions=null", "sequence_length=64"]
    length += ["global_batch=8", "micro_batch=2"]
    parent = load_recipe("quickstart", [*length, PHASES % "3/4"])
    branch = load_recipe("quickstart", [*length, PHASES % until]).recipe
    (tmp_path / "recipe.yaml").write_text(parent.text)
    (tmp_path / "state.json").write_text(json.dumps({"step": step}))
    corpus = CorpusFacts(tokens=100_000, documents=10, vocab_size=300)
    try:
        check_branch(branch, tmp_path, corpus)
        assert not refused
    except UserError as error:
        assert refused and error.where == "alpha"


def test_branch_from_a_recipe_of_another_version_is_refused_by_name(tmp_path):
    text = load_recipe("ablations/span-masking").text
    older = text.replace("    max_span: 3\n", "    max_span: 3\n    min_rate: 0.15\n")
    (tmp_path / "recipe.yaml").write_text(older)
    with pytest.raises(UserError, match="objective.corruption.min_rate: unknown key"):
        read_parent(tmp_path)


def test_full_disk_costs_a_checkpoint_but_not_the_run(tiny, tmp_path):
    """A limit on file size stands for the full disk: DeepSpeed's file fails, on one rank or all."""
    common = (*COMMON, "checkpoint.interval_steps=2")
    whole = tiny(*common, name="whole")
    assert train_on(2, tmp_path, whole) == [0]
    largest = max(f.stat().st_size for f in (tmp_path / "whole").rglob("*") if f.is_file())
    at = f"{{rank: 1, first: 3, last: 7, size: {largest // 4}}}"
    limit = f"helpers.algorithms:FileSizeLimit, args: {at}"
    hit = tiny(*common, f"algorithms=[{{use: {limit}}}]", name="hit")
    end = tiny(*common, f"algorithms=[{{use: {limit.replace('last: 7', 'last: 8')}}}]", name="end")
    outcomes = train_on(2, tmp_path, hit, end)
    assert outcomes[0] == 0
    saved = sorted(path.name for path in hit.recipe.directory.glob("step-*"))
    assert saved == ["step-00000002", "step-00000008"]
    failed = [r for r in records(hit, "event") if r["event"] == "checkpoint_failed"]
    assert [r["step"] for r in failed] == [4, 6]
    assert "File too large" in failed[0]["message"]
    assert "step 8 could not be written" in outcomes[1] and "File too large" in outcomes[1]
    left = sorted(path.name for path in end.recipe.directory.glob("step-*"))
    assert left == ["step-00000002"]
