"""Why the numbers of a dry run are what they are, and which of them look unintended.

Called by ``derive``; the texts are shown by ``dry_run``.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Literal

from dualtrain.method.mixing import Mixture
from dualtrain.recipe.checks import divisors
from dualtrain.recipe.schema import AlphaSchedule, Recipe

LengthField = Literal["steps", "unique_tokens", "repetitions"]


@dataclass(frozen=True)
class Length:
    """Steps, unique tokens and repetitions, and which of them followed."""

    steps: int
    unique_tokens: int
    repetitions: Fraction
    follows: LengthField | None
    reason: str


def asked_repetitions(recipe: Recipe, length: Length) -> Fraction:
    """The recipe's repetitions, or those that followed; not what rounding to steps made of them."""
    return length.repetitions if recipe.repetitions is None else Fraction(str(recipe.repetitions))


def give_reasons(
    recipe: Recipe,
    length: Length,
    mixture: Mixture,
    passes: Fraction,
    available: int | None,
) -> dict[str, str]:
    """How each derived number came about, by its name.

    Args:
        passes: AR passes over a token, on average.
        available: Tokens of the whole corpus, if it is there.
    """
    slots = recipe.global_batch // recipe.micro_batch
    reasons: dict[str, str] = dict.fromkeys(("steps", "unique_tokens", "repetitions"), "given")
    if recipe.unique_tokens == "all":
        reasons["unique_tokens"] = "all of the corpus"
    if length.follows:
        reasons[length.follows] = f"follows: {length.reason}"
    if available is None:
        reasons["unique_tokens"] += "; not checked, as there is no corpus yet"
    elif recipe.unique_tokens != "all":
        reasons["unique_tokens"] += f"; the corpus has {available:,}"
    if length.follows == "steps" and asked_repetitions(recipe, length) != length.repetitions:
        reasons["repetitions"] = f"{recipe.repetitions:g} asked for, rounded to whole steps"
    batch = f"global_batch {recipe.global_batch:,}"
    reasons["tokens_per_step"] = f"{batch} x sequence_length {recipe.sequence_length:,}"
    reasons["slots_per_step"] = f"{batch} / micro_batch {recipe.micro_batch}"
    if mixture.slots_per_step != slots:
        reasons["slots_per_step"] += ", each with both objectives"
    reasons["ar_slots"] = _alpha_reason(recipe, mixture)
    reasons["ar_passes"] = _passes_reason(recipe, length, mixture, passes)
    return reasons


def _alpha_reason(recipe: Recipe, mixture: Mixture) -> str:
    if isinstance(recipe.alpha, AlphaSchedule):
        return f"alpha changes: {recipe.alpha.name}"
    if mixture.slots_per_step != recipe.global_batch // recipe.micro_batch:
        return f"weighted {float(recipe.alpha):g} and {float(1 - recipe.alpha):g} (alpha)"
    return f"alpha {recipe.alpha}"


def _passes_reason(recipe: Recipe, length: Length, mixture: Mixture, passes: Fraction) -> str:
    if mixture.slots_per_step != recipe.global_batch // recipe.micro_batch:
        return "every pass has both objectives"
    fewest, more = divmod(passes, 1)
    # Each stream ends a pass over the text before it begins another, so no token is two behind.
    tokens = int(more * length.unique_tokens)
    reason = f"{fewest} over every token"
    if tokens:
        some = f"{fewest + 1} over {tokens:,} ({float(100 * more):.3g} %) of them"
        reason = f"{reason}, {some}" if fewest else f"{some}, none over the others"
    if mixture.rotates:
        return f"{reason}; the objectives share each pass over the text"
    if mixture.ar_slots_before(mixture.steps) in (0, mixture.steps * mixture.slots_per_step):
        return reason
    return f"{reason}; without rotation each objective goes through the text at its own pace"


def find_warnings(recipe: Recipe, length: Length) -> list[str]:
    """What is probably not meant, each with advice."""
    found = []
    alpha, per_step = recipe.alpha, recipe.global_batch * recipe.sequence_length
    if isinstance(alpha, Fraction) and 0 < alpha < 1 and recipe.objective.mixing == "slots":
        slots = recipe.global_batch // recipe.micro_batch
        for name, share in (("AR", alpha), ("diffusion", 1 - alpha)):
            if share * slots < 1:
                found.append(_scarce(recipe, name, share, slots))
    if length.unique_tokens < per_step:
        found.append(
            f"a step of {per_step:,} tokens reads the {length.unique_tokens:,} unique tokens more "
            "than once; reduce repetitions or global_batch"
        )
    if length.repetitions < 1:
        found.append(
            f"only {float(100 * length.repetitions):.3g} % of the unique tokens are ever read; "
            "reduce unique_tokens or raise repetitions"
        )
    warmup = recipe.optim.schedule.warmup_steps
    if warmup >= length.steps:
        found.append(
            f"warm-up takes {warmup} of {length.steps} steps, so the learning rate hardly reaches "
            f"{recipe.optim.lr:g}; reduce optim.schedule.warmup_steps"
        )
    return found


def _scarce(recipe: Recipe, name: str, share: Fraction, slots: int) -> str:
    """An objective has less than a slot a step."""
    fits = [n for n in divisors(recipe.global_batch) if n <= recipe.global_batch * share]
    advice = f"micro_batch {fits[-1]}" if fits else f"global_batch {ceil(1 / share)} or more"
    return (
        f"{name} has {float(share * slots):.3g} of the {slots} slots of a step, one in "
        f"{float(1 / (share * slots)):.3g} steps, and between them the model is trained without "
        f"it; {advice} gives it a slot in every step"
    )
