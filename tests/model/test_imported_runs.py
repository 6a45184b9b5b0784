"""Tests of: dualtrain.model.imported: real training, stages, ranks, resuming, opening."""

from __future__ import annotations

import pytest
import torch
from helpers.imported import config_of, loader
from helpers.runs import records, results, rewind, train_on
from safetensors.torch import load_file

from dualtrain.checkpoint.trained import open_trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory, published):
    """Six steps on two ranks: at stage 3, again from its middle, at stage 1, and from scratch."""
    folder = tmp_path_factory.mktemp("runs")
    load = loader(folder, published[0], published[2])
    whole = load("engine.deepspeed=zero3", "checkpoint.interval_steps=3", name="whole")
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(config_of("llama").to_json_string())
    llama = f"model.hf={folder / 'llama'}", "model.hf_init=scratch"
    scratch = *llama, "model.activation_checkpointing=true"
    first = train_on(2, folder, whole, load("engine.deepspeed=zero3", *scratch, name="scratch-3"))
    before = results(whole)
    weights = load_file(whole.recipe.directory / "step-00000006/weights.safetensors")
    rewind(whole, 3)
    one, other = load(name="stage-1"), load("engine.deepspeed=zero0", *scratch, name="scratch-0")
    second = train_on(2, folder, whole, one, other)
    assert [*first, *second] == [0] * 5
    return {
        "whole": whole,
        "before": before,
        "weights": weights,
        "stage-1": one,
        "scratch-3": load(name="scratch-3"),
        "scratch-0": other,
    }


def test_a_resumed_run_ends_bit_for_bit_as_an_unbroken_one(runs):
    whole = runs["whole"]
    assert results(whole) == runs["before"]
    again = load_file(whole.recipe.directory / "step-00000006/weights.safetensors")
    assert again.keys() == runs["weights"].keys()
    assert all(torch.equal(again[name], value) for name, value in runs["weights"].items())


@pytest.mark.parametrize(("one", "other"), [("whole", "stage-1"), ("scratch-3", "scratch-0")])
def test_stages_train_the_same_model(runs, one, other):
    first, second = records(runs[one]), records(runs[other])
    assert len(first) == 6
    for key in ("ar_loss", "diffusion_loss"):
        # float32 sums in different orders, through the updates before.
        expected = pytest.approx([record[key] for record in second], rel=2e-4)
        assert [record[key] for record in first] == expected


def test_a_checkpoint_needs_nothing_beside_it(runs, published):
    directory = runs["whole"].recipe.directory
    trained = open_trained(directory)
    state = dict(trained.model.named_parameters())
    assert state.keys() == dict(published[1].named_parameters()).keys()
    assert all(torch.equal(state[name], value) for name, value in runs["weights"].items())
    assert trained.vocabulary.mask_id == 302 and trained.model.config.mask_token_id == 302
    ids = torch.tensor([[trained.vocabulary.bos_id, *trained.encode("A list of words.")]])
    with trained.inference():
        assert trained(ids).logits.isfinite().all()
