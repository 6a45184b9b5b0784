"""The raw gradient: its global norm, and clipping by it, at every ZeRO stage and precision.

``assemble`` makes one :class:`Gradients` beside the engine; ``train`` calls ``prepare`` before each
update. DeepSpeed's own ``gradient_clipping`` stays off: at stages 1 to 3 it measures and scales
what Muon has already orthogonalised (DeepSpeed issue 8439), whose norm says nothing about the
gradient.

Where the raw gradient lies between the last backward of a step and ``engine.step()``, as read in
DeepSpeed 0.19.8, is known to the small classes at the end: one for each of its optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


class Gradients:
    """Measure, and clip, the mean gradient over all slots of a step before anything changes it.

    Attributes:
        norm: () float32 on the device: global L2 norm of the newest prepared gradient before
            clipping, the same on every rank; NaN before the first. Not finite if an element was
            not.
    """

    def __init__(self, engine: DeepSpeedEngine, *, clip_norm: float | None) -> None:
        self._device = torch.device(cast("str", engine.device))
        self._clip_norm = clip_norm
        self._held = _held_by(engine)
        self._held.leave_out_unless(self._is_finite)
        self.norm = torch.full((), torch.nan, dtype=torch.float32, device=self._device)

    @torch.no_grad()
    def prepare(self) -> None:
        """Measure and clip the gradient; called after a step's last backward, by all ranks.

        ``engine.step()`` must follow, unless :meth:`discard` is called. Does not wait for the
        device, but where the gradient is in host memory.
        """
        self.norm = self._measure()
        if self._clip_norm is not None:
            self._scale(torch.clamp(self._clip_norm / self.norm, max=1.0))
        self._held.release()

    def discard(self) -> None:
        """Let go of the gradient of a step that is left out, in the place of :meth:`prepare`."""
        self._held.forget()

    def _is_finite(self) -> bool:
        return bool(self.norm.isfinite())

    def _measure(self) -> Tensor:
        # A rank may own nothing of a small model; the norm of nothing is a zero on the CPU.
        norm = torch.nn.utils.get_total_norm(self._held.owned()).to(self._device, torch.float32)
        if self._held.replicated or dist.get_world_size() == 1:
            return norm
        squares = norm.square()
        dist.all_reduce(squares)
        return squares.sqrt()

    def _scale(self, factor: Tensor) -> None:
        used = self._held.used()
        if used:
            # Not public, but what torch.nn.utils does: hundreds of tensors in a few kernels.
            torch._foreach_mul_(used, factor.to(used[0].device))  # type: ignore[reportPrivateImportUsage]


class _Held:
    """The raw gradient as one of DeepSpeed's optimizers holds it after a step's last backward.

    Attributes:
        replicated: Whether every rank owns all of it.
    """

    replicated = False

    def used(self) -> list[Tensor]:
        """All that the update of this rank reads: at least what it owns."""
        raise NotImplementedError

    def owned(self) -> list[Tensor]:
        """This rank's share; unless replicated, every element is in that of one rank only."""
        return self.used()

    def release(self) -> None:
        """Let DeepSpeed go on from the gradient as it is now."""

    def forget(self) -> None:
        """Free what was kept for :meth:`release`."""

    def leave_out_unless(self, is_finite: Callable[[], bool]) -> None:
        """Make ``engine.step()`` no update when it is not so; what DeepSpeed's own classes do."""


def _held_by(engine: DeepSpeedEngine) -> _Held:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        return _Bfloat16(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _Stage3(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return _HostPartitions(optimizer) if optimizer.cpu_offload else _Partitions(optimizer)
    return _Parameters(cast("torch.nn.Module", engine.module), optimizer)


class _Parameters(_Held):
    """Stage 0: every rank has the reduced gradient of every parameter."""

    replicated = True

    def __init__(self, module: torch.nn.Module, optimizer: Any) -> None:
        self._parameters = list(module.parameters())
        self._optimizer = optimizer
        self._update = optimizer.step

    def leave_out_unless(self, is_finite: Callable[[], bool]) -> None:
        # A torch optimizer applies whatever it is given. Asking waits for the device, as the other
        # stages do inside DeepSpeed, where ``overflow`` is the name of what is told here.
        def step(*arguments: Any) -> None:
            self._optimizer.overflow = not is_finite()
            if not self._optimizer.overflow:
                self._update(*arguments)

        self._optimizer.step = step

    def used(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]


class _Bfloat16(_Held):
    """Stage 1 with bf16 weights: every rank has all of it in fp32, and updates its partition.

    Muon reads whole matrices, also outside the partition. What pads the flat buffers is zero.
    """

    def __init__(self, optimizer: BF16_Optimizer) -> None:
        self._optimizer = optimizer

    def leave_out_unless(self, is_finite: Callable[[], bool]) -> None:
        # It would compute the norm again, of every parameter by itself.
        def norm(for_clipping: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
            return [torch.tensor(0.0 if is_finite() else torch.inf)], {}

        self._optimizer.get_grads_for_norm = norm  # type: ignore[method-assign]

    def owned(self) -> list[Tensor]:
        return list(self._optimizer.fp32_groups_gradient_flat_partition)

    def used(self) -> list[Tensor]:
        return list(self._optimizer.fp32_groups_gradients_flat)


class _Partitions(_Held):
    """Stages 1 and 2: whole gradients of the parameters in this rank's partition.

    The end of a step's last backward cuts them to the partition in ``get_flat_partition``, which
    orthogonalises them at once. So this method is made to wait for :meth:`release`; until then the
    partition holds raw gradients, which is also what ``safe_get_full_grad`` then gives.

    To be removed, or at least simplified, when DeepSpeed orthogonalises in ``step()`` here too.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        self._optimizer = optimizer
        self._cut = optimizer.get_flat_partition
        self._waiting: dict[int, Callable[[], object]] = {}
        self._whole: dict[int, list[Tensor]] = {}
        optimizer.get_flat_partition = self._wait  # type: ignore[method-assign]

    def _wait(self, *args: Any, param_group_idx: int, **options: Any) -> list[Tensor]:
        """Stand in for ``get_flat_partition``: note the call, return the raw partition."""
        self._waiting[param_group_idx] = partial(
            self._cut, *args, param_group_idx=param_group_idx, **options
        )
        self._whole[param_group_idx] = self._optimizer.all_grad_tensors[param_group_idx]
        return self._raw_partition(param_group_idx)

    def _raw_partition(self, group: int) -> list[Tensor]:
        optimizer = self._optimizer
        rank = dist.get_rank(group=optimizer.real_dp_process_group[group])
        size = int(optimizer.partition_size[group])
        parts = []
        for parameter, gradient in zip(
            optimizer.params_in_partition[group], self._whole[group], strict=True
        ):
            key = optimizer.get_param_id(parameter)
            start = int(optimizer.grad_start_offset[group][rank][key])
            room = size - int(optimizer.grad_partition_insertion_offset[group][rank][key])
            flat = gradient.contiguous().view(-1)
            parts.append(flat.narrow(0, start, min(flat.numel() - start, room)))
        return parts

    def owned(self) -> list[Tensor]:
        return [part for group in self._whole for part in self._raw_partition(group)]

    def used(self) -> list[Tensor]:
        return [gradient for gradients in self._whole.values() for gradient in gradients]

    def release(self) -> None:
        optimizer = self._optimizer
        for group in list(self._waiting):
            optimizer.all_grad_tensors[group] = self._whole.pop(group)
            optimizer.averaged_gradients[group] = self._waiting.pop(group)()
            optimizer.all_grad_tensors[group] = None

    def forget(self) -> None:
        self._waiting.clear()
        self._whole.clear()


class _HostPartitions(_Held):
    """Stages 1 and 2 with the optimizer offloaded: this rank's partition, flat, in host memory."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        self._optimizer = optimizer

    def owned(self) -> list[Tensor]:
        # As step() does first: copies from the device may be on their way.
        self._optimizer._wait_for_offload_copies()
        return self.used()

    def used(self) -> list[Tensor]:
        partitions = self._optimizer.single_partition_of_fp32_groups
        return [partition.grad for partition in partitions if partition.grad is not None]


class _Stage3(_Held):
    """Stage 3: a slice of every parameter, on the device or, offloaded, in host memory.

    The end of the backward has waited for the stream that reduces and copies the slices, and has
    filled up with zeros those that reach beyond a parameter's end.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
        self._optimizer = optimizer

    def used(self) -> list[Tensor]:
        optimizer = self._optimizer
        if optimizer.offload_optimizer:
            return [group.grad for group in optimizer.fp32_partitioned_groups_flat]
        return [part for parts in optimizer.averaged_gradients.values() for part in parts]
