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
from transformers import AutoModelForCausalLM, AutoTokenizer

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
for name, path in {"paper": paper, "linear": linear}.items():
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
