"""Branching: another run goes on from a checkpoint, in a directory of its own, with changes.

``dualtrain run recipe.yaml --from 6000 steps=12000`` extends a WSD run from before its cooldown;
``optim.schedule.cooldown=0.5`` or another peak learning rate are as welcome. The data goes on as if
nothing had happened: the unique subset is the old one, and a step takes the sequences that it would
have taken there; so what decides them cannot change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from dualtrain.checkpoint.files import find_defects
from dualtrain.checkpoint.store import (
    RECIPE,
    checkpoint_path,
    find_checkpoints,
    read_state,
    step_of,
)
from dualtrain.common.errors import UserError
from dualtrain.common.files import user_path, write_text
from dualtrain.data.corpus import CorpusFacts, read_corpus
from dualtrain.derived.derive import build_mixture, run_length
from dualtrain.derived.reasons import Length
from dualtrain.method.mixing import Mixture
from dualtrain.method.schedules import nearest_whole
from dualtrain.progress.metrics import FILE_NAME, read_metrics
from dualtrain.recipe.load import LoadedRecipe, load_recipe
from dualtrain.recipe.schema import Recipe


def load_branch(name: str, overrides: Sequence[str], start: str) -> LoadedRecipe:
    """Load the recipe of a branch.

    Args:
        start: A step of the run that name and overrides name, or a checkpoint's directory.

    Returns:
        The recipe with ``checkpoint.resume`` set, the unique subset of the run that it leaves, and
        a directory beside that run's, unless it has another already.
    """
    pairs = [override.partition("=") for override in overrides]
    named = {key.strip(): value.strip() for key, _, value in pairs}
    place = [f"{key}={named[key]}" for key in ("name", "run_dir", "data.path") if key in named]
    base = load_recipe(name, place).recipe
    path, corpus = _checkpoint(base.directory, start), read_corpus(base)
    parent = read_parent(path)
    unique = run_length(parent, corpus).unique_tokens
    allowed = (str(unique), str(parent.unique_tokens))
    if named.get("unique_tokens", str(unique)).replace("_", "") not in allowed:
        raise UserError(
            "unique_tokens",
            f"{named['unique_tokens']}, but a branch goes on with those of the run that it leaves",
            str(unique),
            "for another subset, start a run with checkpoint.resume=weights:PATH",
        )
    pinned = [f"unique_tokens={unique}", f"checkpoint.resume={json.dumps(f'branch:{path}')}"]
    if "steps" not in named and "repetitions" not in named:
        steps = run_length(load_recipe(name, overrides).recipe, corpus).steps
        pinned.append(f"steps={steps}")
    pinned.append("steps=null" if "repetitions" in named else "repetitions=null")
    directory = load_recipe(name, [*overrides, *pinned]).recipe.directory
    if directory.resolve() == path.resolve().parent:
        beside = f"{directory}-from-{path.name.removeprefix('step-')}"
        pinned.append(f"run_dir={json.dumps(beside)}")
    return load_recipe(name, [*overrides, *pinned])


def read_parent(checkpoint: Path) -> Recipe:
    """The recipe that a checkpoint was made with."""
    return load_recipe(str(checkpoint / RECIPE)).recipe


def check_branch(recipe: Recipe, checkpoint: Path, corpus: CorpusFacts) -> list[str]:
    """Check that the data of a branch goes on where its parent's was.

    Raises:
        UserError: The branch has other unique tokens, would end where it begins, or its alpha
            schedule would have led to another place in the data.
    """
    parent, step = read_parent(checkpoint), read_state(checkpoint)["step"]
    old, new = run_length(parent, corpus), run_length(recipe, corpus)
    if old.unique_tokens != new.unique_tokens:
        raise UserError(
            str(checkpoint),
            f"the unique subset is another: checkpoint {old.unique_tokens:,} tokens, recipe "
            f"{new.unique_tokens:,}",
            "the same, so that data goes on",
            f"set unique_tokens={old.unique_tokens} and repetitions=null, as --from does",
        )
    if new.steps <= step:
        raise UserError("steps", f"{new.steps}, and the branch begins after {step}", "more")
    before = build_mixture(parent, old.steps), build_mixture(recipe, new.steps)
    slots = [mixture.ar_slots_before(step) for mixture in before]
    if slots[0] != slots[1]:
        raise UserError(
            "alpha",
            f"its schedule is stretched over {new.steps} steps instead of {old.steps}: up to step "
            f"{step} it has {slots[1]} AR slots, the checkpoint {slots[0]}",
            "the same up to there",
            "keep steps, or give a schedule with the same values up to there",
        )
    if before[1].rotates:
        _check_pass(recipe, old.unique_tokens, step, before)
    notes = (*_cooldown_note(parent, old, step), *_rate_note(recipe, old, new))
    return [f"branches off from {checkpoint}", *notes]


def inherit_metrics(parent: Path, run_dir: Path, step: int) -> None:
    """Begin a branch's metrics with its parent's up to a step: they tell the whole history."""
    source = parent / FILE_NAME
    if not source.is_file():
        return
    lines = [json.dumps(r) for r in read_metrics(source) if r["step"] <= step]
    write_text(run_dir / FILE_NAME, "".join(line + "\n" for line in lines))


def _check_pass(recipe: Recipe, unique: int, step: int, before: Sequence[Mixture]) -> None:
    """Check that the pass over the text in which a branch begins is shared as it was begun.

    What of the text an objective has in a pass depends on alpha up to the pass's end.
    """
    per_step = recipe.global_batch * recipe.sequence_length
    passes = -(-step * per_step // unique)
    for end in range(passes + 1):
        old, new = (m.ar_tokens(end * unique, recipe.sequence_length) for m in before)
        if old != new:
            last = -(-end * unique // per_step)
            raise UserError(
                "alpha",
                f"its schedule gives AR {new:,} of the first {end * unique:,} tokens, the "
                f"checkpoint's {old:,}: the objectives share pass {end} over the text by that",
                f"the same up to step {last}, where that pass ends",
                "branch off there, or give a schedule with the same values up to there",
            )


def _rate_note(recipe: Recipe, old: Length, new: Length) -> list[str]:
    if recipe.objective.corruption.rate is None or old.steps == new.steps:
        return []
    return [
        f"objective.corruption.rate is stretched over {new.steps} steps instead of {old.steps}, so "
        "it jumps where the branch begins"
    ]


def _cooldown_note(parent: Recipe, length: Length, step: int) -> list[str]:
    schedule = parent.optim.schedule
    if schedule.name != "wsd":
        return []
    begin = length.steps - nearest_whole(float(Fraction(str(schedule.cooldown)) * length.steps))
    if step <= begin:
        return []
    return [
        f"step {step} lies in the cooldown of the run it comes from, which began after step "
        f"{begin}: the learning rate rises again"
    ]


def _checkpoint(run_dir: Path, start: str) -> Path:
    path = checkpoint_path(run_dir, int(start)) if start.isdigit() else user_path(start)
    defects = find_defects(path) if path.is_dir() else [f"there is no {path}"]
    if defects:
        there = ", ".join(str(step_of(p)) for p in find_checkpoints(run_dir)) or "none"
        raise UserError(
            "--from",
            f"{start!r}: {defects[0]}",
            "a step of which there is a checkpoint, or a checkpoint's directory",
            f"checkpoints of {run_dir}: {there}",
        )
    return path
