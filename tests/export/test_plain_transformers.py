"""Tests of: dualtrain.export: exports in a process that has only transformers."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.ranks import TESTS

IDS = torch.randint(16, 500, (2, 24), generator=torch.Generator().manual_seed(1))

# Neither is torchvision: a CUDA build beside a CPU build of torch cannot be imported.
PLAIN = """
import sys
for name in ("dualtrain", "data_tools", "torchvision"):
    sys.modules[name] = None
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM,
    AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer,
)

given, result, paper, linear, again = sys.argv[1:]
ids = torch.load(given)
found = {}

def logits(model, **options):
    with torch.no_grad():
        return model(ids, **options).logits

def modes(name, model):
    found[name] = {
        "class": type(model).__name__,
        "causal": logits(model),
        "full": logits(model, attention="full"),
        "prefix": logits(model, prefix_lengths=torch.tensor([9, 9])),
        "prefix text": model.generate_prefix(ids[:, :9], max_new_tokens=6),
        "text": model.generate(ids[:, :9], max_new_tokens=6),
    }

llama = AutoModelForCausalLM.from_pretrained(linear)
found["llama"] = {
    "class": type(llama).__name__,
    "text": llama.generate(ids[:, :9], max_new_tokens=6),
    **{length: llama(ids[:, :length]).logits.detach() for length in (1, 2, 13, 24)},
}
llama.save_pretrained(f"{again}/llama")
def others(path):
    # As the BabyLM pipeline opens and calls them.
    made = AutoModel.from_pretrained(path, trust_remote_code=True, revision=None)
    width = AutoConfig.from_pretrained(path, trust_remote_code=True, revision=None).hidden_size
    with torch.no_grad():
        states = made(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        masked = AutoModelForMaskedLM.from_pretrained(path, trust_remote_code=True, revision=None)
        full = masked.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    classifier = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)
    classifier.save_pretrained(f"{again}/classifier")
    saved = AutoModelForSequenceClassification.from_pretrained(f"{again}/classifier",
                                                               trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(path, padding_side="right", revision=None,
                                              trust_remote_code=True)
    pair = processor(["One text", "Another, longer text"], padding=True, truncation=True,
                     max_length=8, return_tensors="pt")
    return {
        "classes": [type(m).__name__ for m in (made, masked, classifier, saved)],
        "states": states, "width": width, "full": full,
        "kept": torch.equal(classifier.eval()(ids).logits, saved.eval()(ids).logits),
        "right": pair.attention_mask[:, 0].tolist(),
        "offsets": processor(text="One text", return_offsets_mapping=True)["offset_mapping"][0],
        "named": [processor.pad_token_id, processor.mask_token_id, processor.cls_token_id],
    }

for name, path in {"paper": paper, "linear": linear}.items():
    found[f"{name} others"] = others(path)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    modes(name, model)
    model.save_pretrained(f"{again}/{name}")
    AutoTokenizer.from_pretrained(path, trust_remote_code=True).save_pretrained(f"{again}/{name}")
    modes(f"{name} again", AutoModelForCausalLM.from_pretrained(f"{again}/{name}",
                                                                trust_remote_code=True))
"""


def card_program(case):
    """The Python of a model card, run where the card is."""
    card = (case.directory / "README.md").read_text()
    blocks = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    assert len(blocks) == (3 if "modeling_dualtrain.py" in case.exported.files else 1)
    ran = "found['cards'] = found.get('cards', 0) + 1"
    return "\n".join(["import os", f"os.chdir({str(case.directory)!r})", *blocks, ran])


def plain_environment(folder):
    cache = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
    return {**os.environ, **cache, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def found(cases, tmp_path_factory):
    """What a process without dualtrain computes, and what it saved again."""
    folder = tmp_path_factory.mktemp("plain")
    torch.save(IDS, folder / "given.pt")
    places = [cases["paper"].directory, cases["linear"].directory, folder]
    cards = [card_program(case) for case in cases.values()]
    program = "\n".join([PLAIN, *cards, "torch.save(found, result)"])
    done = subprocess.run(
        [sys.executable, "-c", program, folder / "given.pt", folder / "result.pt", *places],
        cwd=folder,
        env=plain_environment(folder),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {"folder": folder, **torch.load(folder / "result.pt")}


def test_the_linear_head_is_a_plain_llama(cases, found):
    linear, llama = cases["linear"], found["llama"]
    assert llama["class"] == "LlamaForCausalLM"
    for length in (1, 2, 13, 24):
        assert (llama[length] - linear.logits(IDS[:, :length])).abs().max() < 1e-5
    assert torch.equal(llama["text"], found["linear"]["text"])


@pytest.mark.parametrize("again", ["", " again"], ids=["exported", "saved-again"])
def test_all_modes_in_trusted_code(case, found, again):
    got = found[case.trained.model.config.head + again]
    assert got["class"] == "DualTrainForCausalLM"
    for kind in ("causal", "full", "prefix"):
        own = case.logits(IDS, kind, 9 if kind == "prefix" else None)
        assert (got[kind] - own).abs().max() < 1e-5
    assert got["text"].shape == got["prefix text"].shape == (2, 15)


def test_the_classes_that_evaluations_load(case, found):
    got = found[f"{case.trained.model.config.head} others"]
    classifier = "DualTrainForSequenceClassification"
    assert got["classes"] == ["DualTrainModel", "DualTrainForMaskedLM", classifier, classifier]
    assert got["width"] == got["states"].shape[-1] == case.trained.model.config.hidden_size
    assert (got["full"] - case.logits(IDS, "full")).abs().max() < 1e-5
    assert got["kept"] and got["right"] == [1, 1] and got["offsets"] == (0, 0)
    assert got["named"] == [3, 4, None]


def test_dualtrain_opens_what_transformers_saved_again(cases, found):
    from dualtrain.checkpoint.trained import open_trained

    for name, head in {"paper": "paper", "linear": "linear", "llama": "linear"}.items():
        folder = found["folder"] / name
        if name == "llama":
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (folder / file).write_bytes((cases[head].directory / file).read_bytes())
        opened = open_trained(folder, device="cpu")
        with torch.no_grad():
            assert torch.equal(opened.model(IDS).logits, cases[head].logits(IDS))
        assert opened.target == cases[head].trained.target
        assert opened.vocabulary == cases[head].trained.vocabulary


def test_the_python_of_the_model_cards_runs(found):
    assert found["cards"] == 3


def test_the_remote_code_imports_nothing_else():
    code = (TESTS.parent / "dualtrain/export/modeling_dualtrain.py").read_text()
    lines = [line.split()[1] for line in code.splitlines() if line.startswith(("import ", "from "))]
    roots = {name.split(".")[0] for name in lines}
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers"}
