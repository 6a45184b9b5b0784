"""Tests of: dualtrain.export.export: what it holds, that it opens again, nothing half-written."""

import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dualtrain.checkpoint.files import FileFacts, hash_file, read_marker, write_marker
from dualtrain.checkpoint.store import WEIGHTS
from dualtrain.checkpoint.trained import open_trained
from dualtrain.cli import app
from dualtrain.common.errors import UserError
from dualtrain.export.card_results import held_out, task_scores
from dualtrain.export.command import ExportOptions
from dualtrain.export.export import export_checkpoint
from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM

IDS = torch.randint(16, 500, (2, 24), generator=torch.Generator().manual_seed(1))
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_dualtrain.py",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def everything_beside(place):
    return {path.name for path in place.parent.iterdir()}


def test_dualtrain_opens_an_export_as_it_opens_the_checkpoint(case):
    opened = open_trained(case.directory, device="cpu")
    with torch.no_grad():
        assert torch.equal(opened.model(IDS).logits, case.logits(IDS))
    trained = case.trained
    assert opened.vocabulary == trained.vocabulary
    assert (opened.context, opened.target) == (trained.context, trained.target)
    text = "A <mask> is text, and <s> too."
    assert opened.encode(text) == trained.encode(text)
    assert opened.decode(opened.encode(text)) == text


def test_files_and_weights(case):
    assert set(case.exported.files) == FILES == {file.name for file in case.directory.iterdir()}
    checkpoint = load_file(case.run_dir / "step-00000003" / WEIGHTS)
    exported = load_file(case.directory / "model.safetensors")
    assert checkpoint.keys() == exported.keys()
    assert all(torch.equal(exported[name], checkpoint[name]) for name in exported)
    assert case.exported.parameters == sum(tensor.numel() for tensor in exported.values())
    modes = {file.stat().st_mode & 0o777 for file in case.directory.iterdir()}
    assert len(modes) == 1
    generation = json.loads((case.directory / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 1] and generation["bos_token_id"] == 1


def test_the_model_card_says_what_was_trained(case):
    card = (case.directory / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    facts = case.trained.source.facts
    losses = facts["last_eval"]
    for part in (
        "# tiny at step 3",
        "| AR share of the objective (alpha) | 3/8 |",
        f"| autoregressive | {losses['ar_nll']:.4f} | {losses['ar_error']:.4f} |",
        f"| diffusion, upper bound | {losses['diffusion_nll']:.4f} |",
        f"whose autoregressive loss is {losses['ar_nll_same_tokens']:.4f}.",
        case.trained.source.info.fingerprint,
        case.trained.source.info.tokenizer_sha256,
        f"{case.exported.parameters:,}",
        f"ZeRO stage {facts['zero_stage']}",
    ):
        assert part in text
    recipe = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe)["optim"]["lr"] == 0.02


def test_losses_of_older_versions_and_scores_on_tasks():
    assert held_out({"last_eval": None}) == "The run had none by then."
    old = {"step": 3, "tokens": 900, "ar_nll": 2.5, "ar_bits_per_byte": 1.25}
    table = held_out({"last_eval": old}).splitlines()
    assert table[2:] == [
        "| autoregressive | 2.5000 | - | 1.2500 |",
        "",
        "At step 3, on 900 held-out tokens.",
    ]
    assert list(task_scores({})) == []
    score = {"score": 12.34, "score_low": 10.0, "score_high": 15.0}
    records = [
        {"mode": "ar", "step": 3, "average": 12.34, "tasks": {"blimp": score}},
        {"mode": "pll", "step": 3, "average": -1.0, "tasks": {"piqa": score}},
    ]
    title, table = task_scores({"last_scores": records})
    assert title == "## Tasks"
    assert table.splitlines()[:5] == [
        "| | ar | pll |",
        "|---|---|---|",
        "| blimp | 12.3 (10.0 to 15.0) | - |",
        "| piqa | - | 12.3 (10.0 to 15.0) |",
        "| **average** | **12.3** | **-1.0** |",
    ]


def test_an_earlier_step_in_bf16_in_several_files(cases, tmp_path):
    paper = cases["paper"]
    place = tmp_path / "new" / "export"
    done = export_checkpoint(
        ExportOptions(path=paper.run_dir, to=place, step=2, dtype="bf16", max_shard_size="20KB")
    )
    assert done.name == "tiny at step 2"
    index = json.loads((place / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and files < set(done.files)
    largest = max(done.files[name] for name in files)
    assert largest < 512 * 32 * 2 + 2000  # a matrix of the vocabulary has a file of its own
    saved = load_file(paper.run_dir / "step-00000002" / WEIGHTS)
    got = {name: value for file in files for name, value in load_file(place / file).items()}
    assert saved.keys() == got.keys() == index["weight_map"].keys()
    assert all(torch.equal(got[name], saved[name].bfloat16()) for name in got)
    assert index["metadata"]["total_size"] == sum(2 * value.numel() for value in got.values())
    earlier = open_trained(paper.run_dir, step=2, device="cpu").model.to(torch.bfloat16)
    opened = open_trained(place, device="cpu").model.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, earlier(IDS).logits)


def test_the_command(paper, tmp_path):
    place = tmp_path / "export"
    command = ["export", str(paper.run_dir), "--to", str(place), "--dtype", "bf16"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    count = paper.exported.parameters
    assert done.stdout.startswith(
        f"tiny at step 3: {count:,} parameters in bf16, as DualTrainForCausalLM, in {place}"
    )
    assert f'from_pretrained("{place}", trust_remote_code=True)' in done.stdout
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, UserError)
    assert f"--to {place}: the directory is not empty — expected a new or" in str(again.exception)


def test_places_where_nothing_can_be_written(paper, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    for place, match in {
        "file": "file is a file — expected a new or empty directory",
        "file/inside/it": "file is a file",
        "full": "is not empty",
    }.items():
        with pytest.raises(UserError, match=match):
            export_checkpoint(ExportOptions(path=paper.run_dir, to=tmp_path / place))
    for name in ("x" * 300, "x" * 250):  # what is made beside the place has a longer name
        with pytest.raises(UserError, match="--to .*: cannot be written: File name too long"):
            export_checkpoint(ExportOptions(path=paper.run_dir, to=tmp_path / "new" / name))
    with pytest.raises(UserError, match="has a name that is not UTF-8"):
        export_checkpoint(ExportOptions(path=paper.run_dir, to=tmp_path / "na\udcefve"))
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "full", "mine.txt"}
    with pytest.raises(UserError, match="--dtype: 'fp8' — expected fp32 or bf16"):
        export_checkpoint(ExportOptions(path=paper.run_dir, to=tmp_path / "new", dtype="fp8"))
    for size in ("much", "-5MB", "0GB", "infGB", "5"):
        with pytest.raises(UserError, match=f"--max-shard-size: '{size}' — expected such as 5GB"):
            export_checkpoint(
                ExportOptions(path=paper.run_dir, to=tmp_path / "new", max_shard_size=size)
            )
    with pytest.raises(UserError, match="is an exported model already"):
        export_checkpoint(ExportOptions(path=paper.directory, to=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", "x", "hidden_size: 'x' — expected an integer above 0"),
        ("vocab_size", -1, "vocab_size: -1 — expected an integer above 0"),
        ("num_hidden_layers", 1.5, "num_hidden_layers: 1.5 — expected an integer"),
        ("num_attention_heads", 5, "5 heads do not divide width"),
        ("rms_norm_eps", None, "rms_norm_eps: None — expected a number above 0"),
    ],
)
def test_edited_configurations_are_refused(paper, tmp_path, name, value, message):
    content = json.loads((paper.directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {name: value}))
    with pytest.raises(UserError, match=message):
        open_trained(tmp_path, device="cpu")


def test_an_empty_directory_and_what_a_killed_export_left(paper, tmp_path):
    place = tmp_path / "export"
    place.mkdir()
    left = tmp_path / ".export.partial"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    (tmp_path / "link").symlink_to(place)
    export_checkpoint(ExportOptions(path=paper.run_dir, to=tmp_path / "link"))
    assert {file.name for file in place.iterdir()} == FILES
    assert everything_beside(place) == {"export", "link"}


@pytest.mark.parametrize("size", [300, 100_000])
def test_a_full_disk_leaves_nothing(paper, tmp_path, size):
    place = tmp_path / "new" / "export"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(UserError, match="cannot be written.*nothing is left"):
            export_checkpoint(ExportOptions(path=paper.run_dir, to=place))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(paper, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dualtrain.export.export.model_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(ExportOptions(path=paper.run_dir, to=tmp_path / "export"))
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_are_not_there_or_damaged(paper, tmp_path):
    run = shutil.copytree(paper.run_dir, tmp_path / "run")
    with pytest.raises(UserError, match="no checkpoint of step 9 — expected one of 2, 3"):
        export_checkpoint(ExportOptions(path=run, to=tmp_path / "export", step=9))
    weights = run / "step-00000003" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    notes = []
    done = export_checkpoint(ExportOptions(path=run, to=tmp_path / "export"), on_note=notes.append)
    assert done.name == "tiny at step 2" and "step-00000003 is damaged" in notes[0]
    with pytest.raises(UserError, match="not a whole checkpoint"):
        export_checkpoint(ExportOptions(path=weights.parent, to=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


MEASURE = """
import sys
import dualtrain.export.export, safetensors.torch
from pathlib import Path
from dualtrain.export.command import ExportOptions
def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
def export(checkpoint, to, precision):
    options = ExportOptions(path=Path(checkpoint), to=Path(to), dtype=precision)
    dualtrain.export.export.export_checkpoint(options)
small, large, to = sys.argv[1:]
export(small, to + "small", "fp32")  # imports the rest
before = peak()
for precision in ("fp32", "bf16"):
    export(large, to + precision, precision)
    print(peak() - before)
"""


def test_memory_is_at_most_twice_the_weights(paper, tmp_path):
    small = paper.run_dir / "step-00000003"
    checkpoint = shutil.copytree(small, tmp_path / small.name)
    config = DualConfig.of(
        json.loads((checkpoint / "config.json").read_text())
        | {
            "hidden_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 8,
            "intermediate_size": 1536,
        }
    )
    save_file(dict(DualLM(config).named_parameters()), checkpoint / WEIGHTS)
    (checkpoint / "config.json").write_text(config.to_json_string())
    facts = read_marker(checkpoint)
    for name in (WEIGHTS, "config.json"):
        file = checkpoint / name
        facts[name] = FileFacts(file.stat().st_size, hash_file(file))
    write_marker(checkpoint, facts)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(checkpoint), str(tmp_path / "export")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    weights = (checkpoint / WEIGHTS).stat().st_size
    assert weights > 60e6
    ratios = [int(line) / weights for line in done.stdout.split()]
    print("peak memory / weights, fp32 and then bf16:", ratios)
    assert max(ratios) <= 2
