"""The optimizer's state by parameter, whoever holds it: so that any ranks can continue.

DeepSpeed divides masters, moments and momenta over the ranks in a way that depends on their number
and on the ZeRO stage, and reads a checkpoint only where both are the same. :func:`save_state` has
it write its files, and notes which piece of which parameter is where in them. :func:`load_state`
reads them by these notes, taking what this rank needs now: from its own file where ranks and stage
are as before, else from whatever old ranks' files it lies in. So moments and momenta are not
written a second time, and there is one way to load.

Layouts of DeepSpeed 0.19.8, by class of ``engine.optimizer``:

- stage 0: a torch optimizer, state per parameter; rank 0's file has all of it;
- stages 1 and 2 (``DeepSpeedZeroOptimizer``): one flat partition a group; Muon's momentum is laid
  out like it when offloaded, else it holds the whole matrices of which the partition has a part;
- stage 1 in bf16 (``BF16_Optimizer``): one flat partition a group, for every kind of state;
- stage 3: one flat partition a sub-group, in which every parameter has an equal part on each rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualtrain.engine.parameters import module_of, whole_parameters

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

DIRECTORY = "deepspeed"
"""Of DeepSpeed's files, in a checkpoint."""

MUON_KEYS = ("momentum_buffer",)
ADAMW_KEYS = ("exp_avg", "exp_avg_sq")


class MissingState(Exception):
    """A checkpoint lacks a part of the state that it should have."""


class Piece(NamedTuple):
    """A stretch of one parameter's state on one rank.

    Attributes:
        key: Kind of state, such as ``momentum_buffer``.
        start: First of its elements, in the flattened parameter.
        tensor: Index of the tensor that holds them, among those the optimizer updates.
        offset: Of the first element in that tensor, flattened.
    """

    name: str
    key: str
    start: int
    count: int
    tensor: int
    offset: int


@dataclass(frozen=True)
class _Place:
    """Where a stretch of a parameter's master lies: as in :class:`Piece`, with its optimizer."""

    parameter: nn.Parameter
    start: int
    count: int
    tensor: int
    offset: int
    uses_muon: bool


class SavedPieces(NamedTuple):
    """What one rank's files of a checkpoint hold.

    Attributes:
        file: Name of DeepSpeed's file in the checkpoint; None where the rank wrote none.
    """

    file: str | None
    pieces: tuple[Piece, ...]
    updates: int


def save_state(
    engine: DeepSpeedEngine,
    checkpoint: Path,
    *,
    make_directory: Callable[[str], None],
    write: Callable[[object, Path], None],
) -> SavedPieces:
    """Let DeepSpeed write into a checkpoint by these two functions; all ranks call.

    DeepSpeed itself neither waits for the disk nor lets a failed write be known to other ranks.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    written: list[str] = []

    class Writer(TorchCheckpointEngine):
        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            make_directory(path)

        def save(self, state_dict: object, path: str) -> None:
            written.append(str(Path(path).relative_to(checkpoint)))
            write(state_dict, Path(path))

    usual = engine.checkpoint_engine
    engine.checkpoint_engine = Writer()
    # Its conversion script knows neither stage 0 nor BF16_Optimizer, and weights.safetensors holds
    # what it would make; copied unguarded, it could fail on one rank only.
    engine._copy_recovery_script = lambda save_path: None
    try:
        engine.save_checkpoint(str(checkpoint), tag=DIRECTORY, save_latest=False)
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script
    # Stages 1 to 3 write an *_optim_states.pt each; at stage 0 rank 0's file has everything.
    states = [name for name in written if name.endswith("_optim_states.pt")]
    file = next(iter(states or written), None)
    masters, state = _masters(engine), _base(engine).state
    pieces = () if file is None else _find_pieces(engine)
    # Before the first update there is nothing yet.
    begun = tuple(p for p in pieces if p.key in state.get(masters[p.tensor], {}))
    return SavedPieces(file, begun, _count_updates(engine))


def _find_pieces(engine: DeepSpeedEngine) -> tuple[Piece, ...]:
    """The pieces of the optimizer's state that this rank keeps, once there has been an update."""
    names = {id(p): name for name, p in module_of(engine).named_parameters()}
    whole = _whole_momentum(engine)
    pieces = []
    for place in _places(engine):
        name = names[id(place.parameter)]
        if place.uses_muon and whole is not None:
            offset = whole[id(place.parameter)]
            count = place.parameter.numel()
            pieces += [Piece(name, key, 0, count, place.tensor, offset) for key in MUON_KEYS]
            continue
        keys = MUON_KEYS if place.uses_muon else ADAMW_KEYS
        pieces += [
            Piece(name, key, place.start, place.count, place.tensor, place.offset) for key in keys
        ]
    return tuple(pieces)


def _count_updates(engine: DeepSpeedEngine) -> int:
    """Steps that AdamW has made: its bias correction depends on them."""
    states = _base(engine).state.values()
    counts = {int(state["step"]) for state in states if "step" in state}
    if len(counts) > 1:
        raise RuntimeError(f"AdamW's parameters have made different numbers of steps: {counts}")
    return counts.pop() if counts else 0


def load_state(engine: DeepSpeedEngine, checkpoint: Path, saved: Sequence[SavedPieces]) -> None:
    """Fill a new engine's masters, moments, momenta and weights from a checkpoint; all ranks call.

    Args:
        saved: Of the files whose notes this rank has read; the ranks together have read all.
    """
    wanted = _find_pieces(engine)
    if _any_rank(not _Source(checkpoint, saved).covers(wanted)):
        every: list[Any] = [saved] * dist.get_world_size()
        dist.all_gather_object(every, saved)
        saved = [*dict.fromkeys(chain.from_iterable(every))]
    source = _Source(checkpoint, saved)
    prologue = getattr(engine.optimizer, "checkpoint_event_prologue", None)
    if prologue is not None:
        prologue()  # stage 3: every parameter partitioned
    with torch.no_grad():
        for piece in wanted:
            if not source.has_begun(piece.key):
                continue
            tensor = _state_tensor(engine, piece.tensor, piece.key, source.updates)
            target = tensor.view(-1).narrow(0, piece.offset, piece.count)
            source.read(piece, target)
    load_masters(engine, checkpoint)


def _any_rank(mine: bool) -> bool:
    """Whether it is so on any rank."""
    every: list[Any] = [mine] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return any(every)


@torch.no_grad()
def load_masters(engine: DeepSpeedEngine, checkpoint: Path) -> None:
    """Give a new engine the checkpoint's weights, in fp32 also where it computes in bf16."""
    from safetensors import safe_open

    names = {id(p): name for name, p in module_of(engine).named_parameters()}
    masters = _masters(engine)
    with safe_open(checkpoint / "weights.safetensors", framework="pt") as weights:
        missing = sorted(set(names.values()) - set(weights.keys()))
        if missing:
            raise MissingState(f"weights.safetensors has no {', '.join(missing[:5])}")
        for place in _places(engine):
            whole = weights.get_tensor(names[id(place.parameter)]).view(-1)
            target = masters[place.tensor].view(-1).narrow(0, place.offset, place.count)
            target.copy_(whole.narrow(0, place.start, place.count))
        _spread_masters(engine)
        for parameter in module_of(engine).parameters():
            if not parameter.requires_grad:
                # Frozen, so no optimizer has it. Under stage 3 rank 0's value goes to all.
                with whole_parameters([parameter]):
                    parameter.copy_(weights.get_tensor(names[id(parameter)]))


def _spread_masters(engine: DeepSpeedEngine) -> None:
    """Give the weights that compute the values of the masters, on all ranks."""
    optimizer: Any = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif engine.zero_optimization_partition_weights():
        for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[number].data.copy_(master.data)
            optimizer._unflatten_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()


class _Source:
    """A checkpoint's state by parameter."""

    def __init__(self, checkpoint: Path, saved: Sequence[SavedPieces]) -> None:
        self.updates = max(part.updates for part in saved)
        self._checkpoint = checkpoint
        self._pieces: dict[tuple[str, str], list[tuple[str, Piece]]] = defaultdict(list)
        self._states: dict[str, dict[int, dict[str, Any]]] = {}
        for part in saved:
            for piece in part.pieces if part.file is not None else ():
                assert part.file is not None
                self._pieces[piece.name, piece.key].append((part.file, piece))

    def has_begun(self, key: str) -> bool:
        """Whether there is such state at all; before the first update there need not be."""
        return self.updates > 0 or any(kind == key for _, kind in self._pieces)

    def covers(self, wanted: Iterable[Piece]) -> bool:
        """Whether all of these stretches are there."""
        return all(
            sum(part.count for _, part in self._parts(piece)) == piece.count for piece in wanted
        )

    def read(self, wanted: Piece, target: Tensor) -> None:
        """Copy a stretch of a parameter's state from wherever it lies."""
        missing = wanted.count
        for file, part in self._parts(wanted):
            flat = self._state(file, part.tensor)[part.key].reshape(-1)
            found = flat.narrow(0, part.offset, part.count)
            target.narrow(0, part.start - wanted.start, part.count).copy_(found)
            missing -= part.count
        if missing:
            raise MissingState(f"{missing} of {wanted.count} elements of {wanted} are in no file")

    def _parts(self, wanted: Piece) -> Iterator[tuple[str, Piece]]:
        """The parts of a stretch that there are, each with its file, from the first on."""
        position, end = wanted.start, wanted.start + wanted.count
        # Pieces of different ranks may overlap (a matrix of two partitions): any will do, best that
        # of a file which is open.
        known = self._pieces[wanted.name, wanted.key]
        for file, piece in sorted(known, key=lambda p: (p[1].start, p[0] not in self._states)):
            stop = min(end, piece.start + piece.count)
            if piece.start <= position < stop:
                offset = piece.offset + position - piece.start
                yield (
                    file,
                    piece._replace(start=position, count=stop - position, offset=offset),
                )
                position = stop

    def _state(self, file: str, tensor: int) -> dict[str, Any]:
        if file not in self._states:
            # Mapped, not read: of another rank's file this rank needs a part. DeepSpeed's files
            # hold objects of its own, which weights_only would refuse.
            found = torch.load(
                self._checkpoint / file, map_location="cpu", mmap=True, weights_only=False
            )
            self._states[file] = _states_in(found)
        return self._states[file][tensor]


def _states_in(file: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The torch optimizer's state in one of DeepSpeed's files, by index of its tensor."""
    if "optimizer_state_dict" not in file:  # stage 0
        return file["optimizer"]["state"]
    state = file["optimizer_state_dict"]
    # Stage 3 nests the same name once more.
    return state.get("base_optimizer_state", state.get("optimizer_state_dict"))["state"]


def _base(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)  # type: ignore[return-value]


def _masters(engine: DeepSpeedEngine) -> list[Tensor]:
    """The tensors that the torch optimizer updates, in its order."""
    optimizer: Any = engine.optimizer
    if engine.zero_optimization_partition_weights():
        return optimizer.fp32_partitioned_groups_flat
    return [p for group in _base(engine).param_groups for p in group["params"]]


def _places(engine: DeepSpeedEngine) -> Iterator[_Place]:
    """Where the masters of this rank lie, parameter by parameter, in the optimizer's order."""
    if engine.zero_optimization_partition_weights():
        yield from _stage_3_places(engine)
    elif engine.optimizer is _base(engine):
        for number, master in enumerate(_masters(engine)):
            assert isinstance(master, nn.Parameter)
            yield _Place(master, 0, master.numel(), number, 0, _uses_muon(master))
    else:
        for number, group in enumerate(_low_precision_groups(engine)):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    muon = _uses_muon(parameter)
                    yield _Place(parameter, low.start, low.numel, number, high.start, muon)


def _stage_3_places(engine: DeepSpeedEngine) -> Iterator[_Place]:
    optimizer: Any = engine.optimizer
    for group in optimizer.fp16_groups:
        for parameter in group:
            number, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            share = parameter.partition_numel()
            start = share * optimizer._get_param_partition_rank(parameter)
            # The last ranks' shares are padded.
            count = min(share, parameter.ds_numel - start)
            if count > 0:
                muon = _uses_muon(parameter)
                yield _Place(parameter, start, count, number, int(offset), muon)


def _low_precision_groups(engine: DeepSpeedEngine) -> list[list[Any]]:
    optimizer: Any = engine.optimizer
    groups = getattr(optimizer, "bf16_groups", None)
    return optimizer.bit16_groups if groups is None else groups


def _uses_muon(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "use_muon", False))


def _whole_momentum(engine: DeepSpeedEngine) -> dict[int, int] | None:
    """Offsets of whole matrices in Muon's momentum, by id; None where it is laid out as masters."""
    optimizer: Any = engine.optimizer
    if not hasattr(optimizer, "params_in_partition") or optimizer.cpu_offload:
        return None
    offsets = {}
    for group in optimizer.params_in_partition:
        position = 0
        for parameter in group:
            offsets[id(parameter)] = position
            position += parameter.numel()
    return offsets


def _state_tensor(engine: DeepSpeedEngine, number: int, key: str, updates: int) -> Tensor:
    """A state tensor of the torch optimizer, made as its first step would make it."""
    optimizer: Any = engine.optimizer
    master = _masters(engine)[number]
    state = _base(engine).state[master]
    if key in ADAMW_KEYS:
        # torch keeps the count on the CPU, but beside the moments for the fused kernel, which reads
        # it there.
        fused = any(group.get("fused") for group in _base(engine).param_groups)
        device = master.device if fused else "cpu"
        state["step"] = torch.tensor(float(updates), dtype=torch.float32, device=device)
    if key not in state:
        size = master.shape
        if key in MUON_KEYS and _whole_momentum(engine) is not None:
            size = torch.Size([sum(p.numel() for p in optimizer.params_in_partition[number])])
        state[key] = torch.zeros(size, dtype=torch.float32, device=master.device)
    return state[key]
