"""Why the numbers of a dry run are what they are, and which of them look unintended.

Called by ``derive``; the texts are shown by ``render``.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import Literal

from dualtrain.mixing import Mixture, rotation_groups
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
    passes: tuple[int, int] | None,
    available: int | None,
) -> dict[str, str]:
    """How each derived number came about, by its name.

    Args:
        recipe: The recipe.
        length: Of the run.
        mixture: Of the objectives.
        passes: Fewest and most AR passes of a document, where documents rotate.
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
    reasons["ar_passes"] = _passes_reason(recipe, mixture, length, passes)
    return reasons


def _alpha_reason(recipe: Recipe, mixture: Mixture) -> str:
    if isinstance(recipe.alpha, AlphaSchedule):
        return f"alpha changes: {recipe.alpha.name}"
    if mixture.slots_per_step != recipe.global_batch // recipe.micro_batch:
        return f"weighted {float(recipe.alpha):g} and {float(1 - recipe.alpha):g} (alpha)"
    return f"alpha {recipe.alpha}"


def _passes_reason(
    recipe: Recipe, mixture: Mixture, length: Length, passes: tuple[int, int] | None
) -> str:
    if passes is None or mixture.rotation_alpha is None:
        if mixture.slots_per_step != recipe.global_batch // recipe.micro_batch:
            return "every pass has both objectives"
        return "on average; without rotation chance decides for each document"
    groups = rotation_groups(mixture.rotation_alpha)
    if passes[0] != passes[1]:
        return f"on average; {passes[0]} to {passes[1]} a document, {groups} groups rotate"
    same = "the same for every document"
    if asked_repetitions(recipe, length) != length.repetitions:
        same += ", but for the rounding to whole steps"
    return same if groups == 1 else f"{same}: {groups} groups rotate"


def find_warnings(
    recipe: Recipe, length: Length, mixture: Mixture, passes: tuple[int, int] | None
) -> list[str]:
    """What is probably not meant, each with advice.

    Args:
        recipe: The recipe.
        length: Of the run.
        mixture: Of the objectives.
        passes: Fewest and most AR passes of a document, where documents rotate.
    """
    found = []
    alpha, per_step = recipe.alpha, recipe.global_batch * recipe.sequence_length
    if isinstance(alpha, Fraction) and 0 < alpha < 1 and recipe.objective.mixing == "slots":
        slots = recipe.global_batch // recipe.micro_batch
        for name, share in (("AR", alpha), ("diffusion", 1 - alpha)):
            if share * slots < 1:
                found.append(_scarce(recipe, name, share, slots))
    if passes and mixture.rotation_alpha is not None:
        found += _unequal(asked_repetitions(recipe, length), mixture.rotation_alpha, passes)
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


def find_cache_warnings(recipe: Recipe, length: Length, token_bytes: int) -> list[str]:
    """A cache of shards that makes every epoch fetch them again.

    Args:
        recipe: The recipe.
        length: Of the run.
        token_bytes: Bytes of a token in a shard.
    """
    limit, needed = recipe.data.cache_limit_gib, length.unique_tokens * token_bytes / 2**30
    if limit is None or needed <= limit:
        return []
    return [
        f"data.cache_limit_gib {limit:.3g} is below the {needed:.3g} GiB of the unique tokens, "
        "and the order of documents is shuffled over all of them, so each epoch fetches shards "
        f"again and again; {1.05 * needed:.3g} or null fetches each shard once"
    ]


def _unequal(repetitions: Fraction, alpha: Fraction, passes: tuple[int, int]) -> list[str]:
    """Documents get different numbers of AR passes although they need not."""
    groups = rotation_groups(alpha)
    if passes[0] == passes[1] or repetitions <= groups:
        return []
    lower = floor(repetitions / groups) * groups
    return [
        f"repetitions {float(repetitions):g} is not a multiple of {groups}, so some documents get "
        f"{passes[0]} AR passes and others {passes[1]}; {lower} or {lower + groups} make them equal"
    ]


def _scarce(recipe: Recipe, name: str, share: Fraction, slots: int) -> str:
    """An objective has less than a slot a step."""
    fits = [n for n in divisors(recipe.global_batch) if n <= recipe.global_batch * share]
    advice = f"micro_batch {fits[-1]}" if fits else f"global_batch {ceil(1 / share)} or more"
    return (
        f"{name} has {float(share * slots):.3g} of the {slots} slots of a step, one in "
        f"{float(1 / (share * slots)):.3g} steps, and between them the model is trained without "
        f"it; {advice} gives it a slot in every step"
    )
