"""The numbers that follow from a recipe, with the reason for each.

``assemble`` builds the run from them, and the dry run shows them. Everything is a pure function of
(recipe, corpus, number of ranks).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor

from dualtrain.common.errors import UserError
from dualtrain.data.corpus import CorpusFacts
from dualtrain.derived.cost import ModelCost, model_cost
from dualtrain.derived.reasons import Length, LengthField, find_warnings, give_reasons
from dualtrain.derived.words import word_milestones
from dualtrain.engine.config import merge_settings, read_ds_config
from dualtrain.method.mixing import Mixture, alpha_at
from dualtrain.method.schedules import learning_rate_factor, nearest_whole
from dualtrain.network.arithmetic import ModelSizes, model_sizes
from dualtrain.network.config import DualConfig
from dualtrain.recipe.checks import check_world_size
from dualtrain.recipe.schema import LARGEST_STEPS, AlphaSchedule, Recipe

LONGEST_SCHEDULE = 10**6
"""Steps of a run whose alpha changes: they are counted one by one, which takes half a minute."""


@dataclass(frozen=True)
class Milestone:
    """Where a piece of the learning rate's schedule begins.

    Attributes:
        what: What the learning rate does from there on.
    """

    step: int
    learning_rate: float
    what: str


@dataclass(frozen=True)
class Derived:
    """What follows from a recipe.

    Attributes:
        unique_tokens: Tokens of the unique subset, ``</s>`` counted.
        total_tokens: Input tokens of the run; in a weighted sum each counts once, though it is
            trained with both objectives.
        slots_per_step: S, global_batch / micro_batch, which the ranks must divide; or 2 S where
            each micro-batch is run with both objectives.
        ar_passes: AR passes over a token, on average.
        world_size: Ranks that the memory is for.
        imported: Family of an imported model, and what becomes of it; None for our own.
        cost: Of the model; None while the vocabulary is not known.
        deepspeed: The configuration for ``deepspeed.initialize``.
        milestones: The pieces of the learning rate's schedule.
        words: By step, the words seen at which a checkpoint is asked for.
        reasons: For each of these names, how it came about.
        warnings: What is probably not meant, with advice.
    """

    steps: int
    unique_tokens: int
    repetitions: float
    tokens_per_step: int
    total_tokens: int
    slots_per_step: int
    ar_slots: int
    diffusion_slots: int
    ar_passes: float
    zero_stage: int
    world_size: int
    imported: tuple[str, str] | None
    cost: ModelCost | None
    deepspeed: dict[str, object]
    milestones: tuple[Milestone, ...]
    words: dict[int, tuple[int, ...]]
    reasons: dict[str, str]
    warnings: tuple[str, ...]


def derive(recipe: Recipe, *, corpus: CorpusFacts | None, world_size: int | None = None) -> Derived:
    """Compute what follows from a recipe.

    Args:
        corpus: The train split, or None if there is no dataset yet; then its limits are not
            checked.
        world_size: Ranks; None leaves their number open and estimates memory for one.

    Raises:
        UserError: The corpus has fewer unique tokens than asked for, or more vocabulary than the
            model; ``all`` is asked for without a corpus; the ranks cannot share a step; the
            ds_config is wrong; an imported model is not there, not supported, or of another
            tokenizer; words of a checkpoint are beyond the run or not counted.
    """
    if world_size is not None:
        check_world_size(recipe, world_size)
    length = run_length(recipe, corpus)
    available = corpus.packed_tokens(append_eos=recipe.data.append_eos) if corpus else None
    check_vocabulary(recipe, corpus)
    mixture = build_mixture(recipe, length.steps)
    tokens_per_step = recipe.global_batch * recipe.sequence_length
    slot_tokens = recipe.micro_batch * recipe.sequence_length
    ar_slots = mixture.ar_slots_before(length.steps)
    diffusion_slots = mixture.diffusion_slots_before(length.steps)
    ds_config = read_ds_config(recipe.engine.deepspeed)
    sizes, imported, notes = _look_at_model(recipe, known_vocabulary(recipe, corpus))
    cost = None
    if sizes is not None:
        cost = model_cost(
            recipe,
            sizes,
            ds_config,
            world_size=world_size or 1,
            ar_tokens=ar_slots * slot_tokens,
            diffusion_tokens=diffusion_slots * slot_tokens,
        )
    passes = Fraction(ar_slots * slot_tokens, length.unique_tokens)
    return Derived(
        steps=length.steps,
        unique_tokens=length.unique_tokens,
        repetitions=float(length.repetitions),
        tokens_per_step=tokens_per_step,
        total_tokens=length.steps * tokens_per_step,
        slots_per_step=mixture.slots_per_step,
        ar_slots=ar_slots,
        diffusion_slots=diffusion_slots,
        ar_passes=float(passes),
        zero_stage=ds_config.stage,
        world_size=world_size or 1,
        imported=imported,
        cost=cost,
        deepspeed=merge_settings(
            recipe.engine.deepspeed,
            precision=recipe.engine.precision,
            micro_batch=recipe.micro_batch,
            accumulation=mixture.slots_per_step // (world_size or 1),
            world_size=world_size or 1,
        ),
        milestones=learning_rate_milestones(recipe, length.steps),
        words=word_milestones(recipe, length.steps, corpus),
        reasons=give_reasons(recipe, length, mixture, passes, available),
        warnings=(*find_warnings(recipe, length), *notes),
    )


def run_length(recipe: Recipe, corpus: CorpusFacts | None) -> Length:
    """Find the third of steps, unique_tokens and repetitions.

    Raises:
        UserError: See :func:`derive`.
    """
    per_step = recipe.global_batch * recipe.sequence_length
    steps, unique = recipe.steps, recipe.unique_tokens
    asked = None if recipe.repetitions is None else Fraction(str(recipe.repetitions))
    available = corpus.packed_tokens(append_eos=recipe.data.append_eos) if corpus else None
    if unique == "all":
        if available is None:
            raise UserError(
                "unique_tokens",
                f"`all`, but there is no dataset at {recipe.data.path} to count",
                "a dataset, or a number of tokens",
                "make it with `dualtrain data convert`, or run once without --dry-run",
            )
        unique = available
    follows: LengthField | None = None
    reason = ""
    if unique is None:
        assert steps is not None and asked is not None, "checked when the recipe was loaded"
        unique = floor(steps * per_step / asked)
        follows, reason = "unique_tokens", f"{steps:,} steps x {per_step:,} / {asked} repetitions"
    elif steps is None:
        assert asked is not None, "checked when the recipe was loaded"
        steps = max(1, nearest_whole(float(asked * unique / per_step)))
        if steps > LARGEST_STEPS:
            what = f"{float(asked):g} of {unique:,} unique tokens take {steps:,} steps"
            raise UserError("repetitions", what, f"at most {LARGEST_STEPS:,} steps")
        follows = "steps"
        reason = f"{unique:,} unique tokens x {float(asked):g} / {per_step:,}, in whole steps"
    elif asked is None:
        follows = "repetitions"
        reason = f"{steps:,} steps x {per_step:,} / {unique:,} unique tokens"
    _check_unique(recipe, unique, follows, corpus, available)
    repetitions = asked if follows == "unique_tokens" else Fraction(steps * per_step, unique)
    assert repetitions is not None
    if recipe.unique_tokens == "all" and follows is None and asked is not None:
        _check_all_three(recipe, repetitions, asked, steps)
    return Length(steps, unique, repetitions, follows, reason)


def build_mixture(recipe: Recipe, steps: int) -> Mixture:
    """The slots of the recipe's steps.

    Raises:
        UserError: A schedule of alpha is too long to be counted.
    """
    alpha = recipe.alpha
    if isinstance(alpha, AlphaSchedule) and steps > LONGEST_SCHEDULE:
        what = f"changes from step to step, over {steps:,} of them"
        raise UserError("alpha", what, f"at most {LONGEST_SCHEDULE:,} steps, or one alpha for all")
    return Mixture(
        alpha=(lambda step: alpha_at(alpha, step, steps))
        if isinstance(alpha, AlphaSchedule)
        else alpha,
        steps=steps,
        slots=recipe.global_batch // recipe.micro_batch,
        micro_batch=recipe.micro_batch,
        mixing=recipe.objective.mixing,
        rotation=uses_rotation(recipe),
    )


def uses_rotation(recipe: Recipe) -> bool:
    """Whether the objectives share each pass over the text; by default, where that is possible."""
    if recipe.objective.rotation is not None:
        return recipe.objective.rotation
    return recipe.objective.mixing == "slots"


def known_vocabulary(recipe: Recipe, corpus: CorpusFacts | None) -> int | None:
    """Tokens of the vocabulary as far as they are known: the corpus's, the recipe's."""
    if corpus is not None:
        return corpus.vocab_size
    if recipe.model.vocab_size is not None:
        return recipe.model.vocab_size
    build = recipe.data.build
    return build.vocab_size if build is not None and build.tokenizer is None else None


def _look_at_model(
    recipe: Recipe, vocab_size: int | None
) -> tuple[ModelSizes | None, tuple[str, str] | None, list[str]]:
    """The model's sizes, as far as they are known; of an imported one also what is to be said."""
    if recipe.model.hf is None:
        if vocab_size is None:
            return None, None, []
        return model_sizes(DualConfig.of_recipe(recipe.model, vocab_size)), None, []
    # Here, because it takes seconds to import, and our own model does without.
    from dualtrain.model import hugging_face

    notes = hugging_face.check_tokenizer(recipe)
    described = hugging_face.describe_import(recipe, vocab_size)
    return hugging_face.hf_sizes(recipe, vocab_size), described, notes


def check_vocabulary(recipe: Recipe, corpus: CorpusFacts | None) -> None:
    """Check that the model has a row for every token.

    Raises:
        UserError: It has not.
    """
    rows = recipe.model.vocab_size
    if corpus is not None and rows is not None and rows < corpus.vocab_size:
        raise UserError(
            "model.vocab_size",
            f"{rows:,}, but the tokenizer of {recipe.data.path} has {corpus.vocab_size:,} tokens",
            f"at least {corpus.vocab_size:,}",
            "leave it out to take the dataset's",
        )


def learning_rate_milestones(recipe: Recipe, steps: int) -> tuple[Milestone, ...]:
    """Where the learning rate begins to rise, stay or fall, from its schedule."""
    schedule, peak = recipe.optim.schedule, recipe.optim.lr
    last = peak * learning_rate_factor(schedule, steps - 1, steps)
    warmup = min(schedule.warmup_steps, steps)
    decay = nearest_whole(schedule.cooldown * steps) if schedule.name == "wsd" else 0
    pieces = []
    if warmup:
        pieces.append((0, f"rises to {peak:g}"))
    if schedule.name == "cosine" and warmup < steps:
        pieces.append((warmup, f"falls as a cosine to {last:.3g} in the last step"))
    elif warmup < steps - decay:
        pieces.append((warmup, "stays"))
    if decay:
        shape = "linearly" if schedule.shape == "linear" else "as 1 - sqrt"
        pieces.append((steps - decay, f"falls {shape} to {last:.3g} in the last step"))
    return tuple(
        Milestone(step, peak * learning_rate_factor(schedule, step, steps), what)
        for step, what in pieces
    )


def _check_unique(
    recipe: Recipe,
    unique: int,
    follows: LengthField | None,
    corpus: CorpusFacts | None,
    available: int | None,
) -> None:
    if unique < 1:
        what = f"{recipe.steps} steps have fewer tokens than {recipe.repetitions:g} repetitions"
        raise UserError("repetitions", what, "at least one unique token")
    if corpus is None or available is None or unique <= available:
        return
    asked = f"{unique:,} unique tokens"
    if follows == "unique_tokens":
        asked += f", which {recipe.steps:,} steps and {recipe.repetitions:g} repetitions need"
    ends = f" ({corpus.tokens:,} of text, and </s> of {corpus.documents:,} documents)"
    raise UserError(
        "unique_tokens",
        f"{asked}, but the train split of {recipe.data.path} has {available:,}"
        + (ends if recipe.data.append_eos else ""),
        f"at most {available:,}",
        "use more text, fewer steps or more repetitions",
    )


def _check_all_three(recipe: Recipe, real: Fraction, asked: Fraction, steps: int) -> None:
    if abs(real - asked) * steps >= real / 2:
        raise UserError(
            "steps",
            f"{steps} steps over `all` unique tokens are {float(real):.6g} repetitions, "
            f"not {float(asked):g}",
            "two of steps, unique_tokens and repetitions; the third follows",
        )
