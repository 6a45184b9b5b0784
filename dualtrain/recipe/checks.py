"""What must hold between the fields of a recipe, and between a recipe and the number of ranks.

``problems`` runs :func:`find_conflicts` on every recipe; ``start`` and ``assemble`` call
:func:`check_world_size` once the number of ranks is known. What needs the corpus is in ``derive``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

from dualtrain.common.errors import UserError
from dualtrain.recipe.schema import (
    AlphaSchedule,
    ModelSection,
    Recipe,
    ScheduleSection,
    SpanCorruption,
)
from dualtrain.recipe.yaml_source import Path

SIZES = ("layers", "width", "heads", "mlp_width", "vocab_size", "rope_theta", "norm_eps", "head")
"""Fields of ``model`` that describe our transformer, and no imported one."""

GAP = re.compile(r"<mask(:[1-9]\d*)?>")
"""A gap in ``sample.infill``, as ``generate`` reads it."""


@dataclass(frozen=True)
class Conflict:
    """Dotted keys of values that do not go together; the first is the one to name."""

    keys: tuple[str, ...]
    what: str
    expected: str
    hint: str = ""

    @property
    def paths(self) -> list[Path]:
        """The keys as paths, with indices of lists."""
        return [
            tuple(int(part) if part.isdecimal() else part for part in key.split("."))
            for key in self.keys
        ]


def find_conflicts(recipe: Recipe) -> list[Conflict]:
    """Everything that does not fit together in a recipe whose fields are right by themselves."""
    return [conflict for check in CHECKS for conflict in check(recipe)]


def check_world_size(recipe: Recipe, world_size: int) -> None:
    """Check that a step's micro-batches can be divided over the ranks.

    Raises:
        UserError: They cannot; lists the numbers of ranks that can.
    """
    slots = recipe.global_batch // recipe.micro_batch
    if slots % world_size == 0:
        return
    possible = ", ".join(str(number) for number in divisors(slots))
    raise UserError(
        "ranks",
        f"{world_size} ranks cannot share the {slots} micro-batches of a step equally "
        f"(global_batch {recipe.global_batch} / micro_batch {recipe.micro_batch})",
        f"a number of ranks among {possible}",
        "or change global_batch or micro_batch",
    )


def divisors(number: int) -> list[int]:
    """All divisors, in increasing order."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def check_batches(recipe: Recipe) -> Iterator[Conflict]:
    batch, micro = recipe.global_batch, recipe.micro_batch
    if batch % micro:
        below = max(n for n in divisors(batch) if n <= micro)
        yield Conflict(
            ("global_batch", "micro_batch"),
            f"{batch} is not divisible by micro_batch {micro}",
            f"a multiple of {micro}",
            f"nearest: global_batch {max(1, round(batch / micro)) * micro}, or micro_batch {below}",
        )


def check_length(recipe: Recipe) -> Iterator[Conflict]:
    """Two of the three that fix the length of the run; a third may only agree."""
    names = ("steps", "unique_tokens", "repetitions")
    missing = [name for name in names if getattr(recipe, name) is None]
    if len(missing) > 1:
        given = [name for name in names if name not in missing]
        only = f"only {given[0]} is given" if given else "none of them is given"
        yield Conflict(
            (missing[0], *names),
            f"the length of the run is open: {only}",
            "two of steps, unique_tokens and repetitions; the third follows",
            f"add {' or '.join(missing)}",
        )
    elif not missing and isinstance(recipe.unique_tokens, int):
        assert recipe.steps is not None and recipe.repetitions is not None
        per_step = recipe.global_batch * recipe.sequence_length
        total = Fraction(str(recipe.repetitions)) * recipe.unique_tokens
        if abs(total - recipe.steps * per_step) >= Fraction(per_step, 2):
            yield Conflict(
                (*names, "global_batch", "sequence_length"),
                f"{recipe.steps} steps of {per_step:,} tokens are not {recipe.repetitions:g} "
                f"repetitions of {recipe.unique_tokens:,} unique tokens",
                f"{float(total / per_step):.6g} steps, or two of the three only",
                "set the one that is to follow from the others to null",
            )


def check_alpha(recipe: Recipe) -> Iterator[Conflict]:
    alpha = recipe.alpha
    if not isinstance(alpha, AlphaSchedule):
        return
    ends = [phase.until for phase in alpha.phases]
    for i, (before, end) in enumerate(zip([Fraction(0), *ends], ends, strict=False)):
        if end <= before:
            what = f"{end} is not after {before}, where the phase begins"
            expected = "phases in increasing order of `until`"
            yield Conflict((f"alpha.phases.{i}.until",), what, expected)
    if ends[-1] != 1:
        last = f"alpha.phases.{len(ends) - 1}.until"
        yield Conflict((last,), f"the last phase ends at {ends[-1]}", "1, the end of the run")
    if alpha.name == "phases" and alpha.start != 1:
        what = f"{alpha.start} has no effect on a schedule of phases"
        yield Conflict(("alpha.start", "alpha.name"), what, "start with name: linear only")


def check_objective(recipe: Recipe) -> Iterator[Conflict]:
    objective, corruption = recipe.objective, recipe.objective.corruption
    if objective.rotation and objective.mixing == "weighted_sum":
        keys = ("objective.rotation", "objective.mixing")
        what = "true, but in a weighted sum every sequence has both objectives"
        yield Conflict(keys, what, "null or false")
    if not isinstance(corruption, SpanCorruption):
        return
    if corruption.random_share + corruption.keep_share > 1:
        yield Conflict(
            ("objective.corruption.random_share", "objective.corruption.keep_share"),
            f"{corruption.random_share} + keep_share {corruption.keep_share} is above 1",
            "random_share + keep_share <= 1; the rest becomes <mask>",
        )


def check_model(recipe: Recipe) -> Iterator[Conflict]:
    width, heads = recipe.model.width, recipe.model.heads
    if width % heads or width // heads % 2:
        problem = "not divisible by" if width % heads else "an odd number of times"
        yield Conflict(
            ("model.width", "model.heads"),
            f"{width} is {problem} heads {heads}",
            f"a multiple of {2 * heads}: rotary positions pair the dimensions of each head",
            f"nearest: {max(1, round(width / (2 * heads))) * 2 * heads}",
        )
    build, rows = recipe.data.build, recipe.model.vocab_size
    if build and build.tokenizer is None and rows is not None and rows < build.vocab_size:
        yield Conflict(
            ("model.vocab_size", "data.build.vocab_size"),
            f"{rows} is below data.build.vocab_size {build.vocab_size}",
            f"at least {build.vocab_size}",
            "leave it out to take the dataset's",
        )


def check_import(recipe: Recipe) -> Iterator[Conflict]:
    model = recipe.model
    if model.hf is None:
        if model.hf_init != "weights":
            what = f"{model.hf_init} has no effect without an imported model"
            yield Conflict(("model.hf_init", "model.hf"), what, "model.hf", "leave it out")
        return
    for name in _changed(model, SIZES):
        what = (
            f"{getattr(model, name)} has no effect on an imported model, which has sizes of its own"
        )
        hint = f"leave {name} out"
        yield Conflict((f"model.{name}", "model.hf"), what, "model.hf or sizes", hint)
    build = recipe.data.build
    if build and build.tokenizer is None and model.hf_init == "weights":
        yield Conflict(
            ("data.build.tokenizer", "model.hf"),
            "null trains another tokenizer than that of the weights",
            f"the model's: {model.hf}, if it is a directory",
            "or model.hf_init: scratch",
        )


def check_schedule(recipe: Recipe) -> Iterator[Conflict]:
    schedule = recipe.optim.schedule
    of_others = {"wsd": (), "cosine": ("cooldown", "shape")}
    for name in _changed(schedule, of_others.get(schedule.name, ("cooldown", "shape", "final"))):
        yield Conflict(
            (f"optim.schedule.{name}", "optim.schedule.name"),
            f"{getattr(schedule, name)} has no effect on a {schedule.name} schedule",
            "a schedule that decays so" if name == "final" else "name: wsd",
            f"leave {name} out",
        )


def _changed(section: ModelSection | ScheduleSection, names: Iterable[str]) -> list[str]:
    """The fields that are no longer what they are by default."""
    default = type(section)()
    return [name for name in names if getattr(section, name) != getattr(default, name)]


def check_sample(recipe: Recipe) -> Iterator[Conflict]:
    infill = recipe.sample.infill
    if infill and not GAP.search(infill):
        expected = "<mask:N> for a gap of N tokens, N of 1 or more"
        hint = "such as 'A list is <mask:8> in Python.'"
        yield Conflict(("sample.infill",), f"no gap in {infill!r}", expected, hint)


def check_eval(recipe: Recipe) -> Iterator[Conflict]:
    section = recipe.eval
    if section.best is not None and not section.interval_steps:
        keys = ("eval.best", "eval.interval_steps")
        yield Conflict(keys, f"{section.best}, but only the end is evaluated", "an interval_steps")
    if section.patience is not None and section.best is None:
        keys = ("eval.patience", "eval.best")
        what = f"{section.patience}, but no loss is followed"
        yield Conflict(keys, what, "eval.best: ar, diffusion or prefix")
    for key, names in (("eval.tasks", section.tasks), ("eval.modes", section.modes)):
        twice = [name for i, name in enumerate(names) if name in names[:i]]
        if twice:
            yield Conflict((key,), f"{twice[0]} is listed twice", "each once")
    if section.task_interval_steps and not section.tasks:
        what = f"{section.task_interval_steps} has no effect without tasks"
        keys = ("eval.task_interval_steps", "eval.tasks")
        yield Conflict(keys, what, "tasks in eval.tasks, or 0")


def check_resume(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.checkpoint.resume in ("", "weights:"):
        what = f"{recipe.checkpoint.resume!r} names no checkpoint"
        expected = "auto, must, never, a checkpoint directory or weights:PATH"
        yield Conflict(("checkpoint.resume",), what, expected)


def check_data(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    if data.remote is not None and data.build is not None:
        yield Conflict(
            ("data.remote", "data.build"),
            f"{data.remote!r} is to be read, but data.build makes another dataset in data.path",
            "one of data.remote and data.build",
            "to make a dataset there, use `dualtrain data convert --out URL`",
        )
    if data.build is not None and "-" in data.build.sources:
        yield Conflict(
            ("data.build.source",),
            "standard input belongs to no run",
            "files, or builtin:python-docs",
            "convert it first, with `dualtrain data convert -`",
        )


CHECKS: tuple[Callable[[Recipe], Iterator[Conflict]], ...] = (
    check_batches,
    check_length,
    check_alpha,
    check_objective,
    check_model,
    check_import,
    check_schedule,
    check_sample,
    check_eval,
    check_resume,
    check_data,
)
