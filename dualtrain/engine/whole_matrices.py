"""Muon's updates of all matrices of one shape at once, at ZeRO stage 1 in bf16.

DeepSpeed 0.19.8 orthogonalises matrix by matrix: some 30 kernels each, thousands in a step of a
deep model. BF16_Optimizer's groups are flat and hold one shape each, so the matrices that lie whole
in a rank's partition are one stretch of it: its Newton-Schulz takes them as a batch, without a copy
of the momentum. Matrices that reach into another rank's partition stay with DeepSpeed.

To be removed when DeepSpeed does so itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def batch_whole_matrices(optimizer: Any) -> None:
    """Make a new BF16_Optimizer update the whole matrices of its partition shape by shape."""
    batches = []
    for number, layout in enumerate(optimizer._muon_exchange_layouts):
        if layout is None:
            continue
        whole = [matrix for matrix in layout["local_matrices"] if not matrix[-1]]
        layout["local_matrices"] = [matrix for matrix in layout["local_matrices"] if matrix[-1]]
        if whole:
            batches.append((number, whole[0][0], whole[0][1], len(whole)))
    others = optimizer._prepare_muon_updates

    def prepare() -> None:
        for batch in batches:
            _update(optimizer, *batch)
        others()

    optimizer._prepare_muon_updates = prepare


@torch.no_grad()
def _update(optimizer: Any, number: int, first: int, begin: int, count: int) -> None:
    """Orthogonalise ``count`` matrices of a group, the one numbered ``first`` and those behind it.

    Args:
        number: The optimizer's number of the group.
        begin: Where the first begins in the rank's partition.
    """
    from deepspeed.runtime.zero.muon.original_muon import muon_update

    group = optimizer.optimizer.param_groups[number]
    partition = optimizer.fp32_groups_flat_partition[number]
    state = optimizer.optimizer.state[partition]
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(partition)
    shape = optimizer.bf16_groups[number][first].shape

    def batch(flat: Tensor) -> Tensor:
        return flat[begin : begin + count * shape.numel()].view(count, *shape)

    gradients = batch(partition.grad)
    # What is given as experts, (count, rows, columns), is orthogonalised one by one.
    gradients.copy_(
        muon_update(
            gradients.clone(),
            batch(state["momentum_buffer"]),
            beta=group["momentum"],
            ns_method=group["ns_method"],
            is_expert_group=True,
        )
    )
