"""Tests of: dualtrain.checkpoint.files, resume, store.

Finding, choosing, refusing and removing checkpoints; test_resume saves real ones.
"""

import json
import os
import resource
import sys
from types import ModuleType

import pytest
import torch

from dualtrain.checkpoint.files import MARKER, Files, find_defects, write_marker
from dualtrain.checkpoint.resume import (
    MAY_CHANGE,
    Resume,
    check_compatible,
    choose_resume,
    describe_change,
    share_rank_states,
)
from dualtrain.checkpoint.store import (
    checkpoint_path,
    find_checkpoints,
    is_whole,
    load_rank_states,
    read_state,
    remove,
    remove_unfinished,
    retain,
)
from dualtrain.common.errors import UserError
from dualtrain.data.plan import DATA_ORDER
from dualtrain.engine.optimizer_state import Piece
from dualtrain.launch.world import single_world
from dualtrain.recipe.differences import recipe_differences


def make(run_dir, step, *, recipe="a: 1\n", **state):
    """A checkpoint of the layout that `save` writes, without an engine."""
    path = checkpoint_path(run_dir, step)
    (path / "deepspeed").mkdir(parents=True)
    files = Files(path)
    facts = {"step": step, "world_size": 2, "zero_stage": 1, "fingerprint": "f"}
    facts |= {"data_order": DATA_ORDER} | state
    files.torch_save(torch.arange(20), path / "deepspeed" / "part.pt")
    files.text(recipe, path / "recipe.yaml")
    files.text(json.dumps(facts), path / "state.json")
    files.text("weights", path / "weights.safetensors")
    assert files.error is None
    write_marker(path, files.facts)
    return path


def test_newest_whole_checkpoint_counts_by_number_not_by_name(tmp_path):
    for step in (99_999_999, 5, 100_000_000):
        make(tmp_path, step)
    (checkpoint_path(tmp_path, 100_000_000) / MARKER).unlink()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000005", "step-99999999"]
    assert choose_resume("auto", tmp_path).path == checkpoint_path(tmp_path, 99_999_999)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", r"deepspeed/part.pt has 99 bytes, expected \d+"),
        ("remove", "state.json is missing"),
        ("marker", "complete.json cannot be read"),
        ("empty", "does not list the files of a checkpoint"),
        ("old", "another version .format 1, not 2."),
    ],
)
def test_damage_that_sizes_show(tmp_path, damage, message):
    older, path = make(tmp_path, 5), make(tmp_path, 7)
    assert is_whole(path)
    if damage == "truncate":
        os.truncate(path / "deepspeed" / "part.pt", 99)
    elif damage == "remove":
        (path / "state.json").unlink()
    else:
        markers = {"marker": "{", "empty": '{"format": 2, "files": {}}', "old": '{"format": 1}'}
        (path / MARKER).write_text(markers[damage])
    assert not is_whole(path)
    chosen = choose_resume("auto", tmp_path)
    assert (chosen.kind, chosen.path) == ("full", older)
    assert len(chosen.notes) == 1 and "step-00000007 is damaged and passed over" in chosen.notes[0]
    with pytest.raises(UserError, match=f"{message}.*resume=auto goes back to step-00000005"):
        choose_resume("must", tmp_path)
    with pytest.raises(UserError, match=message):
        choose_resume(str(path), tmp_path / "other")


def test_nothing_begins_anew_beside_checkpoints_that_are_all_damaged(tmp_path):
    path = make(tmp_path, 7)
    (path / "state.json").unlink()
    with pytest.raises(UserError, match="every checkpoint of this run is damaged: step-00000007"):
        choose_resume("auto", tmp_path)
    (path / MARKER).unlink()
    with pytest.raises(UserError, match="is damaged: step-00000007: no complete.json"):
        choose_resume("auto", tmp_path)
    with pytest.raises(UserError, match="no complete.json"):
        choose_resume("must", tmp_path)
    # What is left of a removal or a save that was interrupted has another name.
    path.rename(tmp_path / "step-00000007.partial")
    assert choose_resume("auto", tmp_path).kind == "fresh"


def test_altered_bits_are_found_by_whoever_shares_the_files(tmp_path):
    path = make(tmp_path, 7)
    file = path / "deepspeed" / "part.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert find_defects(path) == []
    for readers in (1, 2, 3, 9):
        found = [find_defects(path, share=(index, readers)) for index in range(readers)]
        assert sum(found, []) == ["deepspeed/part.pt is not as it was saved (its hash differs)"]


def test_a_full_disk_is_noted_and_nothing_more_is_written(tmp_path):
    files = Files(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        files.torch_save(torch.zeros(100_000), tmp_path / "large.pt")
        assert files.error is not None and "File too large" in files.error
        files.text("small", tmp_path / "small.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files.facts == {} and not (tmp_path / "small.txt").exists()


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
    assert retain(tmp_path, 3) == [] and find_checkpoints(tmp_path) == paths[1:]
    assert retain(tmp_path, 1) == []
    assert find_checkpoints(tmp_path) == paths[2:]
    paths += [make(tmp_path, step) for step in (5, 6)]
    assert retain(tmp_path, 2, besides={3}) == []
    assert find_checkpoints(tmp_path) == [paths[2], *paths[4:]]


def test_what_is_removed_never_counts_and_leftovers_go(tmp_path, monkeypatch):
    path, other = make(tmp_path, 1), make(tmp_path, 2)
    monkeypatch.setattr("shutil.rmtree", lambda *arguments, **options: None)  # killed in between
    remove(path)
    assert find_checkpoints(tmp_path) == [other]
    assert (tmp_path / "step-00000001.partial").is_dir()
    monkeypatch.undo()
    remove_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == [other]


def test_differences_name_both_values_and_ignore_what_may_change():
    old = {"seed": 1, "optim": {"lr": 0.1, "name": "muon"}, "progress": {"interval_steps": 1}}
    new = {"seed": 1, "optim": {"lr": 0.2, "name": "muon"}, "progress": {"interval_steps": 9}}
    assert recipe_differences(old, new, MAY_CHANGE) == [("optim.lr", 0.1, 0.2)]
    old, new = {"rate": None}, {"rate": {"start": 0.3}}
    assert recipe_differences(old, new, ["rate.start"]) == []


def test_another_recipe_or_dataset_is_refused_and_other_ranks_are_said(tmp_path):
    path = make(tmp_path, 3)
    same = {"recipe_text": "a: 1\n", "fingerprint": "f"}
    check_compatible(Resume("full", path), **same)
    with pytest.raises(UserError, match="a: checkpoint 1, recipe 2"):
        check_compatible(Resume("full", path), **(same | {"recipe_text": "a: 2\n"}))
    with pytest.raises(UserError, match="the dataset has changed"):
        check_compatible(Resume("branch", path), **(same | {"fingerprint": "g"}))
    earlier = make(tmp_path, 4, data_order=None)
    for kind in ("full", "branch"):
        with pytest.raises(
            UserError, match="earlier version, which read the text in another order"
        ):
            check_compatible(Resume(kind, earlier), **(same | {"recipe_text": "a: 2\n"}))
    assert describe_change(path, world_size=2, zero_stage=1) is None
    said = describe_change(path, world_size=4, zero_stage=3)
    assert said is not None and "by 2 ranks at ZeRO stage 1, now 4 at stage 3" in said


def test_rank_states_are_shared_only_where_they_are_the_same():
    meter = {"sums": [1.0, 2.0, 3.0, 4.0, 0.5, 9.0], "slots": [1, 2], "tokens": [8, 16]}
    meter |= {"updates": 3, "logged": {"x": (2.0, 4)}, "seconds": 1.5}
    kept = {"one": {"a": [torch.ones(2)], "b": 1}}
    states = [{"algorithms": kept, "meter": meter, "more": 7, "random": rank} for rank in (0, 1)]
    first, second = (share_rank_states(states, rank) for rank in (0, 1))
    assert first["meter"]["sums"] == [2.0, 4.0, 6.0, 8.0, 1.0, 9.0]
    assert first["meter"]["logged"] == {"x": (4.0, 8)} and first["meter"]["slots"] == [2, 4]
    # The norm is the same on every rank, which all go on with.
    assert second["meter"]["sums"] == [0.0, 0.0, 0.0, 0.0, 0.0, 9.0]
    assert second["meter"]["updates"] == 3 and second["meter"]["slots"] == [0, 0]
    assert second["more"] == 7 and second["random"] == 1
    assert share_rank_states(states, 2)["random"] is None
    states[1] = {"algorithms": {"one": {"a": [torch.zeros(2)], "b": 1}}, "meter": meter}
    with pytest.raises(UserError, match="one has a state of its own on each of the 2 ranks"):
        share_rank_states(states, 0)


def test_classes_that_have_moved_are_found_in_older_checkpoints(tmp_path, monkeypatch):
    former = ModuleType("dualtrain.optimizer_state")
    former.Piece = Piece
    piece = Piece("weight", "exp_avg", start=0, count=2, tensor=0, offset=0)
    path = make(tmp_path, 3, world_size=1)
    with monkeypatch.context() as then:
        then.setitem(sys.modules, former.__name__, former)
        then.setattr(Piece, "__module__", former.__name__)
        torch.save({"pieces": {"file": [piece]}}, path / "rank-00000.pt")
    assert b"dualtrain.optimizer_state" in (path / "rank-00000.pt").read_bytes()
    assert load_rank_states(path, single_world()) == [{"pieces": {"file": [piece]}}]
