"""Norm gains in fp32 also where DeepSpeed makes a bf16 module of the model: ZeRO stages 1 and 3.

DeepSpeed 0.19.8 gives all parameters one type, and stage 3 puts them into one buffer. So ``engine``
has it do that, and then gives back their type and values to the gains and to every buffer that
stands for them. This works because each of its optimizers has a buffer per parameter group, and
the gains are in groups of their own. From then on they are parameters like others: their gradients
are fp32, and an update copies the masters into them without rounding.

To be removed when DeepSpeed's ``keep_in_fp32_modules`` is for parameters, too; as yet it is for
buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


def set_type(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
    """Give parameters, partitioned or not, a type."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
        partition: Any = getattr(parameter, "ds_tensor", None)
        if partition is not None:
            partition.data = partition.data.to(dtype)


def widen_groups(engine: DeepSpeedEngine, gains: Sequence[nn.Parameter]) -> None:
    """Make the gains of a new bf16 engine fp32, with the rounded values that they have there."""
    optimizer: Any = engine.optimizer
    widened = {id(gain) for gain in gains}
    if engine.zero_optimization_partition_weights():
        set_type(gains, torch.float32)
        for number, group in enumerate(optimizer.fp16_groups):
            if id(group[0]) in widened:
                flats = optimizer.fp16_partitioned_groups_flat
                flats[number] = _widened(flats[number])
                optimizer._unflatten_partitioned_parameters(number)
        return
    is_offloaded = getattr(optimizer, "cpu_offload", False)
    if hasattr(optimizer, "bf16_groups"):
        groups, flats = optimizer.bf16_groups, optimizer.bf16_groups_flat
        partitions = optimizer.bf16_partitioned_groups
    else:
        groups, flats = optimizer.bit16_groups, optimizer.bit16_groups_flat
        partitions = optimizer.parallel_partitioned_bit16_groups
    for number, group in enumerate(groups):
        if id(group[0]) not in widened:
            continue
        narrow, wide = flats[number], _widened(flats[number])
        flats[number] = wide
        partitions[number] = [_same_part(part, narrow, wide) for part in partitions[number]]
        for gain in group:
            gain.data = _same_part(gain.data, narrow, wide)
        if is_offloaded:
            # On the way from the host, too.
            buffers = optimizer.param_buffer_of_bit16_for_cpu_offload_groups
            buffers[number] = _widened(buffers[number])
    # Frozen ones are in no group.
    set_type(gains, torch.float32)


def _widened(buffer: Tensor) -> Tensor:
    wide = buffer.float()
    return wide.pin_memory() if buffer.is_pinned() else wide


def _same_part(part: Tensor, of: Tensor, wide: Tensor) -> Tensor:
    """The stretch of ``wide`` that ``part`` is of another buffer."""
    start = part.storage_offset() - of.storage_offset()
    return wide.as_strided(part.size(), part.stride(), wide.storage_offset() + start)
