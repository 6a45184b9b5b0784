"""Peak arithmetic of common GPUs, for the share of it a run reaches (MFU)."""

from __future__ import annotations

# Vendors' data sheets: bf16 tensor cores, fp32 accumulation, dense (half of what a sheet gives
# "with sparsity"), FLOP/s. The first row whose words all occur in the device's name counts, so the
# special come before the general. An unlisted device has no MFU; a wrong one would be worse.
_BF16_DENSE: tuple[tuple[tuple[str, ...], float], ...] = (
    (("gb200",), 2500e12),
    (("b200",), 2250e12),
    (("h20",), 148e12),
    (("h100", "pcie"), 756e12),
    (("h100", "nvl"), 835e12),
    (("h200", "nvl"), 835e12),
    (("h800", "pcie"), 756e12),
    (("gh200",), 989e12),
    (("h200",), 989e12),
    (("h100",), 989e12),
    (("h800",), 989e12),
    (("a100",), 312e12),
    (("a800",), 312e12),
    (("a30",), 165e12),
    (("a40",), 149.7e12),
    (("a10",), 125e12),
    (("l40s",), 362e12),
    (("l40",), 181e12),
    (("l4",), 121e12),
    (("rtx", "a6000"), 154.8e12),
    (("rtx", "6000", "ada"), 364e12),
    (("rtx", "5090"), 209.5e12),
    (("rtx", "4090"), 165.2e12),
    (("rtx", "3090"), 71e12),
    (("mi325x",), 1307e12),
    (("mi300x",), 1307e12),
    (("mi250x",), 191.5e12),
)
# Other chips, or parts of one, under a listed name.
_OTHER = frozenset(("laptop", "mobile", "mig", "ti", "d", "max", "q"))


def peak_flops(device_name: str) -> float | None:
    """Return a device's dense bf16 peak in FLOP/s, or ``None`` where it is not known.

    Args:
        device_name: As ``torch.cuda.get_device_name`` gives it. An MI250X is two devices, each
            with half its peak. A CPU has no entry.
    """
    words = device_name.lower().replace("-", " ").replace("_", " ").split()
    if not _OTHER.isdisjoint(words):
        return None
    for wanted, peak in _BF16_DENSE:
        if all(word in words for word in wanted):
            return peak
    return None
