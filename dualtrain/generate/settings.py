"""What can be asked of a generator: the mode and the settings that belong to it, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeVar, cast

from dualtrain.common.errors import UserError, nearest, raise_together
from dualtrain.generate.choose import Sampling
from dualtrain.generate.diffusion import ORDERS, Order

Mode = Literal["ar", "prefix", "diffusion"]
MODES: tuple[Mode, ...] = ("ar", "prefix", "diffusion")

TOKENS = 64
MOST_SAMPLES = 100_000
"""More texts of one prompt than that take more than one call, each with a seed of its own."""
TEMPERATURE = 0.8

Word = TypeVar("Word", bound=str)


@dataclass(frozen=True, slots=True)
class Settings:
    """How texts are made; the same for all texts of a call.

    Args:
        mode: ``ar`` reads and writes from left to right; ``prefix`` reads the prompt
            bidirectionally first; ``diffusion`` fills gaps, and what follows a prompt without any.
        tokens: Tokens of each text, at most; of gaps, their own number counts.
        seed: Decides every random choice, together with the number of the prompt and the sample.
        steps: Diffusion: passes over a text, see ``fill_masks``.
        order: Diffusion: which predictions are kept first.
        block: Diffusion: masks that are filled before any behind them.
    """

    mode: Mode = "ar"
    tokens: int = TOKENS
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=TEMPERATURE))
    seed: int = 0
    samples: int = 1
    steps: int | None = None
    order: Order = "confidence"
    block: int | None = None

    def __post_init__(self) -> None:
        positive = {
            "--tokens": self.tokens,
            "--samples": self.samples,
            "--steps": self.steps,
            "--block": self.block,
        }
        wrong = [
            UserError(option, f"{value}", "1 or more")
            for option, value in positive.items()
            if value is not None and value < 1
        ]
        if self.samples > MOST_SAMPLES:
            hint = "more come with another --seed"
            wrong.append(UserError("--samples", f"{self.samples}", f"at most {MOST_SAMPLES}", hint))
        if self.samples > 1 and self.is_certain:
            sure = f"{self.samples} texts of temperature 0 would be one and the same"
            wrong.append(UserError("--samples", sure, "1, or a temperature above 0"))
        raise_together(wrong)

    @property
    def is_diffusion(self) -> bool:
        """Whether masks are filled, else tokens are appended."""
        return self.mode == "diffusion"

    @property
    def is_certain(self) -> bool:
        """Whether chance has no say."""
        drawn_order = self.is_diffusion and self.order == "random"
        return self.sampling.is_greedy and not drawn_order

    def facts(self) -> dict[str, object]:
        """Those settings that have a say in this mode, for a file of results."""
        facts: dict[str, object] = {"tokens": self.tokens, **asdict(self.sampling)}
        if self.is_diffusion:
            del facts["repetition_penalty"]
            facts |= {"steps": self.steps, "order": self.order, "block": self.block}
        return facts


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a user has set; None where not. Field names are those of the options."""

    mode: str | None = None
    tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    samples: int = 1
    steps: int | None = None
    order: str | None = None
    block: int | None = None


def read_settings(wishes: Wishes, *, gaps: Sequence[str], prompts: int) -> Settings:
    """Turn what a user has set into settings.

    Without a mode it is ``diffusion`` if a prompt has a gap, else ``ar``.

    Args:
        gaps: What to call each prompt that has gaps.
        prompts: How many there are, with gaps or without.

    Raises:
        UserError: Values out of their range, an unknown word, or what has no say in this mode.
    """
    wrong: list[UserError] = []
    mode = _word("--mode", wishes.mode or ("diffusion" if gaps else "ar"), MODES, wrong)
    order = _word("--order", wishes.order or "confidence", ORDERS, wrong)
    raise_together(wrong)
    if mode == "diffusion":
        if wishes.repetition_penalty is not None:
            wrong.append(_out_of_place("repetition_penalty", mode, "ar or prefix"))
        if wishes.tokens is not None and len(gaps) == prompts:
            wrong.append(UserError("--tokens", "the gaps say how many", "no --tokens"))
    else:
        what = f"has a gap, which mode {mode} does not fill"
        wrong += [UserError(place, what, hint="--mode diffusion does") for place in gaps]
        names = ("steps", "order", "block")
        given = [name for name in names if getattr(wishes, name) is not None]
        wrong += [_out_of_place(name, mode, "diffusion") for name in given]
    raise_together(wrong)
    temperature, penalty = wishes.temperature, wishes.repetition_penalty
    sampling = Sampling(
        temperature=TEMPERATURE if temperature is None else temperature,
        top_k=wishes.top_k,
        top_p=wishes.top_p,
        repetition_penalty=1.0 if penalty is None else penalty,
    )
    return Settings(
        mode=mode,
        tokens=TOKENS if wishes.tokens is None else wishes.tokens,
        sampling=sampling,
        seed=wishes.seed,
        samples=wishes.samples,
        steps=wishes.steps,
        order=order,
        block=wishes.block,
    )


def _word(option: str, word: str, words: Sequence[Word], wrong: list[UserError]) -> Word:
    if word not in words:
        expected = f"{', '.join(words[:-1])} or {words[-1]}"
        wrong.append(UserError(option, f"{word!r}", expected, nearest(word, words)))
    return cast(Word, word)


def _out_of_place(name: str, mode: str, modes: str) -> UserError:
    option = "--" + name.replace("_", "-")
    return UserError(option, f"has no say in mode {mode}", f"{option} with --mode {modes}")
