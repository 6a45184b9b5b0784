"""Tests of: dualtrain.generate.command, .generate and .files.

``dualtrain generate`` as a user runs it: prompts, files, what is shown, what is refused.
"""

import bz2
import gzip
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.models import save_model
from helpers.texts import random_model
from typer.testing import CliRunner

from dualtrain.checkpoint.trained import open_trained
from dualtrain.cli import app
from dualtrain.common.errors import UserError
from dualtrain.generate.files import read_prompts


@pytest.fixture
def generate(exported):
    """A function from arguments to standard output and standard error."""

    def run(*arguments, path=exported):
        result = CliRunner().invoke(app, ["generate", str(path), *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout, result.stderr

    return run


def test_a_prompt_is_continued(generate):
    out, err = generate("The cat", "--tokens", 8, "--seed", 3)
    assert out.startswith("The cat") and len(out) > len("The cat\n")
    assert "model, ar: 1 text, 8 tokens in" in err
    assert "as long as asked for" in err
    assert generate("The cat", "--tokens", 8, "--seed", 3)[0] == out
    assert generate("The cat", "--tokens", 8, "--seed", 4)[0] != out
    assert "stopped by the context of 32 tokens" in generate("The cat")[1]


def test_no_prompt_begins_a_document(generate):
    assert generate("--tokens", 5)[0] == generate("", "--tokens", 5)[0] != "\n"


def test_gaps_are_filled(generate, exported):
    out, err = generate("The <mask:3> sat")
    assert out.startswith("The") and out.endswith(" sat\n") and len(out) > 10
    assert "diffusion: 1 text, 3 tokens" in err and "filled" in err
    traced, _ = generate("The <mask:3> sat", "--trace", "--order", "left_to_right")
    lines = traced.splitlines()
    assert [line.count(" _") for line in lines[:3]] == [2, 1, 0]
    assert lines[0].startswith("step 1 | The")


def test_several_texts_have_headings(generate):
    out, _ = generate("The cat", "--samples", 3, "--tokens", 4)
    assert [line for line in out.splitlines() if line.startswith("---")] == [
        f"--- prompt 1, sample {sample} ---" for sample in (1, 2, 3)
    ]


def test_prompts_from_a_file_to_a_file(generate, tmp_path, exported):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    texts = ["The cat\nsat", "", "on the"]
    prompts.write_text("\n\n".join(json.dumps({"prompt": text, "id": 7}) for text in texts))
    options = ["--file", prompts, "--samples", 2, "--tokens", 6, "--seed", 9, "--mode", "prefix"]
    shown, err = generate(*options, "--out", out)
    assert shown == "" and f"written to {out}" in err and "6 texts, 36 tokens" in err
    assert not list(tmp_path.glob("*.partial"))
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["prompt"], r["number"], r["sample"]) for r in records] == [
        (text, number, sample) for number, text in enumerate(texts) for sample in (0, 1)
    ]
    trained = open_trained(exported)
    for record in records:
        assert record["text"] == trained.decode(record["ids"])
        assert (record["mode"], record["stop"], record["seed"]) == ("prefix", "tokens", 9)
        assert record["settings"]["temperature"] == 0.8
        assert record["model"] == str(exported)
    # The same on the screen, and in other batches.
    shown, _ = generate(*options, "--batch", 1)
    for record in records:
        assert record["prompt"] + record["text"] in shown


def test_records_of_gaps(generate, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("The <mask:2> sat <mask:3>\r\n\r\n  on\r\n")
    generate("--file", prompts, "--out", out, "--tokens", 4, "--block", 2)
    first, second = [json.loads(line) for line in out.read_text().splitlines()]
    assert (len(first["ids"]), first["stop"]) == (5, "filled")
    assert first["text"] == "The" + first["gaps"][0] + " sat" + first["gaps"][1]
    assert (second["prompt"], len(second["ids"]), second["stop"]) == ("  on", 4, "tokens")
    assert "gaps" not in second and first["settings"]["block"] == 2


LINES = '{"prompt": "The cat"}\n{"prompt": "on", "id": 1}\n'
ARRAY = '[\n{"prompt": "The cat"}, {"id": 1,\n"prompt": "on"}\n]'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", ARRAY),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("a.json.BZ2", bz2.compress(ARRAY.encode())),
        ("a.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\r\n")),
        # Named as text, or not at all: nobody means braces.
        ("a.txt", LINES),
        ("prompts", ARRAY),
        ("a.txt", "The cat\r\n\non"),
        ("a.txt.gz", gzip.compress(b"The cat\non\n")),
        ("a.txt", gzip.compress(b"The cat\non\n")),
        ("a.jsonl", bz2.compress(LINES.encode())),
    ],
)
def test_every_kind_of_file_gives_the_same_prompts(name, content, tmp_path, monkeypatch):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    prompts, places = read_prompts(file)
    assert prompts == ["The cat", "on"]
    assert all(place.startswith(f"{file}:") for place in places)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    from_stdin, places = read_prompts(Path("-"))
    assert from_stdin == prompts and places[0].startswith("standard input:")


def test_one_object_over_several_lines_is_one_prompt(tmp_path):
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"prompt": "The cat", "id": {"a": 1}}, indent=2))
    assert read_prompts(file) == (["The cat"], [f"{file}:1"])


def test_prompts_from_standard_input(exported, monkeypatch):
    arguments = ["generate", str(exported), "--file", "-", "--tokens", "2"]
    result = CliRunner().invoke(app, arguments, input="The cat\n\non\n", catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout.count("--- prompt") == 2
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="standard input: is closed"):
        read_prompts(Path("-"))


def test_text_that_is_not_unicode_is_named(generate, tmp_path):
    with pytest.raises(UserError, match="prompt: has the byte 0xe9 at position 4"):
        generate(os.fsdecode(b"caf\xe9"))
    file = tmp_path / "half.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "\\ud83d"}\n{"prompt": "b\\udfff"}')
    with pytest.raises(UserError) as caught:
        generate("--file", file)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{file}:2: has the half of a character, \\ud83d, at position 1")
    assert second.startswith(f"{file}:3: has the half of a character, \\udfff, at position 2")


def test_names_that_are_not_utf_8(generate, exported, tmp_path):
    file, out = (tmp_path / os.fsdecode(name) for name in (b"pr\xf6mpts.jsonl", b"na\xefve"))
    file.write_text(LINES)
    _, err = generate("--file", file, "--tokens", 2, "--out", out)
    assert "written to" in err and len(out.read_text().splitlines()) == 2
    file.write_text("{")
    with pytest.raises(UserError, match="mpts.jsonl:1: is not JSON"):
        generate("--file", file)
    folder = shutil.copytree(exported, tmp_path / os.fsdecode(b"mod\xe8le"))
    with pytest.raises(UserError, match=r"has a name that is not UTF-8 .* \(rename it\)"):
        generate("The", path=folder)


def test_a_full_disk_is_one_sentence(generate, tmp_path):
    """What could be written stays beside, under a name that nobody takes for the whole."""
    out = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").symlink_to("/dev/full")
    with pytest.raises(UserError) as caught:
        generate("The", "--tokens", 2, "--out", out)
    assert f"--out {out}: cannot be written: No space left on device" in str(caught.value)
    assert not out.exists()
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        generate("The", "--tokens", 2, "--out", tmp_path / ("x" * 250))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "empty.txt: has no prompts"),
        ("empty.txt", "\n \n", "empty.txt: has no prompts"),
        ("empty.json", "[]", "empty.json: has no prompts"),
        ("empty.jsonl", "\n", "empty.jsonl: has no prompts"),
        ("none.txt", None, "none.txt: cannot be read: .*No such file"),
        ("latin.txt", b"ok\ncaf\xe9", "latin.txt:2: byte 0xe9 is not UTF-8"),
        ("wide.txt", "The cat".encode("utf-16-le"), "wide.txt:1: has a zero byte"),
        ("a.json.gz", b"{}", "a.json.gz: damaged file: cannot be decompressed as gzip"),
        ("deep.json", "[" * 99_999, "deep.json:1: is not JSON: it is nested too deeply"),
        ("a.json", '[{"prompt": "a"},\n{"prompt": }]', "a.json:2: is not JSON: Expecting value"),
        ("a.json", '[{"prompt": "a"},\n\n3]', "a.json:3: is a JSON int — expected a JSON object"),
        ("a.json", '{\n "prompt": "a"\n}\n{\n "prompt": "b"\n}', r"^[^\n]*a.json:4: is not JSON: "
         "Extra data — expected one JSON object a line, or an array of objects$"),
        ("p.csv", "prompt,id\nThe cat,1\n", "p.csv: is a table, .* — expected a line each, or"),
        ("p.TSV.gz", gzip.compress(b"prompt\tid\n"), "p.TSV.gz: is a table, whose rows are no"),
        ("a.json", '{"prompt": "a", "prompt": "b"}', "a.json:1: .* key 'prompt' is there twice"),
        ("a.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n[]\n{', "(?s)a.jsonl:2: has only promt .*"
         "did you mean prompt.*a.jsonl:3: is a JSON list.*a.jsonl:4: is not JSON"),
        ("b.jsonl", '{"prompt": 5}', "b.jsonl:1: its prompt is 5 — expected text"),
        ("b.jsonl", '{"prompt": null}', "b.jsonl:1: its prompt is null — expected text"),
        ("b.jsonl", '{"prompt": NaN}', "b.jsonl:1: its prompt is nan — expected text"),
        ("c.txt", "one\ntwo <mask:2>\n", "c.txt:2: has a gap, which mode ar does not fill"),
    ],
)  # fmt: skip
def test_bad_files_are_named(generate, tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        generate("--file", file, "--mode", "ar")


def test_next_to_0_the_temperature_is_greedy(generate):
    for mode in (), ("--mode", "diffusion"):
        greedy = generate("The cat", "--temperature", 0, "--tokens", 8, *mode)[0]
        for temperature in ("1e-320", "1e-7"):
            options = ("--temperature", temperature, "--tokens", 8, *mode)
            assert generate("The cat", *options)[0] == greedy
    # The ends of what is taken still make text.
    for options in (
        ("--temperature", 1000),
        ("--temperature", 1e-6),
        ("--top-p", "1e-320"),
        ("--top-k", 10**30),
        ("--repetition-penalty", 100, "--seed", -1),
        ("--repetition-penalty", 0.01, "--seed", 10**30),
        ("--batch", 10**9, "--tokens", 10**12),
        ("--mode", "diffusion", "--steps", 10**9, "--block", 10**9),
    ):
        assert generate("The cat", *options)[0].startswith("The cat")


def test_what_does_not_go_together_is_refused(generate, tmp_path):
    existing, nowhere = tmp_path / "there", tmp_path / "no" / "out"
    existing.write_text("kept")
    for arguments, message in (
        (("The", "--file", existing), "--file: .*a prompt is given, too"),
        (("The", "--out", existing), "--out: .*there exists already"),
        (("The", "--out", nowhere), "--out: .*no is no directory"),
        (("The", "--trace"), "--trace: mode ar has no steps"),
        (("The", "--batch", 0), "--batch: 0"),
        (("The", "--tokens", -1), "--tokens: -1 — expected 1 or more"),
        (("The", "--top-k", 0), "--top-k: 0 — expected 1 or more"),
        (("The", "--top-p", "nan"), "--top-p: nan"),
        (("The", "--block", 0, "--steps", -1), "(?s)--steps: -1.*--block: 0"),
        (("The", "--step", 10**12), "--step: .*has no checkpoint of step 1000000000000"),
        (("The", "--step", -1), "--step: .*has no checkpoint of step -1"),
        (
            ("The", "--precision", "fp16"),
            "--precision: 'fp16' is not known — expected fp32",
        ),
        (("The", "--device", "tpu"), "--device: 'tpu'"),
        (("The", "--temperature", "1e300"), r"--temperature: 1e\+300 — expected 0 to 1000"),
        (("The", "--samples", 10**9), "--samples: 1000000000 — expected at most 100000"),
        (("The cat " * 20_000,), "prompt: .* tokens with <s> — expected at most 32"),
        (("The" * 60,), "prompt: .* tokens with <s> — expected at most 32"),
        (("a <mask:x> b", "--tokens", 2), "prompt: '<mask:x>' is no gap — expected a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            generate(*arguments)
    assert existing.read_text() == "kept"
    with pytest.raises(UserError, match="has neither checkpoints nor an exported model"):
        generate("The", path=tmp_path)


def test_an_interrupted_file_is_not_taken_for_a_whole_one(generate, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    calls = []

    def interrupted(*arguments, **options):
        from dualtrain.generate.texts import generate_texts

        for text in generate_texts(*arguments, **options):
            yield text
            calls.append(text)
            if len(calls) == 2:
                raise OSError("pulled the plug")

    monkeypatch.setattr("dualtrain.generate.generate.generate_texts", interrupted)
    with pytest.raises(OSError, match="pulled"):
        generate("The", "--samples", 4, "--batch", 1, "--tokens", 3, "--out", out)
    assert not out.exists()
    assert len((tmp_path / "out.jsonl.partial").read_text().splitlines()) == 2


def test_a_model_without_mask_token(generate, tokenizer, tmp_path):
    network = random_model(tokenizer.get_vocab_size() + 2)
    folder = tmp_path / "plain"
    save_model(network, folder)
    config = json.loads((folder / "config.json").read_text())
    config["mask_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))
    text = tokenizer.to_str().replace('"<mask>"', '"<other>"')
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="diffusion needs a mask token, and this model has none"):
        generate("The <mask:2>", path=folder)
    assert generate("The", "--tokens", 2, path=folder)[0].startswith("The")
