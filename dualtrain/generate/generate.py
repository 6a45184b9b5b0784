"""What ``dualtrain generate`` does: check, load, generate, show, write."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rich.console import Console

from dualtrain.checkpoint.trained import TrainedModel, check_precision, open_trained
from dualtrain.common.errors import UserError, raise_together
from dualtrain.common.input_files import check_unicode
from dualtrain.generate.autoregressive import Stop
from dualtrain.generate.files import read_prompts, record, refuse_existing, result_file
from dualtrain.generate.prompts import has_gap, split_gaps
from dualtrain.generate.settings import with_mode
from dualtrain.generate.texts import Text, generate_texts, prepare
from dualtrain.generate.view import (
    CountView,
    PlainTextView,
    StreamView,
    TextView,
    TraceView,
    UnmaskView,
)

if TYPE_CHECKING:
    from dualtrain.generate.command import GenerateOptions

_STOPS: dict[Stop, str] = {
    "end": "ended by the model",
    "tokens": "as long as asked for",
    "context": "stopped by the context of {context} tokens",
    "filled": "filled",
}


def generate_and_show(options: GenerateOptions) -> None:
    """Generate texts, and show or write them.

    Raises:
        UserError: Whatever the user can mend; before the model is loaded where it can be known.
    """
    texts, places = _prompts(options)
    options = with_mode(options, gaps=_gaps(texts, places, options.mode), prompts=len(texts))
    _check(options)
    model = open_trained(
        options.path,
        step=options.step,
        device=options.device,
        precision=options.precision,
        on_note=_note,
    )
    prompts = prepare(texts, options, model, places=places)
    for doubt in _doubts(model, options):
        _note(doubt)
    began, done = time.monotonic(), []
    with ExitStack() as stack:
        write = stack.enter_context(result_file(options.out)) if options.out else None
        view = _view(options, model, len(prompts) * options.samples)
        stack.callback(view.close)
        for text in generate_texts(prompts, options, model, view):
            if write is not None:
                write(record(text, options, model))
            view.show(text)
            done.append(text)
    took_s = time.monotonic() - began - view.paused_s
    _tell(_summary(done, model, options, took_s))
    if options.out:
        _tell(f"written to {options.out}")


def _prompts(options: GenerateOptions) -> tuple[list[str], list[str]]:
    """The prompts, and what to call each in an error."""
    if options.file is None:
        check_unicode(options.prompt or "", "prompt")
        return [options.prompt or ""], ["prompt"]
    if options.prompt is not None:
        both = f"{options.file}, and a prompt is given, too"
        raise UserError("--file", both, "one of both")
    return read_prompts(options.file)


def _gaps(texts: Sequence[str], places: Sequence[str], mode: str | None) -> list[str]:
    """The places of the texts with gaps, which are well formed where they imply the mode."""
    gaps = []
    for text, place in zip(texts, places, strict=True):
        if has_gap(text):
            gaps.append(place)
            if mode is None:
                split_gaps(text, place)
    return gaps


def _check(options: GenerateOptions) -> None:
    """Refuse early what does not go together."""
    check_precision(options.precision)
    wrong = []
    if options.trace and not options.is_diffusion:
        wrong.append(UserError("--trace", f"mode {options.mode} has no steps", "mode diffusion"))
    if options.trace and options.out:
        wrong.append(UserError("--trace", "shows what --out writes elsewhere", "one of both"))
    if options.out:
        refuse_existing(options.out)
    raise_together(wrong)


def _view(options: GenerateOptions, model: TrainedModel, total: int) -> TextView:
    console, tokenizer = Console(), model.tokenizer
    is_live = console.is_terminal and not options.plain
    if options.out and is_live:
        return CountView(console, tokenizer, total=total)
    if options.out:
        kind = TextView
    elif options.trace:
        kind = TraceView
    elif not is_live:
        kind = PlainTextView
    else:
        kind = UnmaskView if options.is_diffusion else StreamView
    return kind(console, tokenizer, with_headings=total > 1, mask_id=model.vocabulary.mask)


def _doubts(model: TrainedModel, options: GenerateOptions) -> Iterator[str]:
    """What makes good text unlikely."""
    if model.alpha == 0 and options.mode == "ar":
        yield "trained with alpha 0: this model has never predicted text from left to right"
    if model.alpha == 1 and options.is_diffusion:
        yield "trained with alpha 1: this model has never seen a mask"


def _summary(
    texts: Sequence[Text], model: TrainedModel, options: GenerateOptions, elapsed_s: float
) -> str:
    """How many tokens in which time, and why the texts ended."""
    tokens = sum(len(text.new_ids) for text in texts)
    many = f"{len(texts)} text" + ("s" if len(texts) > 1 else "")
    stops = Counter(_STOPS[text.stop].format(context=model.context) for text in texts)
    why = ", ".join(
        reason if len(texts) == 1 else f"{number} {reason}" for reason, number in stops.items()
    )
    return (
        f"{model.source.name}, {options.mode}: {many}, {tokens} tokens in {elapsed_s:.1f} s "
        f"({tokens / elapsed_s:.0f} tokens/s); {why}"
    )


def _note(text: str) -> None:
    _tell(f"note: {text}")


def _tell(text: str) -> None:
    """Beside the texts, so that a pipe gets nothing but them."""
    print(text, file=sys.stderr)
