"""Whether this machine can hold a model at all: the dry run's estimate against what there is.

Called before a dataset is made, and by each rank. Activations are left out, being a rough guess.
"""

from __future__ import annotations

import os
from pathlib import Path

from dualtrain.common.errors import UserError
from dualtrain.derived.derive import Derived
from dualtrain.derived.dry_run import bytes_text


def check_memory(derived: Derived, *, ranks: int) -> None:
    """Refuse a model that cannot fit.

    Raises:
        UserError: Weights, gradients and optimizer states take more than there is.
    """
    if (shortage := memory_shortage(derived, ranks=ranks)) is not None:
        raise shortage


def memory_shortage(derived: Derived, *, ranks: int) -> UserError | None:
    """What :func:`check_memory` would raise."""
    if derived.cost is None:
        return None
    memory, host = derived.cost.memory, host_bytes()
    on_device = memory.weights + memory.gradients + memory.optimizer
    if (on_device + memory.host) * ranks <= host:
        return None  # where a GPU is smaller, torch says what it lacks
    import torch

    if not torch.cuda.is_available():
        needed, there, place = (on_device + memory.host) * ranks, host, "this machine has"
    elif memory.host * ranks > host:
        needed, there, place = memory.host * ranks, host, "this machine has"
    else:
        there = torch.cuda.get_device_properties(0).total_memory
        needed, place = on_device, "a GPU here has"
    if needed <= there:
        return None
    parts = (
        f"weights {bytes_text(memory.weights)}, gradients {bytes_text(memory.gradients)}, "
        f"optimizer {bytes_text(memory.optimizer)}, in host memory {bytes_text(memory.host)}"
    )
    return UserError(
        "model",
        f"of {derived.cost.parameters:,} parameters takes {bytes_text(needed)} ({parts} for each "
        f"of the {ranks} ranks here), and {place} {bytes_text(there)}",
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
