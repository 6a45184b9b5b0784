"""Tests of: dualtrain.sweep.run, plan, compare: real sweeps, interruptions, comparisons."""

from __future__ import annotations

import json
import subprocess

import pytest
from experiments.kill_sweeps import disturb, sweep, sweep_file
from helpers.ranks import environment

from dualtrain.common.errors import UserError
from dualtrain.sweep.command import CompareOptions, SweepOptions
from dualtrain.sweep.compare import compare_runs
from dualtrain.sweep.definition import load_sweep
from dualtrain.sweep.directory import Outcome, prepare, write_outcome, write_recipe
from dualtrain.sweep.plan import choose_points
from dualtrain.sweep.run import run_sweep
from dualtrain.sweep.runner import Runner, share_devices
from dualtrain.training.prepare import lock_run_directory


@pytest.fixture(scope="module")
def swept(tiny_dataset, tmp_path_factory):
    """A sweep's file and its directory once it has ended, never disturbed."""
    folder = tmp_path_factory.mktemp("sweep")
    file = sweep_file(folder, tiny_dataset)
    ended = subprocess.run(
        sweep(file, folder / "calm"),
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    return file, folder / "calm", ended.stdout


def test_what_fails_is_recorded_and_the_rest_goes_on(swept):
    _, directory, printed = swept
    states = {
        folder.name: json.loads((folder / "outcome.json").read_text())["state"]
        for folder in directory.glob("alpha=*")
    }
    failing = "alpha=3_4,optim.lr=1e+06"
    assert states.pop(failing) == "failed"
    assert states == dict.fromkeys(["alpha=0", "alpha=1_2", "alpha=1"], "finished")
    outcome = json.loads((directory / failing / "outcome.json").read_text())
    assert outcome["exit_code"] == 3 and "not finite" in outcome["reason"]
    assert f"FAILED   {failing}" in printed and "--retry-failed" in printed
    rows = [line.split(",") for line in (directory / "results.csv").read_text().splitlines()]
    assert rows[0][:4] == ["alpha", "optim.lr", "state", "step"]
    assert [row[2:4] for row in rows[1:4]] == [["finished", "8"]] * 3
    assert rows[4][2] == "failed"


def test_interruptions_and_a_failure_that_is_mended_change_nothing_in_the_table(swept, tmp_path):
    file, directory, _ = swept
    disturbed = load_sweep(str(file), directory=tmp_path / "disturbed")
    prepare(disturbed)
    point = disturbed.points[0]
    write_recipe(point)
    write_outcome(point.directory, Outcome("failed", 1, "no memory"))
    assert [job.state for job in run_points(file, disturbed.directory, first=1)] == ["failed"]
    disturb(file, disturbed.directory, "--retry-failed", kills=1, seed=2)
    table = (disturbed.directory / "results.csv").read_text()
    assert table == (directory / "results.csv").read_text()


def test_what_has_ended_is_not_run_again(swept):
    file, directory, _ = swept
    before = {path: path.stat().st_mtime_ns for path in directory.glob("*/metrics.jsonl")}
    jobs = run_points(file, directory)
    assert [job.state for job in jobs] == ["finished"] * 3 + ["failed"]
    assert before == {path: path.stat().st_mtime_ns for path in directory.glob("*/metrics.jsonl")}


def run_points(file, directory, first=None):
    runner = Runner(load_sweep(str(file), directory=directory).points[:first])
    runner.run()
    return runner.jobs


def test_a_point_that_another_process_has_is_left_to_it(swept, tmp_path):
    file, _, _ = swept
    points = load_sweep(str(file), directory=tmp_path / "shared").points[:1]
    write_recipe(points[0])
    with lock_run_directory(points[0].loaded.recipe):
        jobs = run_points(file, tmp_path / "shared", first=1)
    assert [job.state for job in jobs] == ["elsewhere"]


def test_the_dry_run_lists_points_tokens_and_time(swept, tmp_path, capsys):
    file, directory, _ = swept
    for place, state, basis in (
        (tmp_path / "new", "4 points", "when the first point has ended"),
        (directory, "finished", "by the points that have ended"),
    ):
        assert run_sweep(SweepOptions(file=str(file), directory=place, dry_run=True)) == 0
        shown = capsys.readouterr().out
        assert "4 points, 8,192 tokens" in shown and basis in shown and state in shown
    assert not (tmp_path / "new").exists()


def test_comparing_runs(swept, tmp_path, capsys):
    _, directory, _ = swept
    runs = [directory / name for name in ("alpha=1_2", "alpha=0", "alpha=1")]
    result = compare_runs(CompareOptions(runs=runs, sequences=100, out=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == result
    assert (tmp_path / "out" / "losses.png").stat().st_size > 10_000
    found = result["differences"]["runs"]
    assert list(found) == ["alpha=1_2", "alpha=0", "alpha=1"]
    assert "ar" not in found["alpha=1_2"] and found["alpha=1_2"]["documents"] > 5
    for name in ("alpha=0", "alpha=1"):
        for part in ("ar", "diffusion", "prefix"):
            interval = found[name][part]
            assert interval["low"] <= interval["value"] <= interval["high"]
    # Trained on one objective only, each is worse at the other.
    assert found["alpha=0"]["ar"]["low"] > 0 and found["alpha=1"]["diffusion"]["low"] > 0
    assert result["runs"]["alpha=1"]["metrics"]["train.ar_passes"] == pytest.approx(1.37, abs=0.01)
    printed = capsys.readouterr().out
    assert "differences to alpha=1_2, paired over" in printed and "prefix − AR" in printed


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["alpha=0"], "1 run — expected two or more"),
        (["alpha=0", "alpha=0"], "is there twice"),
        (["alpha=0", "nothing"], "is no run"),
        (["alpha=0", "."], "is a sweep — expected runs, or one sweep alone"),
    ],
)
def test_what_cannot_be_compared_is_refused(swept, tmp_path, names, message):
    runs = [swept[1] / name for name in names]
    with pytest.raises(UserError, match=message):
        compare_runs(CompareOptions(runs=runs, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_too_few_documents_give_no_interval(swept, tmp_path):
    runs = [swept[1] / name for name in ("alpha=0", "alpha=1")]
    result = compare_runs(CompareOptions(runs=runs, sequences=1, out=tmp_path / "out"))
    assert result["differences"]["runs"] == {} and "too few" in result["notes"][0]
    with pytest.raises(UserError, match="is there already"):
        compare_runs(CompareOptions(runs=runs, out=tmp_path / "out"))


def test_a_directory_of_another_recipe_or_of_none_is_refused(swept, tmp_path):
    file, directory, _ = swept
    with pytest.raises(UserError) as error:
        prepare(load_sweep(str(file), ["global_batch=16"], directory=directory))
    assert "holds points of another recipe: global_batch 8 then, 16 now" in str(error.value)
    (tmp_path / "mine.txt").write_text("not a sweep")
    with pytest.raises(UserError, match=r"is not empty and has no sweep\.json"):
        prepare(load_sweep(str(file), directory=tmp_path))


def test_a_sweep_can_grow(swept, tmp_path):
    file, _, _ = swept
    sweep = load_sweep(str(file), directory=tmp_path / "grows")
    prepare(sweep)
    for point in sweep.points:
        write_recipe(point)
    text = file.read_text().replace("alpha: [0, 1/2, 1]", "alpha: [0, 1/4], seed: [3, 5]")
    more = tmp_path / "more.yaml"
    more.write_text(text)
    prepare(load_sweep(str(more), directory=tmp_path / "grows"))
    listing = json.loads((tmp_path / "grows" / "sweep.json").read_text())
    assert listing["keys"] == ["alpha", "optim.lr", "seed"]
    assert len(listing["points"]) == 4 + 4
    # What is there under a name has to be the same in everything.
    more.write_text(text.replace("alpha: [0, 1/4], seed: [3, 5]", "alpha: [0]") + "\nseed: 9\n")
    more.write_text(more.read_text().replace("seed: 3\n", "", 1))
    with pytest.raises(UserError, match="seed 3 then, 9 now"):
        prepare(load_sweep(str(more), directory=tmp_path / "grows"))


def test_indices_and_shards_divide_the_points(swept):
    found = load_sweep(str(swept[0]))
    assert [p.number for p in choose_points(found, index=2, shard=None)] == [2]
    shards = [choose_points(found, index=None, shard=f"{i}/3") for i in range(3)]
    assert sorted(p.number for shard in shards for p in shard) == [0, 1, 2, 3]
    for index, shard, message in (
        (4, None, "0 to 3"),
        (-1, None, "0 to 3"),
        (None, "3/3", "I from 0 to N - 1"),
        (None, "1", "I from 0 to N - 1"),
        (0, "0/2", "one of them"),
    ):
        with pytest.raises(UserError, match=message):
            choose_points(found, index=index, shard=shard)


def test_gpus_are_divided_among_points_that_run_at_once():
    assert [share_devices("abcd", place, 2) for place in range(2)] == ["ab", "cd"]
    assert [share_devices(["0", "1"], place, 3) for place in range(3)] == [["0"], ["1"], ["0"]]
