"""Which attention backend works here: asked for, possible on the device, and right.

Called once at the start of a run or an evaluation.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import cast

import torch

from dualtrain.common.errors import UserError
from dualtrain.network import attention
from dualtrain.network.attention import Backend

# Positions of a row that a backend is checked with.
_CHECKED_LENGTH = 384


def resolve_backend(
    name: str, device: torch.device | str, dtype: torch.dtype | None = None
) -> Backend:
    """Turn the recipe's ``model.attention`` into a backend that works here.

    Args:
        name: ``auto``, ``sdpa``, ``varlen`` or ``flex``. auto is sdpa on a CPU; on CUDA varlen
            where there is one, else flex where there is a compiler, else sdpa.
        dtype: Compute type, if known: varlen is for half precision only.
    """
    device = torch.device(device)
    if name == "auto":
        best_first: tuple[Backend, ...] = ("varlen", "flex", "sdpa")
        possible: list[Backend] = [
            backend for backend in best_first if not _obstacle(backend, device, dtype)
        ]
        if possible[0] == "varlen" and (fault := varlen_fault(device, dtype)):
            del possible[0]
            warnings.warn(f"attention by {possible[0]}, because varlen {fault}", stacklevel=2)
        return possible[0]
    if name not in ("sdpa", "varlen", "flex"):
        raise UserError("model.attention", f"{name!r}", "auto, sdpa, varlen or flex")
    obstacle = _obstacle(name, device, dtype)
    if not obstacle and name == "varlen" and (fault := varlen_fault(device, dtype)):
        obstacle = f"it {fault}"
    if obstacle:
        raise UserError(
            "model.attention",
            f"{name} does not work here: {obstacle}",
            hint="auto takes the best backend that does",
        )
    return cast(Backend, name)


def _obstacle(name: str, device: torch.device, dtype: torch.dtype | None) -> str:
    """Say why a backend cannot train here; empty if it can."""
    if name == "sdpa":
        return ""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type} (sdpa works everywhere)"
    if name == "flex":
        found = importlib.util.find_spec("triton") is not None
        return "" if found else "it is compiled by triton, which is not installed"
    if attention.find_varlen_attn() is None:
        return f"torch {torch.__version__} lacks it, torch 2.10 and newer have it"
    if dtype is not None and dtype not in attention.HALF_TYPES:
        return f"it computes in bf16 only, not in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return ""


@cache
def varlen_fault(device: torch.device, dtype: torch.dtype | None) -> str:
    """Say what is wrong with what varlen computes on this GPU; empty if nothing.

    Which kernels it runs is torch's choice, by its own version, cuDNN's and the GPU. So a little is
    computed, forward and backward, before anything is trained with them.
    """
    try:
        error = disagreement("varlen", device, dtype or torch.bfloat16)
    except RuntimeError as failure:
        return f"fails on this GPU: {str(failure).splitlines()[0]}"
    # Half precision is off by some 0.005; a kernel that mistakes the documents by 0.1 and more.
    return "" if error < 0.03 else f"is off by {error:.2g} of what sdpa computes on this GPU"


def disagreement(backend: Backend, device: torch.device, dtype: torch.dtype) -> float:
    """Measure how far a backend is from sdpa in fp32 on the same device.

    Documents are longer than a head is wide, and than the 128 positions from which on torch takes
    other kernels; some are of one token.

    Returns:
        The largest of |difference| / |expected| of outputs and of the three gradients, in Frobenius
        norms, of both kinds; infinite where a number is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    shape = 2, _CHECKED_LENGTH, 2, 64
    numbers = torch.randn(4, *shape, generator=generator).to(device, dtype)
    documents = torch.zeros(shape[:2], dtype=torch.int32)
    documents[1, 1:] += 1
    documents[1, 300:] += 1
    worst = 0.0
    for kind in ("causal", "full"):
        results = []
        for name, kept in ((backend, dtype), ("sdpa", torch.float32)):
            where = {"device": device, "dtype": kept}
            plan = attention.plan_attention(kind, documents, backend=name, **where)
            inputs = [one.to(kept).requires_grad_() for one in numbers[:3]]
            with torch.enable_grad():
                output = plan.attend(*inputs)
                gradients = torch.autograd.grad(output, inputs, numbers[3].to(kept))
            results.append([output.detach(), *gradients])
        for mine, exact in zip(*results, strict=True):
            off = float((mine.float() - exact).norm() / exact.norm())
            worst = max(worst, off if off < torch.inf else torch.inf)
    return worst
