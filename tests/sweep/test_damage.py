"""Tests of: dualtrain.sweep.directory, reading: files that were changed, removed or damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.sweeps import FILE, make_sweep
from typer.testing import CliRunner

from dualtrain.cli import app
from dualtrain.common.errors import UserError
from dualtrain.sweep.command import FitOptions
from dualtrain.sweep.definition import load_sweep
from dualtrain.sweep.directory import check, is_busy, prepare, read_outcome
from dualtrain.sweep.fit import fit_sweep
from dualtrain.sweep.reading import read_sweep
from dualtrain.sweep.run import print_results

FIRST = "repetitions=4,alpha=0,seed=0"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    text = FILE.replace("seed: [0, 1, 2]", "seed: 0").replace("[4, 16, 64]", "[4, 16]")
    return make_sweep(tmp_path, text=text)


def refusal(made: Path) -> str:
    with pytest.raises(UserError) as error:
        read_sweep(made)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": [3]}, "points.0: Input should be a valid string"),
        ({"points": ["../elsewhere"]}, "points.0"),
        ({"points": [".."]}, "points.0"),
        ({"points": ["/etc"]}, "points.0"),
        ({"points": [FIRST, FIRST]}, "an entry is there twice"),
        ({"keys": [None]}, "keys.0"),
        ({"keys": 3}, "keys: Input should be a valid array"),
        ({"version": 2}, "version"),
    ],
)
def test_a_list_of_points_that_is_no_list_of_points(made: Path, change: dict, message: str) -> None:
    file = made / "sweep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    said = refusal(made)
    assert said.startswith(f"{file}: is damaged: ") and message in said and "remove the" in said


def test_points_of_an_earlier_order_of_the_data_are_not_added_to(made: Path) -> None:
    file, sweep = made / "sweep.json", load_sweep(str(made.parent / "sweep.yaml"), directory=made)
    content = json.loads(file.read_text())
    assert check(sweep).points == content["points"]
    del content["data_order"]
    file.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="an earlier version trained, which read the text in another"
    ):
        prepare(sweep)
    read_sweep(made)  # to look at them is another matter


def test_a_list_of_points_that_was_removed_is_written_again(made: Path) -> None:
    file = made / "sweep.json"
    before = json.loads(file.read_text())
    file.write_text(file.read_text()[:40])
    assert "is damaged" in refusal(made)
    file.unlink()
    # What a job that was killed while it wrote the list leaves is no reason to refuse.
    (made / "sweep.json.123.new").write_text("")
    prepare(load_sweep(str(made.parent / "sweep.yaml"), directory=made))
    assert json.loads(file.read_text()) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "eval"}', "`step` is missing"),
        ('{"kind": "eval", "step": "40"}', "`step` is '40'"),
        ('{"kind": "eval", "step": 40, "ar_nll": "3"}', "`ar_nll` is '3'"),
        ('{"kind": "train", "step": 40}', "`steps` is missing"),
        ('{"kind": "train", "step": NaN}', "`step` is nan"),
        ('{"kind": "tasks", "step": 40}', "`mode` or `tasks` is missing"),
        ('{"kind": "tasks", "step": 40, "mode": "ar", "tasks": {"blimp": 1}}', "a score is"),
        ('{"kind": "eval", "step": 40, "ar_nll": true}', "`ar_nll` is true"),
    ],
)
def test_records_that_lack_something_are_named_with_their_line(
    made: Path, line: str, message: str
) -> None:
    file = made / FIRST / "metrics.jsonl"
    with file.open("a") as stream:
        stream.write(line + "\n")
    assert f"{file}:5: is a damaged record: {message}" in refusal(made)


def test_a_number_that_no_float_holds_is_not_finite(made: Path) -> None:
    with (made / FIRST / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "eval", "step": 40, "ar_nll": 1' + 400 * "0" + "}\n")
    with pytest.raises(UserError, match="ar_nll is not there, or not finite, in repetitions=4"):
        fit_sweep(FitOptions(directory=made, no_figures=True))


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"tasks": {"blimp": {}}}', '{"tasks": {}, "average": {"ar": {"value": "x"}}}'],
)
def test_results_of_an_evaluation_of_another_shape(made: Path, content: str) -> None:
    file = made / FIRST / "eval" / "step-40" / "results.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert f"{file}: cannot be read as results of an evaluation" in refusal(made)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("alpha: [", ":1: not valid YAML"),
        ("alpha: 1\nsteps: x\n", ":2: steps: 'x' is text"),
        ("[]", ":1: holds a list"),
    ],
)
def test_a_recipe_that_is_none_is_named_with_line_and_key(
    made: Path, content: str, message: str
) -> None:
    file = made / FIRST / "recipe.yaml"
    file.write_text(content)
    assert f"{file}{message}" in refusal(made)


def test_points_that_are_gone_are_said_in_table_and_fit(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(made / FIRST)
    print_results(made)
    assert f"note: not begun, or gone: {FIRST}" in capsys.readouterr().out
    result = fit_sweep(FitOptions(directory=made, no_figures=True))
    assert f"left out, because they have not begun, or are gone: {FIRST}" in result.notes


def test_a_point_without_its_asked_recipe_still_counts(made: Path) -> None:
    (made / FIRST / "point.yaml").unlink()
    found = read_sweep(made)
    assert len(found.runs) == 12 and not found.absent


def test_a_damaged_recipe_of_a_point_is_named(made: Path) -> None:
    sweep = load_sweep(str(made.parent / "sweep.yaml"), directory=made)
    for content in ("alpha: [", "[]", "\x00"):
        (made / FIRST / "point.yaml").write_text(content)
        with pytest.raises(UserError, match=r"point\.yaml: is damaged .*remove the file"):
            check(sweep)


def test_the_dry_run_refuses_a_directory_that_the_sweep_would(made: Path) -> None:
    def dry_run(directory: Path) -> str:
        command = ["sweep", str(made.parent / "sweep.yaml"), "--dry-run", "--dir", str(directory)]
        return str(CliRunner().invoke(app, command).exception)

    file = made.parent / "sweep.yaml"
    assert f"{file} is a file" in dry_run(file)
    assert f"{file} is a file" in dry_run(file / "below")
    assert "/proc/x: cannot be written to: " in dry_run(Path("/proc/x"))
    assert "File name too long" in dry_run(made.parent / "new" / (300 * "x"))
    assert "is not empty and has no sweep.json" in dry_run(made.parent)
    changed = file.read_text().replace("steps: 40", "steps: 80")
    file.write_text(changed)
    assert "steps 40 then, 80 now" in dry_run(made)
    assert not (made.parent / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.build={source: nowhere.txt}", "nowhere.txt"),
        ("algorithms=[{use: nope}]", "no algorithm `nope`"),
        ("steps=40", "there is no dataset"),
    ],
)
def test_a_sweep_that_is_refused_leaves_nothing(made: Path, change: str, message: str) -> None:
    new = made.parent / "new"
    command = ["sweep", str(made.parent / "sweep.yaml"), change, "--dir", str(new / "x")]
    found = CliRunner().invoke(app, command)
    assert message in str(found.exception) and not new.exists()
    dry = CliRunner().invoke(app, [*command, "--dry-run"])
    assert message in f"{dry.exception} {dry.output}" and not new.exists()


def test_asking_whether_a_point_is_busy_leaves_nothing(made: Path) -> None:
    assert not is_busy(made / FIRST) and not is_busy(made / "nowhere") and not is_busy(made.parent)
    assert not list(made.rglob(".lock"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"state": "lost", "exit_code": 0}'])
def test_a_point_with_a_damaged_outcome_is_still_to_be_run(made: Path, content: str) -> None:
    assert read_outcome(made / FIRST) is not None
    (made / FIRST / "outcome.json").write_text(content)
    assert read_outcome(made / FIRST) is None
