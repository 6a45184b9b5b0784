"""Texts that the harness's tasks ask a model to write (``generate_until``).

Called by ``lm_eval``, the model type; written with the samplers of ``dualtrain generate``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from dualtrain.checkpoint.trained import TrainedModel
from dualtrain.common.errors import UserError, nearest
from dualtrain.common.randomness import generator
from dualtrain.generate.autoregressive import continue_prompts
from dualtrain.generate.diffusion import fill_masks
from dualtrain.generate.prompts import encode_prompt
from dualtrain.generate.settings import Settings

CACHED_TOKENS = 8192
"""Tokens in the cache at once, unless a number is given."""
NEUTRAL = {"num_beams": 1}
"""Settings of other backends that tasks give with a value that means nothing."""
SETTINGS = (
    "until",
    "max_gen_toks",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
)


@dataclass(frozen=True, slots=True)
class Order:
    """A text to be written.

    Attributes:
        prompt: Token ids, the first of them ``<s>``.
        key: Of its random numbers: what the text is, not where it stands.
    """

    prompt: tuple[int, ...]
    until: tuple[str, ...]
    settings: Settings
    key: tuple[int, int]

    def generator(self) -> np.random.Generator:
        """Return its random numbers from their beginning."""
        return generator(self.settings.seed, "lm_eval", *self.key)


def write_texts(
    trained: TrainedModel,
    requests: Sequence[tuple[str, dict[str, object]]],
    settings: Settings,
    *,
    tokens_per_batch: int | None = None,
    on_text: Callable[[int, str], None],
    on_note: Callable[[str], None],
) -> list[str]:
    """Continue prompts until a string or token that ends the text.

    In mode ``diffusion`` a text is as long as it may be, and cut at the string afterwards.

    Args:
        requests: Prompts, each with a task's ``generation_kwargs``.
        settings: Mode and seed, and how many tokens where ``generation_kwargs`` do not say.
        tokens_per_batch: Tokens in the cache, or of a pass, at once; None is :data:`CACHED_TOKENS`.
        on_text: Told the number of each request and its text as soon as it is there.
        on_note: Told what the user should know.

    Returns:
        One text for each request, without the string that ended it.

    Raises:
        UserError: A setting that does not exist here.
    """
    orders = _take_orders(trained, requests, settings, on_note)
    texts = [""] * len(orders)
    for batch in _batches(orders, tokens_per_batch or CACHED_TOKENS):
        chosen = [orders[number] for number in batch]
        written = (_fill if settings.is_diffusion else _continue)(trained, chosen)
        for number, order, ids in zip(batch, chosen, written, strict=True):
            text = trained.decode(ids)
            texts[number] = postprocess_generated_text(text, list(order.until), None)
            on_text(number, texts[number])
    return texts


def _continue(trained: TrainedModel, orders: Sequence[Order]) -> list[list[int]]:
    def is_enough(row: int, ids: Sequence[int]) -> bool:
        until = orders[row].until
        text = trained.decode(list(ids)) if until else ""
        return any(stop in text for stop in until)

    settings = orders[0].settings
    written = continue_prompts(
        trained,
        [order.prompt for order in orders],
        settings,
        generators=[order.generator() for order in orders],
        is_enough=is_enough,
    )
    return [list(continuation.ids) for continuation in written]


def _fill(trained: TrainedModel, orders: Sequence[Order]) -> list[list[int]]:
    mask, settings = trained.vocabulary.mask, orders[0].settings
    if mask is None:
        what = "'diffusion' needs a mask token, and this model has none"
        raise UserError("--model_args mode", what, "ar or prefix")
    blocks = -(-settings.tokens // (settings.block or settings.tokens))
    if settings.steps is not None and settings.steps < blocks:
        what = f"{settings.steps} for {settings.tokens} tokens in blocks of {settings.block}"
        raise UserError("--model_args steps", what, f"{blocks} or more, one a block")
    rows = [[*order.prompt, *[mask] * settings.tokens] for order in orders]
    generators = [order.generator() for order in orders]
    filled = fill_masks(trained, rows, settings, generators=generators)
    return [ids[-settings.tokens :] for ids in filled]


def _take_orders(
    trained: TrainedModel,
    requests: Sequence[tuple[str, dict[str, object]]],
    defaults: Settings,
    on_note: Callable[[str], None],
) -> list[Order]:
    orders, repeats, shortened, capped = [], Counter(), 0, 0
    # Half of the context is the prompt's at least: it holds the question.
    most = max(1, trained.context // 2)
    for prompt, values in requests:
        until, settings = _read_settings(values, defaults)
        capped += settings.tokens > most
        settings = replace(settings, tokens=min(settings.tokens, most))
        begin, *ids = encode_prompt(prompt, trained.tokenizer, bos_id=trained.vocabulary.bos_id)
        room = trained.context - settings.tokens - 1
        shortened += len(ids) > room
        digest = hashlib.sha256(prompt.encode()).digest()[:8]
        key = (int.from_bytes(digest, "little"), repeats[prompt])
        repeats[prompt] += 1
        kept = ids[max(0, len(ids) - room) :]
        orders.append(Order((begin, *kept), until, settings, key))
    if capped:
        on_note(f"{capped} of {len(orders)} texts end after {most} tokens, half of the context")
    if shortened:
        on_note(
            f"{shortened} of {len(orders)} prompts lost their beginning: with what is to be written"
            f" they exceed the context of {trained.context} tokens"
        )
    return orders


def _read_settings(
    given: dict[str, object], defaults: Settings
) -> tuple[tuple[str, ...], Settings]:
    """Translate a task's ``generation_kwargs``, with the harness's own defaults."""
    values: dict[str, Any] = {**normalize_gen_kwargs(given, defaults.tokens)}
    for key, value in values.items():
        known = SETTINGS[:-1] if defaults.is_diffusion else SETTINGS
        if key in known or (key in NEUTRAL and value == NEUTRAL[key]):
            continue
        raise UserError(
            f"generation_kwargs.{key}",
            f"{value!r} is not available",
            f"one of {', '.join(known)}",
            nearest(key, known),
        )
    settings = replace(
        defaults,
        tokens=values["max_gen_toks"],
        temperature=float(values.get("temperature", 1.0)) if values["do_sample"] else 0.0,
        top_k=values.get("top_k") or None,
        top_p=values.get("top_p"),
        repetition_penalty=values.get("repetition_penalty", 1.0),
    )
    return tuple(stop for stop in values["until"] if stop), settings


def _batches(orders: Sequence[Order], cached_tokens: int) -> Iterator[list[int]]:
    """Put texts together that are written alike and are about equally long; longest first."""
    groups: dict[Settings, list[int]] = {}
    for number, order in enumerate(orders):
        groups.setdefault(order.settings, []).append(number)
    for settings, numbers in groups.items():
        numbers.sort(key=lambda number: -len(orders[number].prompt))
        while numbers:
            width = len(orders[numbers[0]].prompt) + settings.tokens
            count = max(1, cached_tokens // width)
            yield numbers[:count]
            del numbers[:count]
