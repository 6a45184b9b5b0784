"""What ``dualtrain generate`` does: check, load, generate, show, write."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dualtrain.checkpoint.trained import TrainedModel, check_precision, open_trained
from dualtrain.common.errors import UserError, raise_together
from dualtrain.common.input_files import check_unicode
from dualtrain.generate.autoregressive import Stop
from dualtrain.generate.files import ResultFile, read_prompts, record, refuse_existing
from dualtrain.generate.prompts import has_gap
from dualtrain.generate.settings import Settings, Wishes, read_settings
from dualtrain.generate.text_model import TextModel
from dualtrain.generate.texts import ROWS_AT_ONCE, Text, generate_texts, prepare
from dualtrain.generate.view import (
    CountView,
    PlainView,
    StreamView,
    TraceView,
    UnmaskView,
    View,
)

_STOPS: dict[Stop, str] = {
    "end": "ended by the model",
    "tokens": "as long as asked for",
    "context": "stopped by the context of {context} tokens",
    "filled": "filled",
}


@dataclass(frozen=True, slots=True)
class Request:
    """The command line of ``dualtrain generate``, but for the wishes.

    Args:
        prompt: Given on the command line; None where there is none.
        out: Where texts are written, in place of being shown.
        plain: Finished texts only, also on a terminal.
        trace: A line for each step of diffusion.
    """

    path: Path
    prompt: str | None = None
    file: Path | None = None
    out: Path | None = None
    step: int | None = None
    device: str | None = None
    precision: str | None = None
    batch: int = ROWS_AT_ONCE
    plain: bool = False
    trace: bool = False


def generate(request: Request, wishes: Wishes) -> None:
    """Generate texts, and show or write them.

    Raises:
        UserError: Whatever the user can mend; before the model is loaded where it can be known.
    """
    texts, places = _prompts(request)
    gaps = [place for text, place in zip(texts, places, strict=True) if has_gap(text)]
    settings = read_settings(wishes, gaps=gaps, prompts=len(texts))
    _check(request, settings)
    trained = open_trained(
        request.path,
        step=request.step,
        device=request.device,
        precision=request.precision,
        on_note=_note,
    )
    model = TextModel.of(trained)
    prompts = prepare(texts, settings, model, trained.tokenizer, places=places)
    for doubt in _doubts(trained, settings):
        _note(doubt)
    began, done = time.monotonic(), []
    with ExitStack() as stack:
        results = stack.enter_context(ResultFile(request.out)) if request.out else None
        view = _view(request, settings, trained, len(prompts) * settings.samples)
        stack.callback(view.close)
        for text in generate_texts(
            prompts, settings, model, rows_at_once=request.batch, watcher=view
        ):
            if results is not None:
                path = str(trained.source.path)
                results.write(record(text, settings, trained.tokenizer, model=path))
            view.show(text)
            done.append(text)
    took_s = time.monotonic() - began - view.paused_s
    _tell(_summary(done, trained, settings, took_s))
    if request.out:
        _tell(f"written to {request.out}")


def _prompts(request: Request) -> tuple[list[str], list[str]]:
    """The prompts, and what to call each in an error."""
    if request.file is None:
        check_unicode(request.prompt or "", "prompt")
        return [request.prompt or ""], ["prompt"]
    if request.prompt is not None:
        both = f"{request.file}, and a prompt is given, too"
        raise UserError("--file", both, "one of both")
    return read_prompts(request.file)


def _check(request: Request, settings: Settings) -> None:
    """Refuse early what does not go together."""
    wrong = []
    if request.batch < 1:
        wrong.append(UserError("--batch", f"{request.batch}", "1 or more"))
    check_precision(request.precision)
    if request.trace and not settings.is_diffusion:
        wrong.append(UserError("--trace", f"mode {settings.mode} has no steps", "mode diffusion"))
    if request.trace and request.out:
        wrong.append(UserError("--trace", "shows what --out writes elsewhere", "one of both"))
    if request.out:
        refuse_existing(request.out)
    raise_together(wrong)


def _view(request: Request, settings: Settings, trained: TrainedModel, total: int) -> View:
    console, tokenizer = Console(), trained.tokenizer
    mask_id = trained.vocabulary.mask
    several = total > 1
    is_live = console.is_terminal and not request.plain
    if request.out:
        if is_live:
            return CountView(console, tokenizer, total=total)
        return View(console, tokenizer, with_headings=several)
    if request.trace:
        assert mask_id is not None  # prepare has seen to it
        return TraceView(console, tokenizer, with_headings=several, mask_id=mask_id)
    if not is_live:
        return PlainView(console, tokenizer, with_headings=several)
    if settings.is_diffusion:
        assert mask_id is not None
        return UnmaskView(console, tokenizer, with_headings=several, mask_id=mask_id)
    return StreamView(console, tokenizer, with_headings=several)


def _doubts(trained: TrainedModel, settings: Settings) -> Iterator[str]:
    """What makes good text unlikely."""
    if trained.alpha == 0 and settings.mode == "ar":
        yield "trained with alpha 0: this model has never predicted text from left to right"
    if trained.alpha == 1 and settings.is_diffusion:
        yield "trained with alpha 1: this model has never seen a mask"


def _summary(
    texts: Sequence[Text], trained: TrainedModel, settings: Settings, elapsed_s: float
) -> str:
    """How many tokens in which time, and why the texts ended."""
    tokens = sum(len(text.new_ids) for text in texts)
    many = f"{len(texts)} text" + ("s" if len(texts) > 1 else "")
    stops = Counter(_STOPS[text.stop].format(context=trained.context) for text in texts)
    why = ", ".join(
        reason if len(texts) == 1 else f"{number} {reason}" for reason, number in stops.items()
    )
    return (
        f"{trained.source.name}, {settings.mode}: {many}, {tokens} tokens in {elapsed_s:.1f} s "
        f"({tokens / elapsed_s:.0f} tokens/s); {why}"
    )


def _note(text: str) -> None:
    _tell(f"note: {text}")


def _tell(text: str) -> None:
    """Beside the texts, so that a pipe gets nothing but them."""
    print(text, file=sys.stderr)
