"""Tests of: dualtrain.model.hugging_face, build: files, tokenizer, new rows, refusals."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.documents import documents
from helpers.imported import convert, loader, publish
from safetensors.torch import load_file, save_file

from data_tools.tokenizers.tokenizer import Tokenizer
from dualtrain.checkpoint.trained import open_trained
from dualtrain.common.errors import UserError, UserErrors
from dualtrain.data.corpus import read_corpus
from dualtrain.data.dataset import DatasetInfo
from dualtrain.derived.derive import derive
from dualtrain.derived.dry_run import derived_rows
from dualtrain.engine.parameters import muon_parameter_names
from dualtrain.model.build import build_model
from dualtrain.model.hugging_face import find_directory, read_hf_config

ADDED = ("<unk>", "<pad>", "<mask>")


@pytest.fixture
def dataset(published) -> Path:
    return published[2]


@pytest.fixture
def recipe(tmp_path, published, dataset):
    """A function from overrides to a recipe that imports the small GPT-2."""
    load = loader(tmp_path, published[0], dataset)
    return lambda *overrides: load(*overrides).recipe


@pytest.fixture
def copied(tmp_path, published) -> Path:
    """A copy of the published directory, to be spoilt."""
    return Path(shutil.copytree(published[0], tmp_path / "copy"))


def test_weights_are_the_published_ones(recipe, dataset, published):
    directory, stock, _ = published
    info = DatasetInfo.load(dataset)
    model = build_model(recipe(), info)
    theirs = dict(stock.named_parameters())
    assert set(dict(model.named_parameters())) == set(theirs)
    rows = stock.config.vocab_size
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter[:rows] if "wte" in name else parameter, theirs[name])
    ids = torch.tensor([[7, 30, 200, 299]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., :rows], stock.eval()(ids).logits)


@pytest.fixture(scope="module")
def all_added(tmp_path_factory, published) -> Path:
    """A dataset as older versions made them: all five special tokens beside the model's own."""
    folder = tmp_path_factory.mktemp("added")
    file = folder / "tokenizer.json"
    Tokenizer.load(published[0] / "tokenizer.json", own_names=True).save(file)
    return convert(folder / "text", documents()[:20], file)


def test_the_models_own_separator_begins_and_ends_documents(recipe, dataset, published):
    info = DatasetInfo.load(dataset)
    assert info.special_tokens == {"<unk>": 300, "<s>": 299, "</s>": 299, "<pad>": 301} | {
        "<mask>": 302
    }
    weight = build_model(recipe(), info).get_input_embeddings().weight
    assert torch.equal(weight[:300], published[1].get_input_embeddings().weight)


def test_new_tokens_have_rows_of_their_own(recipe, all_added, published):
    _, stock, _ = published
    info, rows = DatasetInfo.load(all_added), stock.config.vocab_size
    assert rows == 300 and info.vocab_size == 305
    recipe = partial(recipe, f"data.path={all_added}")
    model = build_model(recipe(), info)
    config, weight = model.config, model.get_input_embeddings().weight
    assert weight.shape == (320, 32) and config.vocab_size == 320
    given = [getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask")]
    assert given == [info.bos_id, info.eos_id, info.pad_id, info.mask_id]
    old = weight[:rows]
    spread = old.std(0, correction=0)
    for token in range(rows, 320):
        # `<s>` and `</s>` begin as the model's own, which is one token for both.
        begin = old[299] if token in (info.bos_id, info.eos_id) else old.mean(0)
        distance = ((weight[token] - begin) / spread).abs()
        assert 0 < distance.max() < 0.1
    assert torch.unique(weight, dim=0).shape == weight.shape
    again, other = build_model(recipe(), info), build_model(recipe("seed=9"), info)
    assert torch.equal(again.get_input_embeddings().weight, weight)
    assert not torch.equal(other.get_input_embeddings().weight, weight)


def test_reserved_rows_are_made_anew(tmp_path, recipe):
    directory = tmp_path / "llama"
    texts = documents()[:20]
    stock = publish(directory, "llama", texts, vocab_size=384)
    data = convert(tmp_path / "text", texts, directory)
    info = DatasetInfo.load(data)
    model = build_model(recipe(f"model.hf={directory}", f"data.path={data}"), info)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        ours, theirs = model.get_parameter(name), stock.get_parameter(name)
        assert ours.shape == theirs.shape  # there are rows enough
        changed = (ours != theirs).any(1).nonzero().flatten().tolist()
        assert changed == [info.special_tokens[token] for token in ADDED] == list(range(300, 303))
        mean = torch.cat([theirs[:300], theirs[303:]]).mean(0)
        assert (ours[info.mask_id] - mean).abs().max() < 0.1


def test_from_scratch_has_the_datasets_vocabulary(recipe, tiny_dataset):
    info = DatasetInfo.load(tiny_dataset)
    scratch = recipe("model.hf_init=scratch", f"data.path={tiny_dataset}")
    model = build_model(scratch, info)
    assert model.config.vocab_size == 512 == len(model.get_input_embeddings().weight)
    assert abs(float(model.get_input_embeddings().weight.detach().std()) - 0.02) < 1e-3
    again = build_model(scratch, info)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert derive(scratch, corpus=read_corpus(scratch)).warnings == ()


def test_dropout_is_set_aside_and_the_dry_run_says_so(recipe, dataset):
    loaded = recipe()
    model = build_model(loaded, DatasetInfo.load(dataset))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert model.config.resid_pdrop == 0
    derived = derive(loaded, corpus=read_corpus(loaded))
    rows = {name: (value, reason) for name, value, reason in derived_rows(derived)}
    family, reason = rows["imported model"]
    assert family == "gpt2" and loaded.model.hf in reason
    assert "320 rows of vocabulary instead of 300" in reason
    assert "without dropout (attn_pdrop 0.1, embd_pdrop 0.1, resid_pdrop 0.1)" in reason


def test_the_dry_run_counts_what_the_model_has(recipe, dataset):
    loaded = recipe()
    model = build_model(loaded, DatasetInfo.load(dataset))
    cost = derive(loaded, corpus=read_corpus(loaded)).cost
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.without_vocabulary == cost.parameters - 320 * 32
    named = [name for group in cost.groups if group.uses_muon for name in group.names]
    assert sorted(named) == sorted(muon_parameter_names(model))
    # GPT-2's block has 12 W^2; a position sees half of the keys, and the head has every row.
    body = 2 * (2 * 12 * 32**2 + 4 * 32 * 16)
    assert cost.flops_per_token["ar"] == 3 * (body + 2 * 320 * 32)
    # Without a dataset the published vocabulary is all there is to go by.
    assert derive(loaded, corpus=None).cost.parameters == cost.parameters - 20 * 32


def test_a_published_model_can_be_opened(published):
    directory, stock, _ = published
    trained = open_trained(directory)
    assert trained.vocabulary.mask is None and trained.context == 64
    assert trained.vocabulary.bos_id == trained.vocabulary.eos_id == 299
    ids = torch.tensor([trained.encode("A list of words.")])
    with trained.inference():
        assert torch.equal(trained(ids).logits, stock.eval()(ids).logits)


def rewrite(directory: Path, change) -> None:
    file = directory / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def test_other_spellings_of_the_same_weights(copied, published, recipe, dataset):
    def spell(weights):
        # As GPT-2 was published: no name for the body, masks among the weights.
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(copied, spell)
    info = DatasetInfo.load(dataset)
    expected = build_model(recipe(), info).state_dict()
    found = build_model(recipe(f"model.hf={copied}"), info).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    # In several files, with an index; others beside them are not looked at.
    weights = load_file(copied / "model.safetensors")
    names = sorted(weights)
    for part in (0, 1):
        chosen = {name: weights[name] for name in names[part::2]}
        save_file(chosen, copied / f"model-{part}.safetensors", {"format": "pt"})
    (copied / "model.safetensors").unlink()
    save_file({"other": torch.ones(1)}, copied / "consolidated.safetensors")
    index = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = build_model(recipe(f"model.hf={copied}"), info).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("transformer.ln_f.weight"), "lacks the weights transformer.ln_f.weight"),
        (lambda w: w.update(adapter=torch.ones(1)), "says nothing of: adapter"),
        (lambda w: w.update({"transformer.ln_f.bias": torch.ones(3)}), r"is of shape \(3,\)"),
        (
            lambda w: w.update({"transformer.wte.weight": torch.ones(200, 32)}),
            r"wte.weight is of shape \(200, 32\) — expected \(300, 32\), as its config.json says",
        ),
        (
            lambda w: w.update({"transformer.wte.weight": torch.ones(300)}),
            r"wte.weight is of shape \(300,\)",
        ),
        (
            lambda w: w["transformer.ln_f.bias"].fill_(math.nan),
            r"ln_f.bias has 32 values that are NaN or infinite, of 32 — .* \(fetch the file again",
        ),
        (
            lambda w: w["transformer.h.1.mlp.c_fc.bias"][:2].fill_(-math.inf),
            "h.1.mlp.c_fc.bias has 2 values that are NaN or infinite",
        ),
        (
            lambda w: w.update(
                {"transformer.ln_f.bias": torch.full((32,), 1e300, dtype=torch.float64)}
            ),
            "NaN or infinite.*numbers that fp32 can hold",
        ),
        (
            lambda w: w.update({"transformer.ln_f.bias": torch.ones(32, dtype=torch.int8)}),
            "ln_f.bias is of type int8 — expected fp32, bf16 or fp16",
        ),
    ],
)
def test_weights_of_another_model_are_refused(copied, recipe, dataset, change, message):
    rewrite(copied, change)
    with pytest.raises(UserError, match=message):
        build_model(recipe(f"model.hf={copied}"), DatasetInfo.load(dataset))


def test_only_safetensors_are_read(copied, recipe, dataset):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    message = "no weights in safetensors, only pytorch_model.bin.*save_pretrained"
    with pytest.raises(UserError, match=message):
        build_model(recipe(f"model.hf={copied}"), DatasetInfo.load(dataset))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", lambda _: POINTER, "is a pointer of Git LFS.*git lfs pull"),
        ("model.safetensors", lambda content: content[:-9], "is damaged or cut short"),
        ("model.safetensors", lambda content: content[:40], "is damaged or cut short"),
        ("model.safetensors", lambda _: b"", "model.safetensors: is empty"),
        ("model.safetensors", lambda _: pickle.dumps({}), "is a pickle, a program"),
        ("model.safetensors", lambda _: b"PK\x03\x04" + bytes(99), "is a zip archive"),
        ("model.safetensors", lambda _: b"<!DOCTYPE html><p>404", "is a web page"),
        (INDEX, lambda _: POINTER, "is a pointer of Git LFS"),
        (INDEX, lambda _: b'{"weight_map": ', "index.json: is not JSON"),
        (INDEX, lambda _: b"[]", "index.json: holds a list"),
        (INDEX, lambda _: b'{"weight_map": {"a": 3}}', "has no weight_map"),
        (
            INDEX,
            lambda _: b'{"weight_map": {"transformer.wte.weight": "model-1.safetensors"}}',
            "model-1.safetensors: cannot be read: No such file",
        ),
        (
            INDEX,
            lambda _: b'{"weight_map": {"wte.weight": "model.safetensors"}}',
            "model.safetensors: is damaged or cut short: .*does not contain tensor wte.weight",
        ),
        ("config.json", lambda _: POINTER, "config.json: is a pointer of Git LFS"),
        ("config.json", lambda _: b"\xff\xfe{", "config.json: is not text in UTF-8"),
        ("config.json", lambda _: b"[1]", "config.json: holds a list"),
        ("config.json", lambda _: b'{"model_type": "gpt2", "n_embd": "x"}', "json: .*'x'"),
        ("config.json", lambda _: b'{"model_type": "gpt2", "n_head": 5}', "with 5 heads"),
        ("tokenizer.json", lambda _: POINTER, "tokenizer.json: is a pointer of Git LFS"),
        ("tokenizer.json", lambda _: b"\xff", "tokenizer.json: is not text in UTF-8"),
        ("tokenizer.json", lambda _: b"{}", "tokenizer.json: cannot be read"),
    ],
)
def test_files_that_are_not_what_they_are_called(copied, recipe, dataset, name, change, message):
    file = copied / name
    file.write_bytes(change(file.read_bytes() if file.exists() else b""))
    with pytest.raises(UserError, match=message):
        build_model(recipe(f"model.hf={copied}"), DatasetInfo.load(dataset))


def test_names_that_are_not_utf_8(copied, recipe, dataset, tmp_path):
    with pytest.raises(UserError, match="model.hf: .*there is no such directory"):
        find_directory("a\udcef")
    directory = copied.rename(tmp_path / "a\udcef")
    loaded = recipe(f"model.hf={tmp_path}")
    model = loaded.model.model_copy(update={"hf": str(directory)})
    with pytest.raises(UserError, match="safetensors: has a name that is not UTF-8.*rename it"):
        build_model(loaded.model_copy(update={"model": model}), DatasetInfo.load(dataset))


def test_a_dataset_of_another_tokenizer_is_refused(recipe, tiny_dataset, copied):
    message = "another tokenizer than the model.*model.hf_init=scratch"
    loaded = recipe(f"data.path={tiny_dataset}")
    with pytest.raises(UserError, match=message):
        derive(loaded, corpus=read_corpus(loaded))
    # The same tokens with the same ids, put together in another way.
    other = json.loads((copied / "tokenizer.json").read_text())
    other["model"]["merges"].reverse()
    (copied / "tokenizer.json").write_text(json.dumps(other))
    loaded = recipe(f"model.hf={copied}")
    with pytest.raises(UserError, match="its model differs"):
        derive(loaded, corpus=read_corpus(loaded))


def test_a_model_without_tokenizer_is_taken_with_a_warning(recipe, copied, dataset):
    (copied / "tokenizer.json").unlink()
    loaded = recipe(f"model.hf={copied}")
    (warning,) = derive(loaded, corpus=read_corpus(loaded)).warnings
    assert f"{copied} has no tokenizer.json" in warning
    assert build_model(loaded, DatasetInfo.load(dataset)).config.vocab_size == 320


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.width=64", "model.head=linear"), "model.width: 64 has no effect.*model.head"),
        (("model.hf=null", "model.hf_init=scratch"), "scratch has no effect without"),
        (("data.build.source=x.txt",), "data.build.tokenizer: null trains another tokenizer"),
    ],
)
def test_settings_that_do_not_go_together(recipe, overrides, message):
    with pytest.raises((UserError, UserErrors), match="(?s)" + message):
        recipe(*overrides)


def test_longer_sequences_than_positions_are_refused(recipe):
    with pytest.raises(UserError, match=r"sequence_length: 65, but .* has 64 positions"):
        derive(recipe("sequence_length=65"), corpus=None)


def test_directories_that_hold_no_model(tmp_path, copied):
    with pytest.raises(UserError, match="there is no such directory"):
        find_directory(str(tmp_path / "none"))
    with pytest.raises(UserError, match="has no config.json"):
        find_directory(str(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        find_directory(str(copied / "config.json"))
    (copied / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: is not JSON"):
        open_trained(copied)


def test_names_on_the_hub(tmp_path, monkeypatch, published):
    """Offline: what has been fetched before is found, by name and revision; the rest is not."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
        for name in ("me/small", f"me/small@{commit}"):
            message = rf"'{name}' is no directory.*hf download me/small"
            with pytest.raises(UserError, match=message):
                find_directory(name)
    folder = tmp_path / "models--me--small"
    shutil.copytree(published[0], folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    (folder / "refs" / "step3").write_text(commit)
    for name in ("me/small", "me/small@step3", f"me/small@{commit}"):
        assert find_directory(name, with_weights=True) == folder / "snapshots" / commit
    with pytest.raises(UserError, match="step4"):
        find_directory("me/small@step4")


def test_a_begun_run_knows_its_model_without_the_directory(recipe, copied, tmp_path, dataset):
    loaded = recipe(f"model.hf={copied}")
    model = build_model(loaded, DatasetInfo.load(dataset))
    checkpoint = loaded.directory / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(model.config.to_json_string())
    shutil.rmtree(copied)
    config = read_hf_config(loaded)
    assert (config.model_type, config.vocab_size, config.resid_pdrop) == ("gpt2", 320, 0)
    assert derive(loaded, corpus=read_corpus(loaded)).cost.parameters == sum(
        p.numel() for p in model.parameters()
    )
    again = build_model(loaded, DatasetInfo.load(dataset), pretrained=False)
    assert again.config.to_dict() == model.config.to_dict()
