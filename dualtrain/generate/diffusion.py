"""Masked text filled in step by step, reading the whole row at each one.

Used for gaps in a text, and for text behind a prompt: that is one gap. Masks are filled in blocks
from left to right (semi-autoregressively), and within a block in the order of confidence, at random
or from left to right. Every step predicts all masks of the block at once and keeps some of them; a
token that is filled in stays. Several rows go through the model at once, each with its own random
numbers. Special tokens are never produced, the one that ends a text included: a gap has the length
that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualtrain.common.errors import UserError
from dualtrain.generate.choose import choose
from dualtrain.generate.rows import allowed_logits, fill_up
from dualtrain.generate.settings import Settings
from dualtrain.model.handle import ModelHandle
from dualtrain.network.attention import plan_attention


class Pass(NamedTuple):
    """One denoising step of a row: so many of its first ``reach`` masks are filled."""

    reach: int
    fills: int


@dataclass(frozen=True, slots=True)
class Filled:
    """What a step did to a row: positions just filled, ascending."""

    row: int
    ids: list[int]
    fresh: list[int]


def fill_masks(
    model: ModelHandle,
    rows: Sequence[Sequence[int]],
    settings: Settings,
    *,
    generators: Sequence[np.random.Generator],
    on_step: Callable[[list[Filled]], None] = lambda done: None,
) -> list[list[int]]:
    """Fill every mask; all else stays as it is.

    Of a block's predictions those are kept first that have the highest probability (the model's
    own, at temperature 1), random ones (the reverse of how training masks), or the leftmost.

    Args:
        rows: Token ids with ``mask_id`` where text is wanted; the first is usually ``<s>``.
        generators: One for each row, of its random numbers.
        on_step: Told after each pass of the model what it did, to those rows that were in it.

    Returns:
        The rows, filled.

    Raises:
        UserError: A row is longer than the context, there are fewer steps than blocks, or a first
            token is masked while the target is the next token (then nothing predicts it).
    """
    _check(model, rows)
    texts = []
    for number, (row, generator) in enumerate(zip(rows, generators, strict=True)):
        masked = [position for position, token in enumerate(row) if token == model.vocabulary.mask]
        passes = plan_passes(len(masked), steps=settings.steps, block=settings.block)
        texts.append(_MaskedRow(number, list(row), masked, passes, generator))
    going = [text for text in texts if text.passes]
    with model.inference():
        while going:
            asked = [text.candidates(settings.order) for text in going]
            predicted = _predict(model, going, asked, settings)
            done = []
            for text, positions, (tokens, confidence) in zip(going, asked, predicted, strict=True):
                fresh = text.fill(positions, tokens, confidence)
                done.append(Filled(text.number, list(text.ids), fresh))
            on_step(done)
            going = [text for text in going if text.passes]
    return [text.ids for text in texts]


def plan_passes(masks: int, *, steps: int | None, block: int | None) -> list[Pass]:
    """Share the masks of a row among its steps, evenly: blocks by their length, then masks.

    Args:
        steps: Passes in all; None is one a mask, and more than that are never made.
        block: Masks in a block; None is all.

    Raises:
        UserError: Fewer steps than blocks.
    """
    size = min(block or masks, masks)
    blocks = [min(size, masks - begin) for begin in range(0, masks, size or 1)]
    left = masks if steps is None else min(steps, masks)
    if left < len(blocks):
        many = f"{steps} for {masks} masks in {len(blocks)} blocks of {size}"
        raise UserError("--steps", many, "at least one a block")
    passes, begin = [], 0
    for number, length in enumerate(blocks):
        behind = masks - begin - length
        share = round(left * length / (length + behind))
        # At least one for each block behind, and no more than they have masks.
        fewest, most = max(1, left - behind), min(length, left - (len(blocks) - number - 1))
        share = max(fewest, min(share, most))
        begin, left = begin + length, left - share
        passes += [Pass(begin, fills) for fills in _divide(length, share)]
    return passes


def _divide(masks: int, steps: int) -> list[int]:
    """Divide evenly, the greater parts first."""
    return [masks // steps + (step < masks % steps) for step in range(steps)]


@dataclass
class _MaskedRow:
    """One row in the making.

    Attributes:
        ids: As far as it is filled.
        masked: All positions that were masked at the beginning.
        passes: Those that are yet to be made.
    """

    number: int
    ids: list[int]
    masked: list[int]
    passes: list[Pass]
    generator: np.random.Generator
    filled: set[int] = field(default_factory=set)

    def candidates(self, order: str) -> list[int]:
        """The positions that a pass predicts; more than it fills if they have to be compared."""
        reach, fills = self.passes[0]
        positions = [place for place in self.masked[:reach] if place not in self.filled]
        if order == "confidence":
            return positions
        if order == "left_to_right":
            return positions[:fills]
        chosen = sorted(self.generator.permutation(len(positions))[:fills])
        return [positions[index] for index in chosen]

    def fill(self, positions: list[int], tokens: Tensor, confidence: Tensor) -> list[int]:
        """Make a pass: keep the surest predictions; return their positions."""
        # Stable, so that of equals the leftmost comes first on every machine.
        surest = confidence.argsort(descending=True, stable=True)[: self.passes.pop(0).fills]
        fresh = {positions[index]: int(tokens[index]) for index in surest.tolist()}
        for position, token in fresh.items():
            self.ids[position] = token
        self.filled |= fresh.keys()
        return sorted(fresh)


def _check(model: ModelHandle, rows: Sequence[Sequence[int]]) -> None:
    if model.vocabulary.mask is None:
        raise UserError("--mode", "diffusion needs a mask token, and this model has none", "ar")
    for row in rows:
        if len(row) > model.context:
            expected = f"at most {model.context}, the model's context"
            raise UserError("prompt", f"{len(row)} tokens with the gaps", expected)
        if model.target == "next" and list(row[:1]) == [model.vocabulary.mask]:
            raise UserError(
                "prompt",
                "the first token is masked, and no position predicts it",
                hint="begin with `<s>`",
            )


def _predict(
    model: ModelHandle,
    texts: Sequence[_MaskedRow],
    asked: Sequence[list[int]],
    settings: Settings,
) -> list[tuple[Tensor, Tensor]]:
    """Predict some positions of each row.

    Returns:
        For each row (N,) int64 tokens, and (N,) float32 probabilities that the model gives them; on
        the CPU.
    """
    ids, documents = fill_up([text.ids for text in texts])
    plan = plan_attention("full", documents, backend="sdpa", device=model.device, dtype=model.dtype)
    shift = 1 if model.target == "next" else 0
    readers = [
        row * ids.shape[1] + position - shift
        for row, positions in enumerate(asked)
        for position in positions
    ]
    logits = allowed_logits(model, ids, plan, torch.tensor(readers), may_stop=False)
    numbers = None
    if not settings.is_greedy:
        drawn = [
            text.generator.random(len(positions))
            for text, positions in zip(texts, asked, strict=True)
        ]
        numbers = torch.from_numpy(np.concatenate(drawn))
    tokens = choose(logits, settings, numbers)
    confidence = logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]
    counts = [len(positions) for positions in asked]
    return list(zip(tokens.cpu().split(counts), confidence.cpu().split(counts), strict=True))
