"""Tests of: dualtrain.generate.texts, .settings.

Batches, samples, memory and context; settings that do not go together.
"""

from dataclasses import replace

import pytest
import torch
from helpers.texts import CONTEXT, with_ids

from dualtrain.checkpoint.trained import open_trained
from dualtrain.common.errors import UserError
from dualtrain.generate.settings import Settings, with_mode
from dualtrain.generate.texts import Watcher, generate_texts, prepare

TEXTS = ["The cat", "", "The mat sat on the mat", "on"]
GAPS = ["The <mask:3> sat", "<mask>", "The mat", "on <mask:2> the <mask:4>."]


@pytest.fixture(scope="module")
def trained(exported):
    return open_trained(exported)


def make(trained, texts, model=None, watcher=None, **settings):
    model = model or trained
    wanted = Settings(**settings)
    prompts = prepare(texts, wanted, model)
    return list(generate_texts(prompts, wanted, model, watcher))


@pytest.mark.parametrize("mode", ["ar", "prefix", "diffusion"])
def test_any_batch_size_makes_the_same_texts(trained, mode):
    texts = GAPS if mode == "diffusion" else TEXTS
    options = {"mode": mode, "tokens": 9, "samples": 2, "seed": 5}
    found = [make(trained, texts, batch=rows, **options) for rows in (1, 3, 16)]
    assert found[0] == found[1] == found[2]
    jobs = [(text.job.prompt.number, text.job.sample) for text in found[0]]
    assert jobs == [(number, sample) for number in range(4) for sample in range(2)]
    assert found[0][0].ids != found[0][1].ids
    assert make(trained, texts, **options | {"seed": 6}) != found[0]
    # A prompt's texts are the same with fewer prompts behind it.
    assert make(trained, texts[:2], **options) == found[0][:4]


def test_text_is_what_the_ids_decode_to(trained):
    for mode, texts in (("ar", TEXTS), ("prefix", TEXTS), ("diffusion", GAPS)):
        for text in make(trained, texts, mode=mode, tokens=9):
            pieces = text.pieces(trained.tokenizer)
            assert "".join(piece.text for piece in pieces) == trained.decode(list(text.ids))
            assert len(text.new_ids) == {"ar": 9, "prefix": 9}.get(mode, text.job.prompt.masks)


def test_diffusion_behind_a_prompt(trained):
    (text,) = make(trained, ["The cat"], mode="diffusion", tokens=9)
    assert (len(text.new_ids), text.stop) == (9, "tokens")
    (full,) = make(trained, ["The cat"], mode="diffusion", tokens=99)
    assert (len(full.ids), full.stop) == (CONTEXT, "context")
    (gaps,) = make(trained, GAPS[:1], mode="diffusion")
    assert (len(gaps.new_ids), gaps.stop) == (3, "filled")
    assert gaps.written(trained.tokenizer) == trained.decode(list(gaps.ids))
    assert text.written(trained.tokenizer) == trained.decode(text.new_ids)


def test_modes_differ(trained):
    options = {"tokens": 12, "temperature": 0}
    ar, prefix, diffusion = (
        make(trained, ["The mat sat on"], mode=mode, **options)[0].ids
        for mode in ("ar", "prefix", "diffusion")
    )
    assert ar != prefix != diffusion != ar


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_memory_that_runs_out_halves_the_batch(trained, mode):
    rows, notes = [], []

    def scarce(input_ids, **options):
        rows.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("no room")
        return trained(input_ids, **options)

    class Listener(Watcher):
        def note(self, text):
            notes.append(text)

    options = {"mode": mode, "tokens": 5, "samples": 2}
    model = replace(trained, model=scarce)
    texts = ["The", "cat", "sat", "on", "mat"]
    found = make(trained, texts, model, watcher=Listener(), **options)
    assert found == make(trained, texts, **options)
    assert notes == [
        "out of memory with 10 texts at once; going on with half of it",
        "out of memory with 5 texts at once; going on with half of it",
    ]

    def hopeless(input_ids, **options):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(UserError, match="memory: does not suffice for a single text"):
        make(trained, texts, replace(trained, model=hopeless), **options)


def test_logits_of_many_masks_limit_the_batch(trained):
    rows = []

    def watched(input_ids, **options):
        rows.append(len(input_ids))
        return trained(input_ids, **options)

    # As if the vocabulary were so large that 20 rows of a mask make a batch.
    model = replace(with_ids(trained, size=2**26 // 20), model=watched)
    make(trained, ["<mask:5>"] * 6, model, mode="diffusion", steps=1)
    assert rows == [4, 2]
    rows.clear()
    make(trained, ["<mask:30>"], model, mode="diffusion", steps=1)
    assert rows == [1]


def test_prompts_that_do_not_fit_are_named(trained):
    long, places = "The cat sat" * 40, ["f:1", "f:2", "f:3", "f:5"]

    def problems(texts, **settings):
        with pytest.raises(UserError) as caught:
            prepare(texts, Settings(**settings), trained, places=places)
        return str(caught.value).splitlines()

    count = 1 + len(trained.encode(long))
    texts = ["The", long, "cat", long]
    expected = "expected at most 32, by the model's context"
    assert problems(texts) == [f"f:{line}: {count} tokens with <s> — {expected}" for line in (2, 5)]
    row = problems(
        ["The", "<mask:40> cat", "<mask:0>", "<mask:8>"], mode="diffusion", steps=1, block=4
    )
    assert row[0] == "f:1: --steps: 1 for 30 masks in 8 blocks of 4 — expected at least one a block"
    assert row[1].startswith("f:2: 42 tokens with <s> with the gaps")
    assert row[2].startswith("f:3: '<mask:0>' is no gap")
    assert row[3].startswith("f:5: --steps: 1 for 8 masks in 2 blocks")
    full = trained.decode([5] * 31)
    assert len(prepare([full], Settings(), trained)) == 1
    assert problems([full], mode="diffusion")[0].endswith("at most 31, by the model's context")
    with pytest.raises(UserError, match="--mode: diffusion needs a mask token"):
        without = with_ids(trained, mask=None)
        prepare(["The"], Settings(mode="diffusion"), without)


@pytest.mark.parametrize(
    ("settings", "gaps", "message"),
    [
        ({"mode": "difusion"}, 0, "--mode: 'difusion' .*did you mean diffusion?"),
        ({"mode": "AR"}, 0, "--mode: 'AR' — expected ar, prefix or diffusion"),
        ({"mode": "ar"}, 1, "p0: has a gap, which mode ar does not fill .*diffusion does"),
        ({"mode": "prefix"}, 1, "which mode prefix does not fill"),
        ({"steps": 4, "block": 2}, 0, "(?s)--steps: has no say in mode ar.*--block: has no say"),
        ({"order": "random"}, 0, "--order: has no say in mode ar — expected --order with"),
        ({"mode": "diffusion", "order": "rand"}, 0, "--order: 'rand' .*did you mean random?"),
        ({"repetition_penalty": 1.2}, 1, "--repetition-penalty: has no say in mode diffusion"),
        ({"tokens": 5}, 2, "--tokens: the gaps say how many"),
        ({"tokens": 0}, 0, "--tokens: 0 — expected 1 or more"),
        ({"steps": 0, "mode": "diffusion"}, 0, "--steps: 0"),
        ({"samples": 0}, 0, "--samples: 0"),
        ({"samples": 2, "temperature": 0}, 0, "--samples: 2 texts of temperature 0 would be"),
        ({"temperature": -1}, 0, "--temperature: -1"),
        ({"top_p": 1.5}, 0, "--top-p: 1.5"),
    ],
)
def test_settings_that_cannot_be_met(settings, gaps, message):
    with pytest.raises(UserError, match=message):
        with_mode(Settings(**settings), gaps=[f"p{number}" for number in range(gaps)], prompts=2)


def test_the_mode_follows_from_the_prompts():
    assert with_mode(Settings(), gaps=[], prompts=1).mode == "ar"
    assert with_mode(Settings(tokens=3), gaps=["prompt"], prompts=2).mode == "diffusion"
    greedy = Settings(temperature=0, samples=2, mode="diffusion", order="random")
    assert with_mode(greedy, gaps=[], prompts=1).samples == 2
