"""How texts are made: what a user may choose, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

import typer

from dualtrain.common.errors import UserError, nearest, raise_together

MODES = ("ar", "prefix", "diffusion")
ORDERS = ("confidence", "random", "left_to_right")

MOST_SAMPLES = 100_000
"""More texts of one prompt than that take more than one call, each with a seed of its own."""
GREEDY_BELOW = 1e-6
"""Temperature below which the likeliest token is taken: float32 tells no closer logits apart."""
MOST_TEMPERATURE = 1000.0
"""Here all tokens are about equally likely already; far above, float32 has no such number."""
PENALTIES = (0.01, 100.0)
"""Beyond them, too, a logit may leave float32."""

_ONLY_DIFFUSION = ("steps", "order", "block")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How texts are made; the same for all texts of a call.

    The mode ``ar`` reads and writes from left to right; ``prefix`` reads the prompt bidirectionally
    first; ``diffusion`` fills gaps, and what follows a prompt without any. Temperature, top-k,
    top-p and repetition penalty mean what they mean in transformers. Every random choice follows
    from the seed, the number of the prompt and the sample.

    Raises:
        UserError: Values out of their range, or an unknown word.
    """

    mode: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(MODES), help="Default: diffusion if there are gaps, else ar."
        ),
    ] = None
    tokens: Annotated[int, typer.Option(help="Length of a text, at most; gaps say theirs.")] = 64
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest that together have probability p.")
    ] = None
    repetition_penalty: Annotated[
        float,
        typer.Option(help="Divides logits of tokens that the text has already; ar and prefix."),
    ] = 1.0
    seed: Annotated[int, typer.Option(help="The same seed makes the same text.")] = 0
    samples: Annotated[int, typer.Option(help="Texts for each prompt.")] = 1
    steps: Annotated[
        int | None, typer.Option(help="Diffusion: passes for a text; default: one a token.")
    ] = None
    order: Annotated[
        str,
        typer.Option(metavar="|".join(ORDERS), help="Diffusion: which masks are filled first."),
    ] = "confidence"
    block: Annotated[
        int | None,
        typer.Option(help="Diffusion: tokens in a block, blocks one after another; default: all."),
    ] = None
    batch: Annotated[
        int, typer.Option(help="Texts at once, at most; halved when memory runs out.")
    ] = 16

    def __post_init__(self) -> None:
        wrong = [
            *_unknown("--mode", self.mode or "ar", MODES),
            *_unknown("--order", self.order, ORDERS),
        ]
        for name in ("tokens", "top_k", "samples", "steps", "block", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                wrong.append(UserError(_option(name), f"{value}", "1 or more"))
        # Written so that a NaN is refused, too.
        if not 0 <= self.temperature <= MOST_TEMPERATURE:
            expected = f"0 to {MOST_TEMPERATURE:g}, where all tokens are about equally likely"
            wrong.append(UserError("--temperature", f"{self.temperature:g}", expected))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            wrong.append(UserError("--top-p", f"{self.top_p:g}", "a number in (0, 1]"))
        least, most = PENALTIES
        if not least <= self.repetition_penalty <= most:
            expected = f"{least:g} to {most:g}; 1 changes nothing, try 1.2"
            penalty = f"{self.repetition_penalty:g}"
            wrong.append(UserError("--repetition-penalty", penalty, expected))
        if self.samples > MOST_SAMPLES:
            hint = "more come with another --seed"
            wrong.append(UserError("--samples", f"{self.samples}", f"at most {MOST_SAMPLES}", hint))
        if self.samples > 1 and self.is_greedy and self.order != "random":
            sure = f"{self.samples} texts of temperature 0 would be one and the same"
            wrong.append(UserError("--samples", sure, "1, or a temperature above 0"))
        raise_together(wrong)

    @property
    def is_diffusion(self) -> bool:
        """Whether masks are filled, else tokens are appended."""
        return self.mode == "diffusion"

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, and no random number asked for."""
        return self.temperature < GREEDY_BELOW

    def facts(self) -> dict[str, object]:
        """Those settings that have a say in this mode, for a file of results."""
        by_mode = _ONLY_DIFFUSION if self.is_diffusion else ("repetition_penalty",)
        names = ("tokens", "temperature", "top_k", "top_p", *by_mode)
        return {name: getattr(self, name) for name in names}


AnySettings = TypeVar("AnySettings", bound=Settings)


def with_mode(settings: AnySettings, *, gaps: Sequence[str], prompts: int) -> AnySettings:
    """Settings with the mode that the prompts ask for, if the user does not.

    Args:
        gaps: What to call each prompt that has gaps.
        prompts: How many there are, with gaps or without.

    Raises:
        UserError: Something set has no say in the mode, or the mode does not fill gaps.
    """
    settings = replace(settings, mode=settings.mode or ("diffusion" if gaps else "ar"))
    mode, wrong = settings.mode, []
    if settings.is_diffusion:
        if settings.repetition_penalty != Settings.repetition_penalty:
            wrong.append(_out_of_place("repetition_penalty", mode, "ar or prefix"))
        if settings.tokens != Settings.tokens and len(gaps) == prompts:
            wrong.append(UserError("--tokens", "the gaps say how many", "no --tokens"))
    else:
        what = f"has a gap, which mode {mode} does not fill"
        wrong += [UserError(place, what, hint="--mode diffusion does") for place in gaps]
        wrong += [
            _out_of_place(name, mode, "diffusion")
            for name in _ONLY_DIFFUSION
            if getattr(settings, name) != getattr(Settings, name)
        ]
    raise_together(wrong)
    return settings


def _unknown(option: str, word: str, words: Sequence[str]) -> list[UserError]:
    if word in words:
        return []
    expected = f"{', '.join(words[:-1])} or {words[-1]}"
    return [UserError(option, f"{word!r}", expected, nearest(word, words))]


def _out_of_place(name: str, mode: str | None, modes: str) -> UserError:
    option = _option(name)
    return UserError(option, f"has no say in mode {mode}", f"{option} with --mode {modes}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
