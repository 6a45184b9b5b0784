"""Checkpoints: save, find, load, retain. What a run starts from is chosen in ``resume``.

A checkpoint is a directory of a run::

    step-00001000/
      complete.json         the marker: size and hash of every other file; written last
      state.json            step, ranks, ZeRO stage, precision, last held-out losses
      recipe.yaml           the resolved recipe
      weights.safetensors   fp32 master weights by parameter name
      config.json           the model's configuration,
      tokenizer.json        and its tokenizer,
      dataset.json          and what it was trained on: for using it without the dataset
      rank-00000.pt …       per rank: algorithms, unfinished averages, random states, and which
                            pieces of the optimizer's state are where in DeepSpeed's files
      deepspeed/            DeepSpeed's own files: optimizer state, partitions

It is written as ``step-00001000.partial`` and renamed when all of it is on the disk; only a
directory whose files are as its marker says counts. A run directory on a file system that all ranks
see is required, as for DeepSpeed itself.
"""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dualtrain.checkpoint.files import (
    FORMAT,
    FileFacts,
    Files,
    find_defects,
    write_marker,
)
from dualtrain.common.errors import UserError
from dualtrain.common.file_kinds import open_weights
from dualtrain.common.files import sync
from dualtrain.engine.optimizer_state import (
    DIRECTORY,
    MissingState,
    SavedPieces,
    load_state,
    save_state,
)
from dualtrain.engine.parameters import (
    gather_weights,
    module_of,
    parameter_shapes,
    whole_parameters,
)
from dualtrain.launch.world import World

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

STATE = "state.json"
RECIPE = "recipe.yaml"
WEIGHTS = "weights.safetensors"
REQUIRED = (STATE, RECIPE, WEIGHTS)

_PARTIAL = ".partial"

T = TypeVar("T")


class SaveFailed(Exception):
    """A checkpoint could not be written; nothing of it is left, and older ones are as they were."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Directory of the checkpoint after ``step`` optimizer updates."""
    return run_dir / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Everything that bears the name of a checkpoint, damaged or not, oldest first."""
    found = [p for p in run_dir.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)]
    return sorted(found, key=step_of)


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return [path for path in list_checkpoints(run_dir) if is_whole(path)]


def is_whole(path: Path) -> bool:
    """Whether the marker is there and every file has the size that it records."""
    return not find_defects(path, required=REQUIRED)


def read_state(path: Path) -> dict:
    """The checkpoint's ``state.json``."""
    try:
        state = json.loads((path / STATE).read_text())
    except ValueError as error:
        raise _damaged(path / STATE, error) from None
    if not isinstance(state, dict) or "step" not in state:
        raise _damaged(path / STATE, ValueError("no step in it"))
    return state


def save(
    run_dir: Path,
    *,
    engine: DeepSpeedEngine,
    world: World,
    step: int,
    texts: Mapping[str, str],
    facts: Mapping[str, object],
    rank_state: Mapping[str, object],
) -> Path:
    """Write a checkpoint; every rank calls this.

    Args:
        texts: Small files by name, the recipe among them; only rank 0's are written.
        facts: What ``state.json`` holds besides step and format; the same on every rank.
        rank_state: What this rank needs to continue exactly; torch-serialisable.

    Raises:
        SaveFailed: on every rank, when one could not write, as on a full disk.
    """
    path = checkpoint_path(run_dir, step)
    partial = path.with_name(path.name + _PARTIAL)
    files = Files(partial)
    if world.rank == 0:
        files.attempt(lambda: _make_empty(partial))
    _agree(files, partial, world)
    pieces = save_state(
        engine, partial, make_directory=files.make_directory, write=files.torch_save
    )
    state = {**rank_state, "random": get_random_state(), "pieces": tuple(pieces)}
    buffers = _persistent_buffers(engine)
    state["buffers"] = {name: buffer.detach().cpu() for name, buffer in buffers.items()}
    files.torch_save(state, partial / f"rank-{world.rank:05d}.pt")
    weights = gather_weights(engine, keep=world.rank == 0)
    if world.rank == 0:
        files.attempt(lambda: save_weights(weights, partial / WEIGHTS))
        files.add(partial / WEIGHTS)
        facts = {"format": FORMAT, "step": step, "world_size": world.world_size, **facts}
        for name, text in texts.items():
            files.text(text, partial / name)
        files.text(json.dumps(facts, indent=1) + "\n", partial / STATE)
    files.sync()
    every_file = _agree(files, partial, world)
    if world.rank == 0:
        files.attempt(lambda: _publish(partial, path, every_file))
    _agree(files, partial, world)
    return path


def load(
    path: Path, engine: DeepSpeedEngine, world: World, states: Sequence[Mapping[str, Any]]
) -> None:
    """Restore weights, buffers and optimizer from a whole checkpoint; every rank calls this.

    Args:
        path: The checkpoint; it may come from another number of ranks or another ZeRO stage.
        states: From :func:`load_rank_states`.
    """
    try:
        load_state(engine, path, [SavedPieces(*state["pieces"]) for state in states])
    except MissingState as error:
        raise _damaged(path / DIRECTORY, error) from None
    mine = states[world.rank % len(states)]["buffers"]
    for name, buffer in _persistent_buffers(engine).items():
        buffer.copy_(mine[name])


class _Unpickler(pickle.Unpickler):
    """Finds a class of ours where it stands now, though a checkpoint names its earlier module."""

    def find_class(self, module_name: str, global_name: str) -> object:
        return super().find_class(_MOVED.get(module_name, module_name), global_name)


class _PickleOfAnyVersion:
    """What ``torch.load`` takes in place of the module ``pickle``."""

    Unpickler = _Unpickler


_MOVED = {"dualtrain.optimizer_state": "dualtrain.engine.optimizer_state"}


def load_rank_states(path: Path, world: World) -> list[dict]:
    """What ranks gave to :func:`save` as ``rank_state``, with three keys more; all ranks call.

    Where as many ranks have saved, only that of this one, from its own file. Else those of all, in
    order: each file is read by one rank and handed on to the others.

    ``random`` is for :func:`set_random_state`, ``pieces`` and ``buffers`` for :func:`load`.
    """
    saved, here = read_state(path)["world_size"], world.world_size
    read: list[dict] = []
    error = None
    try:
        read = [_load_rank_state(path, rank) for rank in range(world.rank, saved, here)]
    except UserError as problem:
        error = problem  # the other ranks wait for what this one has read
    if saved != here:
        every = gather((read, error), world)
        error = next((problem for _, problem in every if problem is not None), None)
        read = [every[rank % here][0][rank // here] for rank in range(saved)] if not error else []
    if error is not None:
        raise error
    return read


def _load_rank_state(path: Path, rank: int) -> dict:
    file = path / f"rank-{rank:05d}.pt"
    try:
        # A user's algorithm may keep any object.
        return torch.load(
            file, map_location="cpu", weights_only=False, pickle_module=_PickleOfAnyVersion
        )
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(file, error) from None


def gather(mine: T, world: World) -> list[T]:
    """Collect a picklable object of every rank, in rank order; all ranks call."""
    every = [mine] * world.world_size
    if world.world_size > 1:
        dist.all_gather_object(every, mine)
    return every


def load_weights(path: Path, model: nn.Module) -> None:
    """Copy a checkpoint's fp32 weights into a model that no engine holds yet.

    Raises:
        UserError: when names or shapes differ, naming the first few.
    """
    own = dict(model.named_parameters())
    shapes = parameter_shapes(model)
    with open_weights(path / WEIGHTS) as weights:
        saved = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        wrong = sorted(saved.keys() ^ own.keys())
        wrong += [
            f"{name}: {saved[name]} in the checkpoint, {shape} here"
            for name, shape in shapes.items()
            if name in saved and saved[name] != shape
        ]
        if not wrong:
            for name, parameter in own.items():
                # One by one: no rank holds a second model, nor the whole of a partitioned one.
                with torch.no_grad(), whole_parameters([parameter]):
                    parameter.copy_(weights.get_tensor(name))
    if wrong:
        raise UserError(
            str(path / WEIGHTS),
            f"weights do not fit the model: {'; '.join(wrong[:5])}",
            "the `model` section of the checkpoint's recipe.yaml",
        )


def retain(run_dir: Path, keep: int | None, *, besides: Collection[int | None] = ()) -> list[Path]:
    """Remove whole checkpoints beyond the newest ``keep`` and those of the steps ``besides``.

    Args:
        keep: None keeps all.

    Returns:
        Those that could not be removed.
    """
    if keep is None:
        return []
    left = []
    for path in find_checkpoints(run_dir)[: -max(keep, 2)]:
        if step_of(path) in besides:
            continue
        try:
            remove(path)
        except OSError:
            left.append(path)
    return left


def remove(path: Path) -> None:
    """Remove a checkpoint; what a kill leaves of it has the name of an unfinished one."""
    if path.exists():
        partial = path.with_name(path.name + _PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        path.rename(partial)
        sync(path.parent)
        # What a network file system holds on to goes when the run starts the next time.
        shutil.rmtree(partial, ignore_errors=True)


def remove_unfinished(run_dir: Path) -> None:
    """Remove what saves that did not come to their end have left; only who holds the lock may."""
    for path in run_dir.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def save_weights(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write weights as safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(weights), file)
    except SafetensorError as error:
        raise OSError(None, str(error), str(file)) from None


def _persistent_buffers(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Buffers that belong to the model's state; dualtrain's own model has none."""
    model = module_of(engine)
    kept = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _publish(partial: Path, path: Path, files: dict[str, FileFacts]) -> None:
    write_marker(partial, files)
    if path.exists():  # damaged, and saved anew by a run that went back further
        shutil.rmtree(path)
    partial.rename(path)
    sync(path.parent)


def _agree(files: Files, partial: Path, world: World) -> dict[str, FileFacts]:
    """Wait for all ranks, and find out together whether all have written."""
    ranks = gather((files.error, files.facts), world)
    errors = [error for error, _ in ranks if error is not None]
    if errors:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise SaveFailed(errors[0])
    return {name: facts for _, written in ranks for name, facts in written.items()}


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(
        str(file),
        f"is damaged: {error}",
        "the file as it was saved",
        "move the checkpoint's directory away to continue from an older one",
    )


def get_random_state() -> dict[str, object]:
    """State of the global generators, which only algorithms of the user's own may use."""
    state: dict[str, object] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any] | None) -> None:
    """Continue the global generators; None leaves them as they are."""
    if state is None:
        return
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
