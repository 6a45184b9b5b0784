"""Whether this machine can hold a model at all: the dry run's estimate against what there is.

Called before a dataset is made, and by each rank. Activations are left out, being a rough guess.
"""

from __future__ import annotations

import os
from pathlib import Path

from dualtrain.common.errors import UserError
from dualtrain.common.formatting import size
from dualtrain.derived.derive import Derived


def memory_shortage(derived: Derived, *, ranks: int) -> UserError | None:
    """What to say of a model that cannot fit; None of one that may."""
    if derived.cost is None:
        return None
    memory, there = derived.cost.memory, host_bytes()
    on_device = memory.weights + memory.gradients + memory.optimizer
    needed, place = (on_device + memory.host) * ranks, "this machine has"
    if needed <= there:
        return None  # where a GPU is smaller, torch says what it lacks
    import torch

    if torch.cuda.is_available():
        needed = memory.host * ranks
        if needed <= there:
            there, place = torch.cuda.get_device_properties(0).total_memory, "a GPU here has"
            needed = on_device
    if needed <= there:
        return None
    parts = (
        f"weights {size(memory.weights)}, gradients {size(memory.gradients)}, "
        f"optimizer {size(memory.optimizer)}, in host memory {size(memory.host)}"
    )
    return UserError(
        "model",
        f"of {derived.cost.parameters:,} parameters takes {size(needed)} ({parts} for each "
        f"of the {ranks} ranks here), and {place} {size(there)}",
        "a model that fits",
        "a smaller width, fewer layers, or more machines and a higher ZeRO stage",
    )


def host_bytes() -> int:
    """Memory of this machine, with what it can move to a disk."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return memory
    swap = next((line.split()[1] for line in lines if line.startswith("SwapTotal:")), "0")
    return memory + 1024 * int(swap)
