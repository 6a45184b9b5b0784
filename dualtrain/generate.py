"""Text from a model: autoregressive sampling, and infilling by iterated unmasking.

``train`` calls these at the end of a run; they work on ids and a callable model, so that a command
line only adds loading and printing. There is no key-value cache: every token costs one pass over
the whole row, which is right for samples, not for serving (an exported model has an inference
engine for that). All rows of a call have one length, so a compiled model compiles once.

Everything follows from the seed: random numbers come from a generator of the call's own, on the
CPU. Under ZeRO-3 all ranks must call, with the same arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dualtrain.errors import UserError
from dualtrain.evaluate.mode import inference
from dualtrain.model import DualOutput, plan_attention

Order = Literal["confidence", "left_to_right", "random"]
Target = Literal["next", "in_place"]
Pieces = tuple[tuple[str, bool], ...]

_GAP = re.compile(r" ?<mask(?::(\d{1,6}))?>")
_GAP_REMAINS = re.compile(r"<mask\b.{0,20}", re.DOTALL)
_GAP_SYNTAX = "<mask:N> with N of 1 or more, or <mask> for a single token"


class Encoding(Protocol):
    """What a tokenizer makes of a text."""

    ids: list[int]


class Tokenizer(Protocol):
    """The part of ``tokenizers.Tokenizer`` that is needed here."""

    def encode(self, sequence: str, *, add_special_tokens: bool) -> Encoding: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


def sample_autoregressive(
    model: Callable[..., DualOutput],
    prompt_ids: Sequence[int],
    *,
    tokens: int,
    context: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    forbidden_ids: Collection[int] = (),
    vocab_size: int | None = None,
    device: torch.device | str = "cpu",
    backend: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> list[int]:
    """Continue a prompt, one token at a time, causally.

    Args:
        model: ``DualLM`` or an engine around it.
        prompt_ids: Ids of the prompt, usually beginning with ``<s>``; at least one, and at most
            ``context``: a longer prompt is refused rather than cut behind the user's back.
        tokens: Tokens to generate. Past the context the oldest tokens leave the window.
        context: Longest row the model is given, in tokens.
        seed: Decides every random choice.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Only the k likeliest tokens can be drawn.
        top_p: Only the likeliest tokens that together reach this probability can be drawn.
        stop_ids: Tokens that end the text (``<s>`` begins the next document); left out.
        forbidden_ids: Tokens never produced, unless they are in ``stop_ids``.
        vocab_size: Ids from here on are padding of the embedding and never produced.
        device: Where the model is.
        backend: Attention backend.
        dtype: Compute type of the attention.

    Returns:
        The prompt's ids and the new ones.

    Raises:
        UserError: The prompt is empty or longer than the context.
    """
    ids = list(prompt_ids)
    if not 1 <= len(ids) <= context:
        raise UserError(
            "prompt", f"{len(ids)} tokens", f"1 to {context}, the model's context in tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    banned = set(forbidden_ids) - set(stop_ids)
    # A rank that stopped early would leave the others waiting in ZeRO-3's gathering of parameters.
    may_stop = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    length = min(context, len(ids) + tokens)
    stopped_at: int | None = None
    with inference(model):
        for _ in range(tokens):
            window = ids[-length:]
            # Causal attention never looks at what fills the row up.
            row = window + [0] * (length - len(window))
            logits = _logits(model, row, "causal", [len(window) - 1], device, backend, dtype)
            scores = _allowed(logits, banned, vocab_size)
            scores = _truncate(scores, top_k, top_p, temperature)
            token = int(_draw(scores, temperature, generator))
            ids.append(token)
            if token in stop_ids and stopped_at is None:
                stopped_at = len(ids) - 1
                if may_stop:
                    break
    return ids[:stopped_at]


def infill(
    model: Callable[..., DualOutput],
    ids: Sequence[int],
    *,
    mask_id: int,
    context: int,
    seed: int,
    steps: int | None = None,
    order: Order = "confidence",
    temperature: float = 1.0,
    target: Target = "next",
    forbidden_ids: Collection[int] = (),
    vocab_size: int | None = None,
    device: torch.device | str = "cpu",
    backend: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> list[int]:
    """Fill every mask, reading the whole row at each step.

    Each step predicts all masked positions at once, then keeps an equal share of them: with as
    many steps as masks, one at a time.

    Args:
        model: ``DualLM`` or an engine around it.
        ids: The row, with ``mask_id`` where text is wanted; the first one is usually ``<s>``.
        mask_id: The mask token, never produced.
        context: Longest row the model is given, in tokens.
        seed: Decides every random choice.
        steps: Passes of the model; one per mask when not given, never more.
        order: Which predictions are kept first: those of the highest probability, the leftmost,
            or random ones (the reverse of how the training masks).
        temperature: Divides the logits; 0 takes the likeliest token.
        target: As trained: position i predicts token ``next`` i+1 (MNTP), or i ``in_place``.
        forbidden_ids: Tokens never produced: all special ones.
        vocab_size: Ids from here on are padding of the embedding and never produced.
        device: Where the model is.
        backend: Attention backend.
        dtype: Compute type of the attention.

    Returns:
        The row with its masks filled and everything else as it was.

    Raises:
        UserError: The row is longer than the context, ``steps`` is not positive, or the first
            token is masked while the target is the next token (then nothing predicts it).
    """
    row = list(ids)
    _check_row(row, mask_id, context, steps, target)
    generator = torch.Generator().manual_seed(seed)
    masked = [position for position, token in enumerate(row) if token == mask_id]
    steps = min(steps or len(masked), len(masked))
    shift = 1 if target == "next" else 0
    banned = {*forbidden_ids, mask_id}
    with inference(model):
        for step in range(steps):
            kept = -(-len(masked) // (steps - step))
            readers = [position - shift for position in masked]
            logits = _logits(model, row, "full", readers, device, backend, dtype)
            scores = _allowed(logits, banned, vocab_size)
            tokens = _draw(scores, temperature, generator)
            priority = _priority(order, scores, tokens, generator)
            # Stable, so that of equals the leftmost comes first on every machine.
            first = priority.argsort(descending=True, stable=True)[:kept].tolist()
            for index in first:
                row[masked[index]] = int(tokens[index])
            masked = [position for position in masked if row[position] == mask_id]
    return row


def encode_prompt(text: str, tokenizer: Tokenizer, *, bos_id: int) -> list[int]:
    """Return ``<s>`` and the ids of the text; an empty text begins a document."""
    return [bos_id, *_encode(text, tokenizer)]


def parse_gaps(
    text: str, tokenizer: Tokenizer, *, bos_id: int, mask_id: int, where: str = "infill"
) -> list[int]:
    """Turn a text with gaps, ``The <mask:8> sat.``, into ids with masks.

    A space before a gap belongs to the gap, since tokens carry the space before their word; the
    space after it stays with the word that follows.

    Args:
        text: The text; ``<mask:N>`` stands for N tokens, ``<mask>`` for one.
        tokenizer: Encodes the text between the gaps.
        bos_id: Put first, so that a gap at the very beginning has a predictor.
        mask_id: The id of a masked token.
        where: What to call the text in an error.

    Raises:
        UserError: There is no gap, or one is malformed.
    """
    ids, end = [bos_id], 0
    for gap in _GAP.finditer(text):
        number = int(gap.group(1) or 1)
        if number < 1:
            raise UserError(where, f"empty gap {gap.group().strip()!r}", _GAP_SYNTAX)
        ids += [*_encode(_whole(text[end : gap.start()], where), tokenizer), *[mask_id] * number]
        end = gap.end()
    if end == 0:
        _whole(text, where)
        raise UserError(where, f"no gap in {text!r}", _GAP_SYNTAX)
    return ids + _encode(_whole(text[end:], where), tokenizer)


def infilled_pieces(
    before: Sequence[int], after: Sequence[int], tokenizer: Tokenizer, *, mask_id: int
) -> Pieces:
    """Decode a filled row as pieces of text, each with whether the model wrote it.

    Args:
        before: The row with its masks.
        after: The row that :func:`infill` made of it.
        tokenizer: Decodes; special tokens are left out.
        mask_id: The mask token of ``before``.
    """
    runs = groupby(zip(before, after, strict=True), key=lambda pair: pair[0] == mask_id)
    pieces = (
        (tokenizer.decode([new for _, new in run], skip_special_tokens=True), generated)
        for generated, run in runs
    )
    return tuple((text, generated) for text, generated in pieces if text)


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids) if text else []


def _whole(text: str, where: str) -> str:
    """Return the text between gaps, if it does not hold the remains of another gap."""
    remains = _GAP_REMAINS.search(text)
    if remains:
        raise UserError(where, f"malformed gap {remains.group()!r}", _GAP_SYNTAX)
    return text


def _check_row(
    row: list[int], mask_id: int, context: int, steps: int | None, target: Target
) -> None:
    if len(row) > context:
        raise UserError(
            "infill", f"{len(row)} tokens with the gaps", f"at most {context}, the model's context"
        )
    if steps is not None and steps < 1:
        raise UserError("infill", f"{steps} steps", "at least 1")
    if target == "next" and row[:1] == [mask_id]:
        raise UserError(
            "infill",
            "the first token is masked, and no position predicts it",
            hint="begin with `<s>`",
        )


def _logits(
    model: Callable[..., DualOutput],
    row: list[int],
    kind: Literal["causal", "full"],
    positions: list[int],
    device: torch.device | str,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the logits of some positions of one row, (N, V) float32 on the CPU."""
    one_document = torch.zeros(1, len(row), dtype=torch.int32)
    plan = plan_attention(kind, one_document, backend=backend, device=device, dtype=dtype)
    output = model(
        torch.tensor([row], device=device),
        attention=plan,
        selection=torch.tensor(positions, device=device),
    )
    assert output.logits is not None  # no targets ask for them
    return output.logits.float().cpu()


def _allowed(logits: Tensor, banned: Collection[int], vocab_size: int | None) -> Tensor:
    """Return (N, V) logits with everything that must not be produced at minus infinity."""
    logits = logits.clone()
    logits[:, sorted(banned)] = -torch.inf
    if vocab_size is not None:
        logits[:, vocab_size:] = -torch.inf
    return logits


def _truncate(logits: Tensor, top_k: int | None, top_p: float | None, temperature: float) -> Tensor:
    """Leave the likeliest tokens: k of them, and as many as reach the probability p."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    dropped = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k is not None:
        dropped[:, top_k:] = True
    if top_p is not None and temperature > 0:
        share = (ordered.masked_fill(dropped, -torch.inf) / temperature).softmax(-1)
        # A token stays if those before it have not reached p yet: the likeliest always does.
        dropped |= share.cumsum(-1) - share >= top_p
    dropped[:, 0] = False
    return logits.masked_fill(dropped.scatter(-1, index, dropped), -torch.inf)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw one token from each row of (N, V) logits."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _priority(order: Order, logits: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Return (N,) numbers, the greatest where a prediction is kept first."""
    if order == "left_to_right":
        return -torch.arange(len(tokens), dtype=torch.float32)
    if order == "random":
        return torch.rand(len(tokens), generator=generator)
    # The model's own probability, whatever the temperature: how sure it is of this token.
    return logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]
