"""Losses and gradient norm of an interval, summed on the device without waiting for it.

``train`` calls :meth:`Meter.add` once a slot and :meth:`Meter.add_update` once a step: they only
queue additions on the device, so the host runs on. :meth:`Meter.interval`, called every
``progress.interval_steps`` steps **by all ranks**, is the one place that synchronises: one small
vector, gathered over the ranks and read once.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dualtrain.progress.metrics import Position, TrainRecord

Objective = Literal["ar", "diffusion"]
OBJECTIVES: tuple[Objective, ...] = ("ar", "diffusion")

# What every rank contributes: sums on the device first (as in `Meter._sums`), then the host's.
_COLUMNS: tuple[str, ...] = (
    "ar_cross_entropy",
    "diffusion_cross_entropy",
    "ar_loss",
    "diffusion_loss",
    "z_loss",
    "grad_norm",
    "ar_slots",
    "diffusion_slots",
    "ar_tokens",
    "diffusion_tokens",
    "updates",
    "data_wait_s",
    "memory_bytes",
    "has_logged",
)
# Place of the gradient's norm in `Meter._sums`.
_NORM = _COLUMNS.index("grad_norm")


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened between two calls of :meth:`Meter.interval`, over all ranks.

    Losses are means over slots in nats per token, ``None`` without a slot of that objective, NaN
    or infinite where a slot was; the gradient norm likewise is a mean over updates. All ranks read
    the same gathered numbers; only ``seconds``, and what is divided by it, is each rank's own.
    """

    ar_loss: float | None
    diffusion_loss: float | None
    loss: float | None
    z_loss: float | None
    grad_norm: float | None
    slots: int
    tokens: int
    seconds: float
    tokens_per_second: float | None
    mfu: float | None
    data_wait_s: float
    memory_bytes: int
    logged: dict[str, float]
    non_finite: tuple[str, ...]  # objectives with a loss that was not finite; "gradient"


class MeterState(TypedDict):
    """An unfinished interval of one rank, in plain numbers."""

    sums: list[float]
    slots: list[int]
    tokens: list[int]
    updates: int
    logged: dict[str, tuple[float, int]]
    seconds: float


class Meter:
    """Accumulate the losses of this rank's slots; report means over all ranks.

    Args:
        device: Where the losses live; the sums are kept there.
        ar_weight: The factor on the AR loss, taken out again so that ``ar_loss`` is in nats.
        flops_per_token: Forward and backward FLOPs of a token, per objective, for MFU.
        peak_flops: Peak FLOP/s of one device; ``None`` leaves MFU unknown.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        ar_weight: float = 1.0,
        flops_per_token: Mapping[Objective, float] | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self._device = torch.device(device)
        # Sums over thousands of slots want float64, which Apple's GPUs do not have.
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._ar_weight = ar_weight
        self._flops = flops_per_token
        self._peak = peak_flops
        self._clear()
        self.mark()
        self.start()

    def start(self) -> None:
        """Start the clock of the tokens per second: called right before the first step."""
        self._paused_s = 0.0
        self._start = time.perf_counter()

    def add(
        self,
        objective: Objective,
        cross_entropy: Tensor,
        z_loss: Tensor | None = None,
        *,
        tokens: int,
        loss: Tensor | None = None,
    ) -> None:
        """Add one slot. Never waits for the device.

        Args:
            cross_entropy: Scalar, Σ w·CE / (B·T) in nats, as trained (``ar_weight`` included).
            z_loss: Scalar, the z-loss, multiplied by its factor.
            tokens: Input tokens of the slot, B·T.
            loss: Scalar that was minimised; cross-entropy plus z-loss when not given.
        """
        index = OBJECTIVES.index(objective)
        cross_entropy = cross_entropy.detach()
        if loss is None:
            loss = cross_entropy if z_loss is None else cross_entropy + z_loss.detach()
        self._cross_entropy[index].add_(cross_entropy)
        self._loss[index].add_(loss.detach())
        if z_loss is not None:
            self._z_loss.add_(z_loss.detach())
        self._slots[index] += 1
        self._tokens[index] += tokens

    def add_update(self, grad_norm: Tensor) -> None:
        """Add an update with the global L2 norm of its raw gradient, a scalar. Never waits."""
        self._grad_norm.add_(grad_norm)
        self._updates += 1

    def log(self, name: str, value: float | Tensor) -> None:
        """Add a number or scalar of an algorithm's own; ``logged`` has its mean. Never waits."""
        if isinstance(value, Tensor):
            value = value.detach().to(self._dtype)
        total, number = self._logged.get(name, (0.0, 0))
        self._logged[name] = (total + value, number + 1)

    def finite(self) -> Tensor:
        """Say, as a bool on the device, whether all of this rank's sums are finite; never waits."""
        # A sum is non-finite if one of its terms is.
        return self._sums.isfinite().all()

    def mark(self) -> None:
        """Remember the sums as they are, for :meth:`rewind`; called when a step begins."""
        self._marked = (
            self._sums.clone(),
            list(self._slots),
            list(self._tokens),
            self._updates,
            dict(self._logged),
        )

    def rewind(self) -> None:
        """Forget what was added since :meth:`mark`: a step that is left out counts for nothing."""
        sums, self._slots, self._tokens, self._updates, self._logged = self._marked
        self._sums.copy_(sums)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of an evaluation or a checkpoint out of the tokens per second."""
        if self._device.type == "cuda":
            # Queued training work belongs to the time before the pause.
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - start

    def interval(self, *, data_wait_s: float = 0.0) -> Interval:
        """Close the interval and start the next one. Called by all ranks at the same step."""
        host = [*self._slots, *self._tokens, self._updates, data_wait_s]
        host += [peak_memory(self._device), float(bool(self._logged))]
        local = torch.cat([self._sums, torch.tensor(host, dtype=self._dtype).to(self._device)])
        ranks = _gather(local)
        now = time.perf_counter()
        seconds = self._seconds(now)
        columns = dict(zip(_COLUMNS, zip(*ranks, strict=True), strict=True))
        logged = _merge(self._logged) if any(columns["has_logged"]) else {}
        self._clear()
        self._paused_s, self._start = 0.0, now
        return self._summarise(columns, seconds, logged)

    def state_dict(self) -> MeterState:
        """Return the unfinished interval of this rank, so that a resumed run completes it."""
        return {
            "sums": self._sums.tolist(),
            "slots": list(self._slots),
            "tokens": list(self._tokens),
            "updates": self._updates,
            "logged": {name: (float(total), n) for name, (total, n) in self._logged.items()},
            "seconds": self._seconds(time.perf_counter()),
        }

    def load_state_dict(self, state: MeterState) -> None:
        """Continue the interval of :meth:`state_dict`."""
        self._sums.copy_(torch.tensor(state["sums"], dtype=self._dtype))
        self._slots = list(state["slots"])
        self._tokens = list(state["tokens"])
        self._updates = state["updates"]
        self._logged = dict(state["logged"])
        self._carried_s = state["seconds"]
        self.start()

    @staticmethod
    def share_states(states: Sequence[MeterState], rank: int) -> MeterState:
        """What a rank continues from, when other ranks have saved: rank 0 takes over all slots."""
        # The norm is the same on every rank, and each counts it; losses are each rank's own.
        norm, updates = states[0]["sums"][_NORM], states[0]["updates"]
        totals = [math.fsum(column) for column in zip(*(s["sums"] for s in states), strict=True)]
        logged: dict[str, tuple[float, int]] = {}
        for name, (total, number) in (item for s in states for item in s["logged"].items()):
            before, count = logged.get(name, (0.0, 0))
            logged[name] = (before + total, count + number)
        first = rank == 0
        sums = totals if first else [0.0] * len(totals)
        return {
            "sums": [*sums[:_NORM], norm, *sums[_NORM + 1 :]],
            "slots": [sum(s["slots"][i] if first else 0 for s in states) for i in (0, 1)],
            "tokens": [sum(s["tokens"][i] if first else 0 for s in states) for i in (0, 1)],
            "updates": updates,
            "logged": logged if first else {},
            "seconds": max(s["seconds"] for s in states),
        }

    def _seconds(self, now: float) -> float:
        return max(now - self._start - self._paused_s + self._carried_s, 1e-9)

    def _summarise(
        self, columns: Mapping[str, tuple[float, ...]], seconds: float, logged: dict[str, float]
    ) -> Interval:
        total = {name: sum(column) for name, column in columns.items()}
        slots = int(total["ar_slots"] + total["diffusion_slots"])
        tokens = int(total["ar_tokens"] + total["diffusion_tokens"])
        mfu = None
        if self._flops is not None and self._peak is not None:
            flops = sum(total[f"{name}_tokens"] * self._flops[name] for name in OBJECTIVES)
            mfu = flops / seconds / (self._peak * len(columns["z_loss"]))
        return Interval(
            ar_loss=_mean(total["ar_cross_entropy"] / self._ar_weight, total["ar_slots"]),
            diffusion_loss=_mean(total["diffusion_cross_entropy"], total["diffusion_slots"]),
            loss=_mean(total["ar_loss"] + total["diffusion_loss"], slots),
            z_loss=_mean(total["z_loss"], slots),
            grad_norm=_mean(total["grad_norm"], total["updates"]),
            slots=slots,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds if tokens else None,
            mfu=mfu,
            data_wait_s=max(columns["data_wait_s"]),
            memory_bytes=int(max(columns["memory_bytes"])),
            logged=logged,
            non_finite=_non_finite(total),
        )

    def _clear(self) -> None:
        self._sums = torch.zeros(6, dtype=self._dtype, device=self._device)
        self._cross_entropy, self._loss = self._sums[0:2], self._sums[2:4]
        self._z_loss, self._grad_norm = self._sums[4], self._sums[5]
        self._slots = [0, 0]
        self._tokens = [0, 0]
        self._updates = 0
        self._carried_s = 0.0
        self._logged: dict[str, tuple[float | Tensor, int]] = {}


def train_record(interval: Interval, position: Position) -> TrainRecord:
    """Put an interval and where the run stands into the record of ``metrics.jsonl``."""
    values: Any = {"kind": "train", **asdict(interval), **asdict(position)}
    return cast(TrainRecord, {name: values[name] for name in TrainRecord.__annotations__})


def peak_memory(device: torch.device) -> int:
    """Return the most memory this process has held so far, in bytes: of the GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _mean(total: float, number: float) -> float | None:
    return total / number if number else None


def _non_finite(total: Mapping[str, float]) -> tuple[str, ...]:
    sums = {name: total[f"{name}_cross_entropy"] + total[f"{name}_loss"] for name in OBJECTIVES}
    sums |= {"gradient": total["grad_norm"]}
    return tuple(name for name, value in sums.items() if not math.isfinite(value))


def _gather(local: Tensor) -> list[list[float]]:
    """Return every rank's vector, in rank order, so that sums do not depend on the reduction."""
    if not _distributed():
        return [local.tolist()]
    vectors = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(vectors, local)
    return torch.stack(vectors).tolist()


def _merge(logged: Mapping[str, tuple[float | Tensor, int]]) -> dict[str, float]:
    """Average the logged values over ranks, whose names may differ (slots of one objective)."""
    local = {name: (float(total), number) for name, (total, number) in logged.items()}
    ranks: list[dict[str, tuple[float, int]]] = [local]
    if _distributed():
        ranks = [local] * dist.get_world_size()
        dist.all_gather_object(ranks, local)
    names = sorted({name for rank in ranks for name in rank})
    return {
        name: sum(rank[name][0] for rank in ranks if name in rank)
        / sum(rank[name][1] for rank in ranks if name in rank)
        for name in names
    }


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
