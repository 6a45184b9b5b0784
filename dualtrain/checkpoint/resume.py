"""What a run starts from: nothing, a checkpoint of its own, another run's weights, a branch.

``assemble`` asks :func:`agree_on_start` once the ranks have met, then :func:`check_compatible`. A
checkpoint is read only after each of its files has been compared with its hash, by the ranks
together; a damaged one is passed over, with a message, only if ``checkpoint.resume`` is ``auto``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ValidationError

from dualtrain.checkpoint.files import MARKER, find_defects
from dualtrain.checkpoint.store import (
    RECIPE,
    REQUIRED,
    find_checkpoints,
    gather,
    is_whole,
    list_checkpoints,
    read_state,
    step_of,
)
from dualtrain.common.errors import UserError
from dualtrain.common.formatting import counted
from dualtrain.data.plan import DATA_ORDER
from dualtrain.launch.world import World
from dualtrain.recipe.differences import may_differ, recipe_differences
from dualtrain.recipe.load import dump_recipe
from dualtrain.recipe.schema import Recipe
from dualtrain.recipe.yaml_source import load

MAY_CHANGE = (
    "name",
    "run_dir",
    "progress",
    "checkpoint",
    "eval",
    "sample",
    "data.path",
    "data.build",
    "data.remote",
    "data.prefetch_steps",
    "model.attention",
    "model.compile",
    "model.activation_checkpointing",
    "engine.deepspeed",
    "engine.timeout_s",
    "engine.skip_non_finite",
)
"""Recipe keys (and everything below them) that a resumed run may set differently.

The dataset may move, not change: its fingerprint is compared instead of its path.
"""

BRANCH_MAY_CHANGE = (
    *MAY_CHANGE,
    "steps",
    "unique_tokens",
    "repetitions",
    "optim.lr",
    "optim.weight_decay",
    "optim.momentum",
    "optim.newton_schulz",
    "optim.betas",
    "optim.eps",
    "optim.clip_norm",
    "optim.schedule",
    "objective.ar_weight",
    "objective.z_loss",
    "objective.corruption",
)
"""What a branch may set differently: nothing that decides which data a step sees.

The length may change, not the unique subset: ``branch`` compares what follows from both recipes.
"""

Kind = Literal["fresh", "full", "weights", "branch"]
PREFIXES: dict[str, Kind] = {"weights:": "weights", "branch:": "branch"}


@dataclass(frozen=True)
class Resume:
    """What a run starts from.

    Attributes:
        kind: ``fresh``; ``full`` continues exactly; ``branch`` continues another run in a directory
            of its own, with changes; ``weights`` takes the weights and starts at 0.
    """

    kind: Kind
    path: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def continues(self) -> bool:
        """Whether step, optimizer and data go on where the checkpoint ends."""
        return self.kind in ("full", "branch")


def agree_on_start(resume: str, run_dir: Path, world: World) -> Resume:
    """Choose what to start from, the same on every rank, and make sure of its files.

    Rank 0 chooses, so that ranks with different views of a directory cannot part; every rank hashes
    its share of the files. All ranks call this.
    """
    damaged: dict[Path, str] = {}
    while True:
        choice = _broadcast(lambda: choose_resume(resume, run_dir, damaged=damaged), world)
        if choice.path is None:
            return choice
        found = gather(find_defects(choice.path, share=(world.rank, world.world_size)), world)
        defects = [defect for defects in found for defect in defects]
        if not defects:
            return choice
        damaged[choice.path] = defects[0]


def choose_resume(
    resume: str, run_dir: Path, *, damaged: Mapping[Path, str] | None = None
) -> Resume:
    """Turn ``checkpoint.resume`` into the checkpoint to start from.

    A run that has begun continues its own newest checkpoint, whatever it began from: so a command
    with ``weights:PATH`` can be repeated, too. Never does a run begin beside checkpoints that would
    later be mistaken for its own, nor at the beginning because none of its own can be read.

    Args:
        damaged: Checkpoints whose files are not as they were saved, and what is wrong with them.
    """
    wrong = {**_damaged_by_size(run_dir), **(damaged or {})}
    own = [path for path in find_checkpoints(run_dir) if path not in wrong]
    newest = own[-1] if own else None
    if resume == "auto":
        return _newest_undamaged(newest, wrong, run_dir)
    begun = [path for path in list_checkpoints(run_dir) if path == newest or path in wrong]
    if resume == "never":
        if begun:
            raise _mixed(resume, run_dir, begun[-1])
        return Resume("fresh")
    if begun and begun[-1] in wrong:
        raise _is_damaged(begun[-1], wrong[begun[-1]], newest)
    if resume == "must":
        if newest is None:
            raise UserError(
                "checkpoint.resume",
                f"`must`, but {run_dir} has no whole checkpoint",
                f"a directory step-NNNNNNNN with its {MARKER}",
                "use resume: auto to start from the beginning",
            )
        return Resume("full", newest)
    return _from_path(resume, run_dir, newest, wrong)


def _source_of(resume: str) -> tuple[Kind, Path]:
    """The kind and the path of a ``checkpoint.resume`` that names one."""
    for prefix, kind in PREFIXES.items():
        if resume.startswith(prefix):
            return kind, Path(resume.removeprefix(prefix))
    return "full", Path(resume)


def _from_path(
    resume: str, run_dir: Path, newest: Path | None, wrong: Mapping[Path, str]
) -> Resume:
    kind, path = _source_of(resume)
    if path.is_dir() and not (path / MARKER).exists() and find_checkpoints(path):
        path = find_checkpoints(path)[-1]
    if newest is not None:
        of_this_run = path.resolve().parent == run_dir.resolve()
        if of_this_run and path.resolve() != newest.resolve():
            raise _mixed(resume, run_dir, newest)
        return Resume("full", newest)
    defects = [wrong[path]] if path in wrong else find_defects(path, required=REQUIRED)
    if defects:
        expected = "auto, must, never, a whole checkpoint directory, weights:PATH or branch:PATH"
        raise UserError("checkpoint.resume", f"{path}: {defects[0]}", expected)
    return Resume(kind, path)


def _newest_undamaged(newest: Path | None, wrong: Mapping[Path, str], run_dir: Path) -> Resume:
    newer = [path for path in wrong if newest is None or step_of(path) > step_of(newest)]
    if newest is None and wrong:
        problems = "; ".join(f"{path.name}: {wrong[path]}" for path in sorted(wrong, key=step_of))
        raise UserError(
            str(run_dir),
            f"every checkpoint of this run is damaged: {problems}",
            "one that is whole",
            "restore a file from a copy; or move the checkpoints away to start at the beginning",
        )
    notes = [
        f"{path} is damaged and passed over: {wrong[path]}" for path in sorted(newer, key=step_of)
    ]
    return Resume("fresh" if newest is None else "full", newest, tuple(notes))


def _damaged_by_size(run_dir: Path) -> dict[Path, str]:
    """Checkpoints that have lost something: they got their name when they were whole."""
    suspects = [path for path in list_checkpoints(run_dir) if not is_whole(path)]
    return {path: find_defects(path, required=REQUIRED)[0] for path in suspects}


def _is_damaged(path: Path, what: str, older: Path | None) -> UserError:
    hint = "restore the file from a copy, or move the directory away"
    if older is not None:
        hint = f"checkpoint.resume=auto goes back to {older.name}; or {hint}"
    return UserError(str(path), f"is damaged: {what}", "the files as they were saved", hint)


def _mixed(resume: str, run_dir: Path, newest: Path) -> UserError:
    return UserError(
        "checkpoint.resume",
        f"{resume!r}, but {run_dir} has checkpoints up to {newest.name}, with which the new run's "
        "would be mixed",
        "a run directory without newer checkpoints",
        "set run_dir to a new directory, move the checkpoints away, or use checkpoint.resume=auto",
    )


def check_compatible(resume: Resume, *, recipe_text: str, fingerprint: str) -> None:
    """Refuse to continue a checkpoint with which this run would become another."""
    path = resume.path
    assert path is not None
    state = read_state(path)
    if state.get("data_order") != DATA_ORDER:
        raise UserError(
            str(path),
            "was trained by an earlier version, which read the text in another order: going on, it "
            "would read some of it again and some never",
            "a checkpoint of this version",
            f"start anew with another run_dir; checkpoint.resume=weights:{path} takes the weights",
        )
    may_change = BRANCH_MAY_CHANGE if resume.kind == "branch" else MAY_CHANGE
    different = recipe_differences(load(_as_of_now(path / RECIPE)), load(recipe_text), may_change)
    if different:
        lines = [f"{key}: checkpoint {old!r}, recipe {new!r}" for key, old, new in different]
        ways = [f"checkpoint.resume=weights:{path} to take only the weights"]
        if all(may_differ(key, BRANCH_MAY_CHANGE) for key, _, _ in different):
            ways.insert(0, f"--from {state['step']} to branch off with the new values")
        raise UserError(
            str(path),
            "the recipe is not the one of the checkpoint: " + "; ".join(lines),
            "the same values",
            f"set run_dir to a new directory, or use {' or '.join(ways)}",
        )
    if state["fingerprint"] != fingerprint:
        raise UserError(
            str(path),
            f"the dataset has changed: fingerprint {state['fingerprint']} then, {fingerprint} now",
            "the dataset that the checkpoint was trained on",
        )


def _as_of_now(file: Path) -> str:
    """A checkpoint's recipe, with the defaults of settings that did not exist when it was saved."""
    text = file.read_text()
    try:
        return dump_recipe(Recipe.model_validate(load(text)))
    except ValidationError:
        # Of another version that knew other settings: the differences are said by name.
        return text


def describe_change(path: Path, *, world_size: int, zero_stage: int) -> str | None:
    """How the ranks differ from those that saved, in a sentence; None where they do not."""
    state = read_state(path)
    if (state["world_size"], state["zero_stage"]) == (world_size, zero_stage):
        return None
    return (
        f"{path.name} was saved by {counted(state['world_size'], 'rank')} at ZeRO stage "
        f"{state['zero_stage']}, now {world_size} at stage {zero_stage}: the data is the same, "
        "losses are up to the order of additions"
    )


def share_rank_states(states: Sequence[Mapping[str, Any]], rank: int) -> dict:
    """What a rank continues with, from what every rank of another number saved.

    The unfinished averages go to rank 0, which counts for all; algorithms must have had the same
    state everywhere. The state of the global generators is None for a rank that is new.
    """
    first = states[0]
    for name, state in first["algorithms"].items():
        if not all(_same(state, other["algorithms"][name]) for other in states):
            raise UserError(
                "algorithms",
                f"{name} has a state of its own on each of the {len(states)} ranks that saved it",
                f"{len(states)} ranks again",
                f"use --ranks {len(states)}, or checkpoint.resume=weights:PATH to take only the "
                "weights",
            )
    from dualtrain.progress.meter import Meter

    meters = Meter.share_states([state["meter"] for state in states], rank)
    # More ranks than before: the new ones keep the generators they were born with.
    random = states[rank]["random"] if rank < len(states) else None
    return {**first, "meter": meters, "random": random}


def with_notes(resume: Resume, *notes: str | None) -> Resume:
    """The same start with more to be said of it."""
    said = tuple(note for note in notes if note is not None)
    return replace(resume, notes=resume.notes + said)


def _broadcast(choose: Any, world: World) -> Resume:
    """What rank 0 chose, or the error it met."""
    box: list[Any] = [None]
    if world.rank == 0:
        try:
            box = [choose()]
        except UserError as error:
            box = [error]
        except OSError as error:
            # Not left to itself: the other ranks wait for the choice.
            box = [UserError(str(error.filename), f"cannot be read: {error.strerror}")]
    if world.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


def _same(one: Any, other: Any) -> bool:
    """Equality of what algorithms keep, which may hold arrays."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)
