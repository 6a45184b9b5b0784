"""Tests of: dualtrain.generate.view.

What a terminal shows while texts are made.
"""

import io
import re

import pytest
from rich.console import Console

from dualtrain.checkpoint.trained import open_trained
from dualtrain.generate import view as views
from dualtrain.generate.diffusion import Filled
from dualtrain.generate.settings import Settings
from dualtrain.generate.texts import Prompt, TextJob, generate_texts, prepare
from dualtrain.generate.view import StreamView, UnmaskView, frame


@pytest.fixture(scope="module")
def trained(exported):
    return open_trained(exported)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), force_terminal=True, width=60, height=12, color_system=None)


def show(trained, view, texts, **settings):
    """Make texts with a view; return them."""
    wanted = Settings(**settings)
    made = []
    prompts = prepare(texts, wanted, trained)
    for text in generate_texts(prompts, wanted, trained, view):
        view.show(text)
        made.append(text)
    view.close()
    return made


def test_streamed_text_is_the_text(trained, console):
    view = StreamView(console, trained.tokenizer, with_headings=True)
    made = show(trained, view, ["The cat", "on"], samples=2, tokens=9)
    expected = "".join(
        f"--- prompt {text.job.prompt.number + 1}, sample {text.job.sample + 1} ---\n"
        + views.printable(trained.decode(list(text.ids)))
        + "\n"
        for text in made
    )
    assert console.file.getvalue() == expected


def test_text_is_shown_while_it_is_made(trained, console):
    shown = []

    class Watched(StreamView):
        def token(self, row, token):
            super().token(row, token)
            shown.append(console.file.getvalue())

    view = Watched(console, trained.tokenizer, with_headings=False)
    (text,) = show(trained, view, ["The cat"], tokens=9)
    assert shown[0].startswith("The cat")
    assert len(set(shown)) > 5
    for earlier, later in zip(shown, shown[1:], strict=False):
        assert later.startswith(earlier)
    assert shown[-1] == views.printable(trained.decode(list(text.ids))) + "\n"


def test_unmasking_is_drawn_and_the_text_is_left(trained, console, monkeypatch):
    monkeypatch.setattr(views, "FRAME_S", 0.0)
    mask_id = trained.vocabulary.mask_id
    view = UnmaskView(console, trained.tokenizer, with_headings=False, mask_id=mask_id)
    (text,) = show(trained, view, ["The <mask:3> sat"], mode="diffusion", order="left_to_right")
    drawn = console.file.getvalue()
    for step, left in ((0, 3), (1, 2), (2, 1), (3, 0)):
        assert f"step {step}, {left} masked" in drawn
    assert drawn.endswith(views.printable(trained.decode(list(text.ids))) + "\n")


def test_a_frame(tokenizer):
    ids = [1, *tokenizer.encode("The", add_special_tokens=False).ids, 4, 4, 4]
    job = TextJob(Prompt(0, "The <mask:3>", tuple(ids), 3, has_gaps=True), 1)
    row = views._PartialText.of(job, 4)
    cat, sat = (tokenizer.encode(w, add_special_tokens=False).ids[0] for w in (" cat", " sat"))
    row.take(Filled(0, [*ids[:-3], cat, 4, 4], [len(ids) - 3]))
    row.take(Filled(0, [*ids[:-3], cat, 4, sat], [len(ids) - 1]))
    size = {"width": 40, "height": 10}
    head, text = frame([row], tokenizer, with_headings=True, **size)
    assert head.plain == "prompt 1, sample 2, step 2, 1 masked"
    assert text.plain == "The cat \u2592\u2592\u2592 sat"
    styles = {text.plain[span.start : span.end].strip(): str(span.style) for span in text.spans}
    assert styles["cat"] == "magenta"
    assert "reverse" in styles["sat"]
    assert "black" in styles["\u2592\u2592\u2592"]


@pytest.mark.parametrize("height", [2, 5, 24])
def test_a_frame_fits_and_shows_what_was_filled_last(tokenizer, height):
    ids = [1] + [4] * 200
    row = views._PartialText.of(TextJob(Prompt(0, "", tuple(ids), 200, has_gaps=False), 0), 4)
    cat = tokenizer.encode(" cat", add_special_tokens=False).ids[0]
    row.take(Filled(0, [*ids[:150], cat, *ids[151:]], [150]))
    lines = frame([row], tokenizer, width=40, height=height, with_headings=False)
    assert len(lines) <= height - 1
    assert all(len(line.plain.rstrip()) <= 40 for line in lines)
    assert any("cat" in line.plain for line in lines)


def test_generated_escape_sequences_do_not_reach_the_terminal(trained, console):
    escape = trained.tokenizer.token_to_id("\u011b")  # how byte-level BPE writes byte 27
    assert trained.decode([escape]) == "\x1b"
    prompt = Prompt(0, "The", (1, 50), 0, has_gaps=False)
    view = StreamView(console, trained.tokenizer, with_headings=False)
    view.begin([TextJob(prompt, 0)])
    for token in (escape, 60, None):
        view.token(0, token)
    assert not re.search("\x1b", console.file.getvalue())
