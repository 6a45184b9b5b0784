"""Tests of: dualtrain.export.export: a model from Hugging Face leaves as what it was."""

import json
import shutil

import pytest
import torch
from helpers.imported import imported_model, loader, stock_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualtrain.checkpoint.files import FileFacts, hash_file, read_marker, write_marker
from dualtrain.checkpoint.store import WEIGHTS
from dualtrain.checkpoint.trained import open_trained
from dualtrain.data.dataset import DatasetInfo
from dualtrain.export.command import ExportOptions
from dualtrain.export.export import export_checkpoint
from dualtrain.model.build import build_model
from dualtrain.model.exported import exported_import
from dualtrain.model.imported import ImportedLM
from dualtrain.model.imported_config import FAMILIES

IDS = torch.randint(16, 290, (2, 24), generator=torch.Generator().manual_seed(1))


def test_a_trained_gpt2_is_a_plain_gpt2(cases):
    case = cases["imported"]
    assert "modeling_dualtrain.py" not in case.exported.files
    assert case.exported.lines()[-1].endswith(f'from_pretrained("{case.directory}")')
    model = AutoModelForCausalLM.from_pretrained(case.directory).eval()
    assert type(model).__name__ == case.exported.architecture == "GPT2LMHeadModel"
    with torch.no_grad():
        assert (model(IDS).logits - case.logits(IDS)).abs().max() < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(case.directory)
    vocabulary = case.trained.vocabulary
    assert tokenizer.mask_token_id == vocabulary.mask_id > 299
    assert tokenizer("A text")["input_ids"] == [vocabulary.bos_id, *case.trained.encode("A text")]
    text = model.generate(**tokenizer("A text", return_tensors="pt"), max_new_tokens=5)
    assert text.shape[1] > 3 and vocabulary.mask_id not in text
    card = (case.directory / "README.md").read_text()
    assert "--mode prefix" in card and "trust_remote_code" not in card


def test_dualtrain_opens_it_with_all_its_modes(cases):
    case = cases["imported"]
    opened = open_trained(case.directory, device="cpu")
    with torch.no_grad():
        assert torch.equal(opened.model(IDS).logits, case.logits(IDS))
    assert opened.vocabulary == case.trained.vocabulary and opened.target == case.trained.target


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(cases, tmp_path, family, tied):
    model = imported_model(stock_model(family, vocab_size=512, tie_word_embeddings=tied))
    checkpoint = tmp_path / "step-00000003"
    shutil.copytree(cases["paper"].run_dir / checkpoint.name, checkpoint)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "mask_token_id": 4}
    model.config.update(ids)
    (checkpoint / "config.json").write_text(model.config.to_json_string())
    save_file(dict(model.named_parameters()), checkpoint / WEIGHTS)
    facts = read_marker(checkpoint)
    for name in (WEIGHTS, "config.json"):
        file = checkpoint / name
        facts[name] = FileFacts(file.stat().st_size, hash_file(file))
    write_marker(checkpoint, facts)
    export_checkpoint(ExportOptions(path=checkpoint, to=tmp_path / "export"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    with torch.no_grad():
        own = model(IDS).logits
        assert (stock(IDS).logits - own).abs().max() < 1e-5
    stock.save_pretrained(tmp_path / "export")
    with torch.no_grad():
        opened = open_trained(tmp_path / "export", device="cpu")
        assert torch.equal(opened.model(IDS).logits, own)


def test_rotary_settings_are_written_for_both_versions():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    llama = exported_import(
        {"model_type": "llama", "rope_parameters": rope, "dtype": "float32"},
        target="in_place",
        append_eos=True,
    )
    assert llama["rope_theta"] == 5e5 and llama["rope_parameters"] == rope
    assert llama["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert "dtype" not in llama
    assert llama["diffusion_target"] == "in_place"
    old = {"model_type": "gpt_neox", "rotary_emb_base": 1e4, "rotary_pct": 0.25}
    neox = exported_import(
        {"model_type": "gpt_neox", "rope_parameters": rope | {"rope_type": "default"}},
        target="next",
        append_eos=True,
    )
    assert neox["rotary_emb_base"] == 5e5 and neox["rotary_pct"] == 0.5
    assert "rope_scaling" not in neox
    assert json.dumps(exported_import(old, target="next", append_eos=True))


def test_an_exported_llama_is_imported_like_any_other(cases, tiny_dataset, tmp_path):
    directory = cases["linear"].directory
    recipe = loader(tmp_path, directory, tiny_dataset)().recipe
    model = build_model(recipe, DatasetInfo.load(tiny_dataset))
    assert isinstance(model, ImportedLM)
    # By these its checkpoints would be opened as models of our own.
    ours = {"auto_map", "head"}
    assert ours <= set(json.loads((directory / "config.json").read_text()))
    assert not ours & set(model.config.to_dict())
    stock = load_file(directory / "model.safetensors")
    assert all(torch.equal(stock[name], p) for name, p in model.named_parameters())
