"""Finding, choosing, refusing and removing checkpoints; test_runs saves real ones."""

import json

import pytest
import yaml

from dualtrain.checkpoint import (
    MARKER,
    check_compatible,
    checkpoint_path,
    choose_resume,
    find_checkpoints,
    is_whole,
    read_state,
    recipe_differences,
    remove,
    retain,
)
from dualtrain.errors import UserError


def make(run_dir, step, *, recipe="a: 1\n", **state):
    """A checkpoint of the layout that `save` writes, without an engine."""
    path = checkpoint_path(run_dir, step)
    (path / "deepspeed").mkdir(parents=True)
    (path / "deepspeed" / "part.pt").write_bytes(b"x" * 100)
    (path / "recipe.yaml").write_text(recipe)
    facts = {"step": step, "world_size": 2, "zero_stage": 1, "fingerprint": "f"} | state
    (path / "state.json").write_text(json.dumps(facts))
    files = [file for file in path.rglob("*") if file.is_file()]
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in files}
    (path / MARKER).write_text(json.dumps({"sizes": sizes}))
    return path


def test_newest_whole_checkpoint_counts_by_number_not_by_name(tmp_path):
    for step in (99_999_999, 5, 100_000_000):
        make(tmp_path, step)
    (checkpoint_path(tmp_path, 100_000_000) / MARKER).unlink()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000005", "step-99999999"]
    assert choose_resume("auto", tmp_path).path == checkpoint_path(tmp_path, 99_999_999)


@pytest.mark.parametrize("damage", ["truncate", "remove", "marker", "empty"])
def test_damaged_checkpoint_does_not_count(tmp_path, damage):
    path = make(tmp_path, 7)
    assert is_whole(path)
    if damage == "truncate":
        (path / "deepspeed" / "part.pt").write_bytes(b"x" * 99)
    elif damage == "remove":
        (path / "state.json").unlink()
    else:
        (path / MARKER).write_text("{" if damage == "marker" else '{"sizes": {}}')
    assert not is_whole(path)
    assert choose_resume("auto", tmp_path).kind == "fresh"
    with pytest.raises(UserError, match="no whole checkpoint"):
        choose_resume("must", tmp_path)
    with pytest.raises(
        UserError, match="part.pt has 99 bytes, expected 100|missing|cannot be read|not list"
    ):
        choose_resume(str(path), tmp_path)


def test_two_runs_are_never_mixed_in_one_directory(tmp_path):
    older = make(tmp_path, 7)
    make(tmp_path, 9)
    for resume in ("never", str(older), f"weights:{older}"):
        with pytest.raises(UserError, match="has checkpoints up to step-00000009"):
            choose_resume(resume, tmp_path)
    assert choose_resume("never", tmp_path / "new").kind == "fresh"


def test_a_run_begun_from_elsewhere_continues_its_own_checkpoint(tmp_path):
    elsewhere, own = make(tmp_path / "a", 7), make(tmp_path / "b", 2)
    for resume in (str(elsewhere), f"weights:{elsewhere}"):
        chosen = choose_resume(resume, tmp_path / "b")
        assert (chosen.kind, chosen.path) == ("full", own)


def test_a_path_may_be_a_checkpoint_or_a_run(tmp_path):
    path = make(tmp_path, 7)
    assert choose_resume(str(path), tmp_path / "other").path == path
    chosen = choose_resume(f"weights:{tmp_path}", tmp_path / "other")
    assert (chosen.kind, chosen.path) == ("weights", path)


def test_damaged_state_is_named(tmp_path):
    path = make(tmp_path, 7)
    (path / "state.json").write_text("?")
    with pytest.raises(UserError, match="state.json: is damaged"):
        read_state(path)


def test_retention_keeps_the_newest_and_never_fewer_than_two(tmp_path):
    paths = [make(tmp_path, step) for step in (1, 2, 3, 4)]
    assert retain(tmp_path, None) == []
    assert retain(tmp_path, 3) == paths[:1]
    assert retain(tmp_path, 1) == paths[1:2]
    assert find_checkpoints(tmp_path) == paths[2:]


def test_removal_takes_the_marker_first(tmp_path, monkeypatch):
    path = make(tmp_path, 1)
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda p: seen.append(is_whole(p)))
    remove(path)
    assert seen == [False]


def test_differences_name_both_values_and_ignore_what_may_change():
    old = {"seed": 1, "optim": {"lr": 0.1, "name": "muon"}, "progress": {"interval_steps": 1}}
    new = {"seed": 1, "optim": {"lr": 0.2, "name": "muon"}, "progress": {"interval_steps": 9}}
    assert recipe_differences(yaml.safe_dump(old), yaml.safe_dump(new)) == [("optim.lr", 0.1, 0.2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe_text": "a: 2\n"}, "a: checkpoint 1, recipe 2"),
        ({"world_size": 4}, "saved by 2 ranks at ZeRO stage 1, now 4 at stage 1"),
        ({"zero_stage": 3}, "now 2 at stage 3"),
        ({"fingerprint": "g"}, "the dataset has changed"),
    ],
)
def test_what_would_not_continue_exactly_is_refused(tmp_path, change, message):
    path = make(tmp_path, 3)
    same = {"recipe_text": "a: 1\n", "world_size": 2, "zero_stage": 1, "fingerprint": "f"}
    check_compatible(path, **same)
    with pytest.raises(UserError, match=message):
        check_compatible(path, **(same | change))
