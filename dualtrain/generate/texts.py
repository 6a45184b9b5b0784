"""Texts for prompts: in any mode, several samples of each, in batches, in order.

``dualtrain generate`` is a thin layer over :func:`prepare` and :func:`generate_texts`; use them
from Python as well::

    model, settings = open_trained("runs/quickstart"), Settings(mode="ar", tokens=20)
    prompts = prepare(["A list"], settings, model)
    for text in generate_texts(prompts, settings, model):
        print(text.written(model.tokenizer))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from dualtrain.checkpoint.trained import TrainedModel
from dualtrain.common import randomness
from dualtrain.common.errors import UserError, raise_together
from dualtrain.generate.autoregressive import Stop, continue_prompts
from dualtrain.generate.decode import TextPiece, label_pieces
from dualtrain.generate.diffusion import Filled, fill_masks, plan_passes
from dualtrain.generate.prompts import encode_prompt, has_gap, parse_gaps
from dualtrain.generate.settings import Settings
from dualtrain.model.handle import ModelHandle
from dualtrain.model.memory import is_out_of_memory

# 256 MiB of float32 logits, of which a few copies are made, some in float64.
_MAX_LOGITS = 2**26


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model gets it.

    Attributes:
        number: Which one, from 0 on.
        ids: With a mask for every token that diffusion is to fill in.
    """

    number: int
    text: str
    ids: tuple[int, ...]
    masks: int
    has_gaps: bool


@dataclass(frozen=True, slots=True)
class TextJob:
    """One text that is to be made: a prompt, and which sample of it."""

    prompt: Prompt
    sample: int


@dataclass(frozen=True, slots=True)
class Text:
    """A text that was made.

    Attributes:
        ids: Of the whole text, with its prompt, beginning with ``<s>``.
        is_new: Of each id, whether the model has written it.
    """

    job: TextJob
    ids: tuple[int, ...]
    is_new: tuple[bool, ...]
    stop: Stop

    @property
    def new_ids(self) -> list[int]:
        """What the model has written."""
        return [token for token, new in zip(self.ids, self.is_new, strict=True) if new]

    def pieces(self, tokenizer: Tokenizer) -> list[TextPiece[bool]]:
        """The text in order, labelled with whether the model has written it."""
        return label_pieces(self.ids, self.is_new, tokenizer)

    def written(self, tokenizer: Tokenizer) -> str:
        """What follows the prompt, or the whole text where gaps were filled."""
        whole = self.job.prompt.has_gaps
        return "".join(piece.text for piece in self.pieces(tokenizer) if piece.label or whole)


class Watcher:
    """Told of texts while they are made. Every method does nothing until a view needs it."""

    def begin(self, jobs: Sequence[TextJob]) -> None:
        """Note that a batch begins; rows below are numbered as these are."""

    def token(self, row: int, token: int | None) -> None:
        """Note a new token of a row, or with None that its text has ended (ar, prefix)."""

    def step(self, done: list[Filled]) -> None:
        """Note what a pass of the model did (diffusion)."""

    def note(self, text: str) -> None:
        """Tell the user something."""


def prepare(
    texts: Sequence[str],
    settings: Settings,
    model: TrainedModel,
    *,
    places: Sequence[str] | None = None,
) -> list[Prompt]:
    """Encode prompts and see whether the model can take them.

    Args:
        texts: The prompts; an empty one begins a document.
        places: What to call each in an error, such as ``FILE:LINE``.

    Raises:
        UserError: Prompts that do not fit the context or have malformed gaps, each with its place;
            a model without mask token in diffusion mode.
    """
    if settings.is_diffusion and model.vocabulary.mask is None:
        raise UserError(
            "--mode", "diffusion needs a mask token, and this model has none", "ar or prefix"
        )
    prompts, wrong = [], []
    for number, text in enumerate(texts):
        where = "prompt" if places is None else places[number]
        try:
            prompts.append(_prepare(number, text, settings, model, where))
        except UserError as error:
            wrong.append(error)
    raise_together(wrong)
    return prompts


def generate_texts(
    prompts: Sequence[Prompt],
    settings: Settings,
    model: ModelHandle,
    watcher: Watcher | None = None,
) -> Iterator[Text]:
    """Make the texts, all samples of a prompt before those of the next.

    The random numbers of a text follow from (seed, number of the prompt, sample), so it is the same
    whatever else is made, up to what rounding changes in the model's outputs.

    Args:
        prompts: From :func:`prepare`.
        settings: What is to be made of them.
        watcher: Told of texts while they are made.

    Raises:
        UserError: Memory does not suffice for a single text.
    """
    watcher, at_once = watcher or Watcher(), settings.batch
    left = [TextJob(prompt, sample) for prompt in prompts for sample in range(settings.samples)]
    while left:
        jobs = left[: _fitting(left[:at_once], settings, model)]
        watcher.begin(jobs)
        try:
            texts = _make(jobs, settings, model, watcher)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(jobs) == 1:
                raise UserError(
                    "memory", "does not suffice for a single text", hint="try --device cpu"
                ) from None
            at_once = len(jobs) // 2
            watcher.note(f"out of memory with {len(jobs)} texts at once; going on with half of it")
            continue
        left = left[len(jobs) :]
        yield from texts


def _prepare(number: int, text: str, settings: Settings, model: TrainedModel, where: str) -> Prompt:
    tokenizer, vocabulary = model.tokenizer, model.vocabulary
    gaps = settings.is_diffusion and has_gap(text)
    if gaps:
        mask_id = vocabulary.mask_id
        ids = parse_gaps(text, tokenizer, bos_id=vocabulary.bos_id, mask_id=mask_id, where=where)
    else:
        ids = encode_prompt(text, tokenizer, bos_id=vocabulary.bos_id)
    # Behind a full context there is one more token to predict, but none to fill in.
    most = model.context - (settings.is_diffusion and not gaps)
    if len(ids) > most:
        with_what = " with the gaps" if gaps else ""
        expected = f"at most {most}, by the model's context"
        raise UserError(where, f"{len(ids)} tokens with <s>{with_what}", expected)
    if not settings.is_diffusion:
        return Prompt(number, text, tuple(ids), 0, has_gaps=False)
    if not gaps:
        ids += [vocabulary.mask_id] * min(settings.tokens, model.context - len(ids))
    masks = ids.count(vocabulary.mask_id)
    try:
        plan_passes(masks, steps=settings.steps, block=settings.block)
    except UserError as error:
        raise UserError(f"{where}: {error.where}", error.what, error.expected) from None
    return Prompt(number, text, tuple(ids), masks, has_gaps=gaps)


def _fitting(jobs: Sequence[TextJob], settings: Settings, model: ModelHandle) -> int:
    """How many of the jobs one batch takes, at least one."""
    if not settings.is_diffusion:
        return len(jobs)
    count = logits = 0
    for job in jobs:
        masks = job.prompt.masks
        logits += min(masks, settings.block or masks) * model.vocabulary.size
        if count and logits > _MAX_LOGITS:
            break
        count += 1
    return count


def _make(
    jobs: Sequence[TextJob], settings: Settings, model: ModelHandle, watcher: Watcher
) -> list[Text]:
    generators = [
        randomness.generator(settings.seed, "generate", job.prompt.number, job.sample)
        for job in jobs
    ]
    rows = [job.prompt.ids for job in jobs]
    if settings.is_diffusion:
        filled = fill_masks(model, rows, settings, generators=generators, on_step=watcher.step)
        return [_filled(job, row, settings, model) for job, row in zip(jobs, filled, strict=True)]
    continued = continue_prompts(
        model, rows, settings, generators=generators, on_token=watcher.token
    )
    return [
        Text(
            job,
            (*job.prompt.ids, *new.ids),
            (False,) * len(job.prompt.ids) + (True,) * len(new.ids),
            new.stop,
        )
        for job, new in zip(jobs, continued, strict=True)
    ]


def _filled(job: TextJob, row: list[int], settings: Settings, model: ModelHandle) -> Text:
    is_new = tuple(token == model.vocabulary.mask for token in job.prompt.ids)
    stop: Stop = "filled"
    if not job.prompt.has_gaps:
        stop = "tokens" if sum(is_new) == settings.tokens else "context"
    return Text(job, tuple(row), is_new, stop)
