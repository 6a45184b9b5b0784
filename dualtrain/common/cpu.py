"""What this machine computes with, as far as it can be known without torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of x86 and ARM processors that multiply in bf16."""


@cache
def has_bfloat16(cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products in bf16 are computed and not emulated; True where nothing tells.

    Args:
        cpu_info: A file in the layout of Linux's, with a line of flags for each core.
    """
    try:
        lines = cpu_info.read_text("utf-8", "replace").splitlines()
    except OSError:
        return True
    flags = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Feat"))]
    return not flags or all(not _BFLOAT16.isdisjoint(of_core) for of_core in flags)


def has_gpu() -> bool:
    """Whether the driver of a GPU is there."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))
