"""Tests of: dualtrain.cli, terminal, launch, run_directory, start: what surrounds a command."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.ranks import environment
from helpers.runs import command, said

from dualtrain.common import locks
from dualtrain.common.errors import UserError
from dualtrain.common.files import file_problem, user_path, write_json
from dualtrain.launch.ranks import own_command
from dualtrain.launch.world import (
    current_world,
    free_port,
)
from dualtrain.recipe.load import load_recipe
from dualtrain.training.prepare import lock_run_directory, own_places, prepare_run_directory

LONG = "It was a dark night, and " * 20
LOOKED_UP = (["generate", LONG], ["eval", LONG], ["fit", LONG], ["run", LONG])


@pytest.mark.parametrize("arguments", [*LOOKED_UP, ["sweep", LONG], ["export", LONG, "--to", "x"]])
def test_paths_that_are_too_long_are_named_in_every_command(monkeypatch, capsys, arguments):
    code, error = said(monkeypatch, capsys, *arguments)
    assert code == 2 and error.count("\n") == 1
    assert error.startswith(f"error: {LONG[:40]}") and "File name too long" in error


def test_long_paths_of_a_recipe_are_named(monkeypatch, capsys, tiny, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = command(tiny())[3]
    for change in (f"run_dir={LONG}", f"data.path={LONG}", f"engine.deepspeed={LONG}"):
        code, error = said(monkeypatch, capsys, "run", recipe, change, "--dry-run")
        assert code == 2 and error.count("\n") == 1 and "File name too long" in error


def test_errors_of_the_system_that_name_no_file_are_no_ones_mistake():
    assert file_problem(OSError("a library's own words")) is None
    assert file_problem(ConnectionError(errno.ECONNREFUSED, "refused")) is None
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "No space left on device (make room" in str(file_problem(full))


def test_a_home_directory_may_be_written_as_a_tilde(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("run_dir", "data.path", "data.build.tokenizer", "eval.tasks_dir", "engine.deepspeed")
    changes = [f"{key}=~/x" for key in keys]
    changes += ["data.build.source=[~/x, b]", "checkpoint.resume=weights:~/x"]
    text = load_recipe("quickstart", changes).text
    assert "~" not in text and text.count(f"{tmp_path}/x") == len(changes)
    with pytest.raises(UserError, match="~nobody-of-this-name/x: is no path: there is no such"):
        user_path("~nobody-of-this-name/x")
    code, error = said(monkeypatch, capsys, "fit", "~/none", "--out=~/out")
    assert code == 2 and str(tmp_path / "none") in error


@pytest.mark.parametrize(("value", "what"), [("''", "it is empty"), ('"a\\0b"', "NUL character")])
def test_a_path_that_is_none_is_refused(value, what):
    for key in ("run_dir", "data.path", "data.build.source", "eval.tasks_dir"):
        with pytest.raises(UserError, match=what):
            load_recipe("quickstart", [f"{key}={value}"])


def test_names_that_are_not_utf_8_are_shown(tmp_path):
    name = os.fsencode(tmp_path) + b"/na\xefve.yaml"
    for stream in ("utf-8:strict", "ascii:strict"):
        env = {**environment(), "PYTHONIOENCODING": stream}
        arguments = [*map(os.fsencode, own_command(["run"])), name]
        finished = subprocess.run(arguments, env=env, capture_output=True, text=True)
        assert finished.returncode == 2, finished.stderr
        assert "na\\udcefve.yaml: no such file" in finished.stderr


def test_closed_input_and_modules_in_the_current_directory_change_nothing(tiny, tmp_path):
    """Of a script's own `random.py` libraries know nothing, in the ranks neither."""
    shadows = tmp_path / "shadows"
    shadows.mkdir()
    for name in ("random", "types", "logging", "socket", "errors"):
        (shadows / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    recipe = command(tiny("steps=2", "eval.sequences=1", "sample.tokens=0", "sample.infill=''"))[3]
    start = "import sys, dualtrain.cli; sys.argv[0] = 'dualtrain'; dualtrain.cli.main()"
    script = tmp_path / "start.py"
    script.write_text(start)
    line = f'"{sys.executable}" {script} run {recipe} --plain --ranks 2 <&-'
    finished = subprocess.run(
        ["bash", "-c", line], cwd=shadows, env=environment(), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    finished = subprocess.run(
        own_command(["recipes"]), cwd=shadows, env=environment(), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_a_current_directory_that_is_gone_is_said(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    line = f'cd {gone} && rmdir {gone} && "{sys.executable}" -m dualtrain run quickstart'
    finished = subprocess.run(
        ["bash", "-c", line], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: current directory: cannot be found")


def test_a_machine_without_loopback_is_named_at_once(monkeypatch):
    """As where a container was given no network: an address can be had, and reaches nobody."""

    def refuse(address: object, timeout: float) -> None:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(UserError, match="127.0.0.1.* cannot be used: Network is unreachable"):
        free_port()


RANKS = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
STEP = {
    "SLURM_PROCID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "2",
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"RANK": "x"}, "RANK: 'x' — expected a number from 0 to 1"),
        ({"RANK": "3"}, "RANK: '3' — expected a number from 0 to 1"),
        ({"RANK": "-1"}, "RANK: '-1'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: '9"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK: '2'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE: '0'"),
        ({"MASTER_PORT": "port"}, "MASTER_PORT: 'port' — expected a number from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: '70000'"),
        ({"MASTER_ADDR": ""}, "environment: MASTER_ADDR not set"),
    ],
)
def test_what_a_launcher_says_is_checked_before_ranks_wait_for_each_other(change, expected):
    with pytest.raises(UserError) as caught:
        current_world({**RANKS, **change})
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_PROCID": "2"},
        {"SLURM_LOCALID": ""},
        {"SLURM_STEP_NUM_TASKS": "", "SLURM_NTASKS": ""},
        {"SLURM_NODEID": "4"},
        {"SLURM_JOB_ID": "x"},
        {"SLURM_TASKS_PER_NODE": "many"},
        {"SLURM_JOB_NODELIST": "[]"},
    ],
)
def test_what_slurm_says_is_checked(change):
    with pytest.raises(UserError, match="SLURM_"):
        current_world({**STEP, **change})


def test_a_step_of_one_task_is_no_launcher():
    """There `--ranks 2` starts two, and points of a sweep do not share a port."""
    assert current_world({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert current_world(dict(STEP)) is not None


def test_file_systems_without_locks_are_named(monkeypatch, tmp_path):
    """As flock answers on Lustre that is mounted without it."""

    def refuse(descriptor: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    recipe = load_recipe("quickstart", [f"run_dir={tmp_path}"]).recipe
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="without locks") as caught:
        lock_run_directory(recipe)
    assert str(caught.value).startswith(str(tmp_path))
    with pytest.raises(UserError, match="without locks"), locks.locked(tmp_path / "lock"):
        pass


@contextmanager
def no_room():
    """A limit on the size of files stands for the full disk; pytest's own output meets it, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_at_the_start_is_said(tmp_path):
    recipe = load_recipe("quickstart", [f"run_dir={tmp_path / 'run'}"]).recipe
    with no_room():
        with pytest.raises(UserError, match=r"run_dir: cannot write to .*: File too large"):
            prepare_run_directory(recipe)
        assert list((tmp_path / "run").iterdir()) == []
        lock_run_directory(recipe).close()  # who has it is told to others where there is room


def test_a_whole_file_that_finds_no_room(tmp_path):
    message = "x.json: cannot be written: File too large .make room"
    with no_room(), pytest.raises(UserError, match=message):
        write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def own_recipe(folder: Path, text: str) -> Path:
    """The recipe.yaml of a run in folder/runs/a."""
    run_dir = folder / "runs" / "a"
    run_dir.mkdir(parents=True)
    (run_dir / ".lock").touch()
    (run_dir / "recipe.yaml").write_text(text)
    return run_dir / "recipe.yaml"


def test_a_runs_own_recipe_means_that_run_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = load_recipe("quickstart", ["name=a"]).text
    file = own_recipe(tmp_path, text)

    def meant(file: str, *overrides: str):
        recipe = load_recipe(file, [*own_places(file, overrides), *overrides]).recipe
        return recipe.directory.resolve(), Path(recipe.data.path).resolve()

    run_dir, data = tmp_path / "runs" / "a", tmp_path / "data" / "python-docs"
    assert own_places("runs/a/recipe.yaml", []) == []  # it does by itself
    monkeypatch.chdir(run_dir)
    assert meant("recipe.yaml") == (run_dir, data)
    assert meant("recipe.yaml", "name=b") == (run_dir / "runs" / "b", data)
    assert meant("recipe.yaml", "data.path=here") == (run_dir, run_dir / "here")
    (run_dir / "step-00000008").mkdir()
    (run_dir / "step-00000008" / "complete.json").touch()
    shutil.copy(file, run_dir / "step-00000008")
    assert meant("step-00000008/recipe.yaml") == (run_dir, data)
    monkeypatch.chdir(tmp_path)
    run_dir.rename(tmp_path / "moved")
    assert meant("moved/recipe.yaml") == (tmp_path / "moved", data)
    assert meant("moved/recipe.yaml", "run_dir=null")[0] == run_dir
    (tmp_path / "recipe.yaml").write_text(text)  # of nobody's
    assert own_places("recipe.yaml", []) == []


def test_a_dry_run_refuses_what_the_run_refuses(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = command(tiny("steps=1"))[3]
    (tmp_path / "file").touch()
    (tmp_path / "hosts").write_text("a slots=3\n")
    (tmp_path / "run" / "step-00000001").mkdir(parents=True)
    cases = {
        "run_dir=file/run": "file is a file",
        "sequence_length=100000 steps=null repetitions=1": "the held-out split has",
        "data.path=none data.build={source: nothing-here}": "there is no such file",
        "--hostfile hosts": "3 ranks cannot share",
        "": "every checkpoint of this run is damaged",
        "checkpoint.resume=never": "with which the new run's would be mixed",
    }
    for changes, message in cases.items():
        more = changes.replace("{source: ", "{source:_").split()
        more = [change.replace("{source:_", "{source: ") for change in more]
        code, error = said(monkeypatch, capsys, "run", recipe, *more, "--dry-run")
        assert code == 2 and message in error, (changes, error)
    assert sorted(os.listdir(tmp_path / "run")) == ["step-00000001"]


def test_memory_that_no_machine_has_is_refused_before_the_dataset_is_made(
    tmp_path, monkeypatch, capsys
):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(load_recipe("quickstart", ["model.vocab_size=16777216"]).text)
    change = ["model.width=1048576", "model.heads=2", f"data.path={tmp_path / 'data'}"]
    change.append(f"run_dir={tmp_path / 'run'}")
    code, error = said(monkeypatch, capsys, "run", str(recipe), *change)
    assert code == 2 and error.startswith("error: model: of ")
    assert "this machine has" in error or "a GPU here has" in error
    assert not (tmp_path / "data").exists()
