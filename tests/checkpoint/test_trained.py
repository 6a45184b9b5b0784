"""Tests of: dualtrain.checkpoint.trained.

Opening what a user names: runs, checkpoints and exports, whole and damaged.
"""

import json
import shutil

import pytest
import torch
from helpers.runs import tiny_loader, train_on

from dualtrain.checkpoint import store as checkpoint
from dualtrain.checkpoint.trained import find_source, open_trained
from dualtrain.common.errors import UserError


@pytest.fixture(scope="module")
def run_dir(tiny_dataset, tmp_path_factory):
    """A finished tiny run with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    dataset = shutil.copytree(tiny_dataset, folder / "dataset")
    recipe = tiny_loader(dataset, folder)("checkpoint.interval_steps=4", "sample.tokens=0")
    assert train_on(1, folder, recipe) == [0]
    return recipe.recipe.directory


@pytest.fixture
def copy(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / "run")


def logits(model):
    with model.inference():
        return model(torch.tensor([[1, 20, 30, 40]])).logits


def test_a_run_means_its_newest_checkpoint(run_dir):
    model = open_trained(run_dir)
    assert model.source.path == checkpoint.checkpoint_path(run_dir, 8)
    assert model.source.name == "tiny at step 8"
    assert (model.context, model.target, model.vocabulary.mask_id) == (32, "next", 4)
    assert model.decode(model.encode("A list of <mask> things")) == "A list of <mask> things"
    assert not model.model.training
    earlier = open_trained(run_dir, step=4)
    assert earlier.source.facts["step"] == 4
    assert not torch.equal(logits(model), logits(earlier))
    assert torch.equal(logits(earlier), logits(open_trained(earlier.source.path)))


def test_neither_dataset_nor_optimizer_is_needed(copy, run_dir):
    expected = logits(open_trained(run_dir))
    shutil.rmtree(copy / "step-00000008" / "deepspeed")
    dataset = run_dir.parent / "dataset"
    dataset.rename(dataset.with_name("elsewhere"))
    try:
        model = open_trained(copy)
    finally:
        dataset.with_name("elsewhere").rename(dataset)
    assert torch.equal(logits(model), expected)
    assert model.encode("text") == open_trained(run_dir).encode("text")


def test_a_checkpoint_from_before_it_held_its_tokenizer(copy, run_dir):
    path = copy / "step-00000008"
    marker = json.loads((path / "complete.json").read_text())
    for name in ("config.json", "tokenizer.json", "dataset.json"):
        (path / name).unlink()
        del marker["files"][name]
    (path / "complete.json").write_text(json.dumps(marker))
    model = open_trained(path)
    assert torch.equal(logits(model), logits(open_trained(run_dir)))
    assert model.encode("text") == open_trained(run_dir).encode("text")


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(copy):
    file = copy / "step-00000008" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    notes = []
    assert open_trained(copy, on_note=notes.append).source.facts["step"] == 4
    assert len(notes) == 1 and "step-00000008 is damaged and passed over: weights" in notes[0]
    with pytest.raises(UserError, match="step-00000008: is not a whole checkpoint: weights.safe"):
        open_trained(file.parent)
    (copy / "step-00000004" / "weights.safetensors").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged.*weights.safetensors is miss"):
        open_trained(copy)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist"),
        ("file", "is a file"),
        ("empty", "has neither checkpoints nor an exported model"),
        ("unfinished", "no whole checkpoint, only the unfinished step-00000004.partial"),
        ("unfinished/step-00000004.partial", "is not a whole checkpoint: no complete.json"),
    ],
)
def test_what_is_no_model(tmp_path, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "step-00000004.partial").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        find_source(tmp_path / name)


def test_steps_and_devices_that_do_not_exist(run_dir):
    with pytest.raises(UserError, match="no checkpoint of step 5 — expected one of 4, 8"):
        find_source(run_dir, step=5)
    with pytest.raises(UserError, match="is a checkpoint already"):
        find_source(run_dir / "step-00000004", step=4)
    with pytest.raises(UserError, match="--device: 'warp' cannot be used"):
        open_trained(run_dir, device="warp")
