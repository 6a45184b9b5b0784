"""Checkpoints: save, find, load, retain.

A checkpoint is a directory of a run::

    step-00001000/
      complete.json         the marker: size of every other file; written last, removed first
      state.json            step, ranks, ZeRO stage, precision, last held-out losses
      recipe.yaml           the resolved recipe
      weights.safetensors   fp32 master weights by parameter name; all that evaluation needs
      rank-00000.pt …       per rank: algorithms, unfinished averages, random states
      deepspeed/            DeepSpeed's own files: optimizer state, partitions

Only a directory whose marker is there and whose files have the recorded sizes counts. A run
directory on a file system that all ranks see is required, as for DeepSpeed itself.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import yaml
from torch import nn

from dualtrain.errors import UserError
from dualtrain.launch import World

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

MARKER = "complete.json"
STATE = "state.json"
RECIPE = "recipe.yaml"
WEIGHTS = "weights.safetensors"
ENGINE = "deepspeed"
FORMAT = 1

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
    "data.cache_limit_gib",
    "data.prefetch_steps",
    "model.attention",
    "model.compile",
    "model.activation_checkpointing",
    "engine.timeout_s",
)
"""Recipe keys (and everything below them) that a resumed run may set differently.

The dataset may move, not change: its fingerprint is compared instead of its path.
"""


@dataclass(frozen=True)
class Resume:
    """What a run starts from.

    Attributes:
        kind: ``fresh``; ``full`` continues exactly; ``weights`` takes the weights and starts at 0.
        path: The checkpoint directory, unless fresh.
    """

    kind: Literal["fresh", "full", "weights"]
    path: Path | None = None


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Directory of the checkpoint after ``step`` optimizer updates."""
    return run_dir / f"step-{step:08d}"


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [
        path
        for path in run_dir.glob("step-*")
        if re.fullmatch(r"step-\d{8,}", path.name) and is_whole(path)
    ]
    return sorted(found, key=lambda path: int(path.name[5:]))


def is_whole(path: Path) -> bool:
    """Whether the marker is there and every file has the size that it records."""
    return not _defects(path)


def choose_resume(resume: str, run_dir: Path) -> Resume:
    """Turn ``checkpoint.resume`` into the checkpoint to start from.

    A run that has begun continues its own newest checkpoint, whatever it began from: so a command
    with ``weights:PATH`` can be repeated, too. Never does a run begin beside checkpoints that would
    later be mistaken for its own.

    Raises:
        UserError: when ``must``, or a path, names nothing that can be continued; when ``never``, or
            an older checkpoint of the same run, would mix two runs in one directory.
    """
    whole = find_checkpoints(run_dir)
    if resume in ("auto", "must"):
        if whole:
            return Resume("full", whole[-1])
        if resume == "must":
            raise UserError(
                "checkpoint.resume",
                f"`must`, but {run_dir} has no whole checkpoint",
                "a directory step-NNNNNNNN with its complete.json",
                "use resume: auto to start from the beginning",
            )
        return Resume("fresh")
    if resume == "never":
        if whole:
            raise _mixed(resume, run_dir, whole[-1])
        return Resume("fresh")
    kind: Literal["full", "weights"] = "weights" if resume.startswith("weights:") else "full"
    path = Path(resume.removeprefix("weights:"))
    if path.is_dir() and not (path / MARKER).exists() and find_checkpoints(path):
        path = find_checkpoints(path)[-1]
    defects = _defects(path)
    if defects:
        expected = "auto, must, never, a whole checkpoint directory, or weights:PATH to one"
        raise UserError("checkpoint.resume", f"{path}: {defects[0]}", expected)
    if not whole:
        return Resume(kind, path)
    if path.resolve().parent == run_dir.resolve() and path.resolve() != whole[-1].resolve():
        raise _mixed(resume, run_dir, whole[-1])
    return Resume("full", whole[-1])


def _mixed(resume: str, run_dir: Path, newest: Path) -> UserError:
    return UserError(
        "checkpoint.resume",
        f"{resume!r}, but {run_dir} has checkpoints up to {newest.name}, with which the new run's "
        "would be mixed",
        "a run directory without newer checkpoints",
        "set run_dir to a new directory, move the checkpoints away, or use checkpoint.resume=auto",
    )


def read_state(path: Path) -> dict:
    """The checkpoint's ``state.json``.

    Raises:
        UserError: when it is damaged.
    """
    try:
        state = json.loads((path / STATE).read_text())
    except ValueError as error:
        raise _damaged(path / STATE, error) from None
    if not isinstance(state, dict) or "step" not in state:
        raise _damaged(path / STATE, ValueError("no step in it"))
    return state


def check_compatible(
    path: Path, *, recipe_text: str, world_size: int, zero_stage: int, fingerprint: str
) -> None:
    """Refuse to continue a checkpoint that this run would not continue exactly.

    Raises:
        UserError: naming every recipe key that differs with both values, or the number of ranks,
            or the dataset.
    """
    state = read_state(path)
    different = recipe_differences((path / RECIPE).read_text(), recipe_text)
    if different:
        lines = [f"{key}: checkpoint {old!r}, recipe {new!r}" for key, old, new in different]
        raise UserError(
            str(path),
            "the recipe is not the one of the checkpoint: " + "; ".join(lines),
            "the same values",
            "set run_dir to a new directory, checkpoint.resume=never, or "
            f"checkpoint.resume=weights:{path} to take only the weights",
        )
    if state["fingerprint"] != fingerprint:
        raise UserError(
            str(path),
            f"the dataset has changed: fingerprint {state['fingerprint']} then, {fingerprint} now",
            "the dataset that the checkpoint was trained on",
        )
    if state["world_size"] != world_size or state["zero_stage"] != zero_stage:
        raise UserError(
            str(path),
            f"saved by {state['world_size']} ranks at ZeRO stage {state['zero_stage']}, "
            f"now {world_size} at stage {zero_stage}",
            "the same",
            f"use --ranks {state['world_size']}, or checkpoint.resume=weights:{path} to take only "
            "the weights",
        )


def recipe_differences(old_text: str, new_text: str) -> list[tuple[str, object, object]]:
    """Keys whose change would make a resumed run another run: (key, old value, new value)."""
    old, new = _flatten(yaml.safe_load(old_text)), _flatten(yaml.safe_load(new_text))
    return [
        (key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)
    ]


def save(
    run_dir: Path,
    *,
    engine: DeepSpeedEngine,
    world: World,
    step: int,
    recipe_text: str,
    facts: Mapping[str, object],
    rank_state: Mapping[str, object],
) -> Path:
    """Write a checkpoint; every rank calls this.

    Args:
        facts: What ``state.json`` holds besides step and format; the same on every rank.
        rank_state: What this rank needs to continue exactly; torch-serialisable.

    Returns:
        The checkpoint's directory, whole.
    """
    import deepspeed.comm as dist

    path = checkpoint_path(run_dir, step)
    if world.rank == 0:
        remove(path)
        path.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(path), tag=ENGINE, save_latest=False)
    torch.save({**rank_state, "random": _random_state()}, path / f"rank-{world.rank:05d}.pt")
    _save_weights(engine, path / WEIGHTS, is_writer=world.rank == 0)
    if world.rank == 0:
        (path / RECIPE).write_text(recipe_text)
        state = {"format": FORMAT, "step": step, "world_size": world.world_size, **facts}
        (path / STATE).write_text(json.dumps(state, indent=1) + "\n")
    dist.barrier()
    if world.rank == 0:
        _write_marker(path)
    dist.barrier()
    return path


def load(path: Path, engine: DeepSpeedEngine, world: World) -> dict:
    """Restore engine and random states from a whole checkpoint; every rank calls this.

    Returns:
        This rank's ``rank_state`` as given to :func:`save`.

    Raises:
        UserError: when DeepSpeed finds nothing to load, or the ranks loaded different steps.
    """
    import deepspeed.comm as dist

    loaded, _ = engine.load_checkpoint(str(path), tag=ENGINE)
    if loaded is None:
        raise UserError(str(path), "DeepSpeed found no engine state", f"{path / ENGINE}")
    file = path / f"rank-{world.rank:05d}.pt"
    try:
        rank_state = torch.load(file, weights_only=False)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(file, error) from None
    _set_random_state(rank_state.pop("random"))
    step = torch.tensor([read_state(path)["step"]], device=engine.device)
    lowest, highest = step.clone(), step.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    if lowest.item() != highest.item():
        raise UserError(
            str(path),
            f"the ranks see different checkpoints: steps {lowest.item()} to {highest.item()}",
            "one run directory that all machines share",
        )
    return rank_state


def load_weights(path: Path, model: nn.Module) -> None:
    """Copy a checkpoint's fp32 weights into a model that no engine holds yet.

    Raises:
        UserError: when names or shapes differ, naming the first few.
    """
    from safetensors.torch import load_file

    weights = load_file(path / WEIGHTS)
    own = dict(model.named_parameters())
    wrong = sorted(weights.keys() ^ own.keys())
    wrong += [
        f"{name}: {tuple(weights[name].shape)} in the checkpoint, {tuple(own[name].shape)} here"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong:
        raise UserError(
            str(path / WEIGHTS),
            f"weights do not fit the model: {'; '.join(wrong[:5])}",
            "the `model` section of the checkpoint's recipe.yaml",
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def retain(run_dir: Path, keep: int | None) -> list[Path]:
    """Remove whole checkpoints beyond the newest ``keep``; None keeps all.

    Returns:
        The removed directories.
    """
    if keep is None:
        return []
    old = find_checkpoints(run_dir)[: -max(keep, 2)]
    for path in old:
        remove(path)
    return old


def remove(path: Path) -> None:
    """Remove a checkpoint, its marker first, so that a half-removed one never counts."""
    (path / MARKER).unlink(missing_ok=True)
    if path.exists():
        _sync_directory(path)
        shutil.rmtree(path)


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(
        str(file),
        f"is damaged: {error}",
        "the file as it was saved",
        "move the checkpoint's directory away to continue from an older one",
    )


def _defects(path: Path) -> list[str]:
    marker = path / MARKER
    if not marker.is_file():
        return [f"no {MARKER}, so it is not a whole checkpoint"]
    try:
        sizes = json.loads(marker.read_text())["sizes"]
    except (ValueError, KeyError, TypeError):
        return [f"{MARKER} cannot be read"]
    if not isinstance(sizes, dict) or not {STATE, RECIPE} <= sizes.keys():
        return [f"{MARKER} does not list the files of a checkpoint"]
    defects = []
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            defects.append(f"{name} is missing")
        elif file.stat().st_size != size:
            defects.append(f"{name} has {file.stat().st_size} bytes, expected {size}")
    return defects


def _write_marker(path: Path) -> None:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        _sync(file)
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in files}
    partial = path / (MARKER + ".partial")
    partial.write_text(json.dumps({"format": FORMAT, "sizes": sizes}, indent=1) + "\n")
    _sync(partial)
    partial.rename(path / MARKER)
    _sync_directory(path)
    _sync_directory(path.parent)


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save_weights(engine: DeepSpeedEngine, file: Path, *, is_writer: bool) -> None:
    """Gather the fp32 master weights one by one and write them on one rank."""
    from deepspeed.utils import safe_get_full_fp32_param
    from safetensors.torch import save_file

    weights: dict[str, torch.Tensor] = {}
    model = engine.module
    assert isinstance(model, nn.Module)
    for name, parameter in model.named_parameters():
        # A collective under ZeRO, so every rank asks; None where the parameter is its own master.
        full = safe_get_full_fp32_param(parameter)
        if is_writer:
            source = parameter if full is None else full
            weights[name] = source.detach().float().cpu().contiguous()
    if is_writer:
        save_file(weights, file)


def _random_state() -> dict[str, object]:
    """State of the global generators, which only algorithms of the user's own may use."""
    state: dict[str, object] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict) and value:
        flat: dict[str, object] = {}
        for key, item in value.items():
            flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value}
