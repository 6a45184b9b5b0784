"""The process of a rank: its device, and the group of all ranks."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from datetime import timedelta

import torch

from dualtrain.common.errors import UserError
from dualtrain.launch.peers import announce
from dualtrain.launch.world import World


def prepare_process(*, compile_model: bool) -> None:
    """Set what must be in place before torch and DeepSpeed do anything, for this device.

    On a CPU nothing may be compiled at run time unless asked for: it needs a C++ compiler, takes
    half a minute, and a process killed meanwhile leaves a lock that hangs every later run.
    """
    # Rank 0's terminal belongs to the live view; DeepSpeed's news are in metrics.jsonl and the log.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # DeepSpeed 0.19.8 gathers by a name that torch 2.13 has renamed; to be removed with it.
    warnings.filterwarnings("ignore", r".*all_gather_into_tensor.*", FutureWarning)
    warnings.filterwarnings("ignore", r".*reduce_scatter_tensor.*", FutureWarning)
    # What torch does by default; 0 in an old job script would make a lost machine a hang for ever.
    if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
        del os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not compile_model:
        _forbid_compiling()


def _forbid_compiling() -> None:
    """Switch the compiler off, and have DeepSpeed not import it for Muon, which takes a second."""
    from deepspeed.runtime import compiler

    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read when the compiler is imported
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True
    compiler.compile = lambda: lambda function: function


def choose_device(world: World) -> torch.device:
    """The rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    available = torch.cuda.device_count()
    if world.local_rank >= available:
        raise UserError(
            "--ranks",
            f"{world.local_world_size} ranks on a machine with {available} GPUs",
            f"at most {available}",
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse bf16 on a GPU that would only emulate it, being older than Ampere."""
    if precision != "bf16" or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            "engine.precision",
            f"bf16 is not supported by {torch.cuda.get_device_name(device)}",
            "fp32 on this device, or a GPU of compute capability 8.0 or newer",
            "add engine.precision=fp32",
        )


def init_distributed(*, timeout_s: float) -> None:
    """Join the process group that the environment describes.

    No wait for another rank is longer than ``timeout_s``, in whatever group: neither for ranks to
    arrive nor in a collective. gloo then raises in the rank that waits. NCCL's watchdog ends the
    process (``TORCH_NCCL_ASYNC_ERROR_HANDLING``, see :func:`prepare_process`), but as a rule the
    ranks' vote on stopping, which goes through gloo at every step, notices first.
    """
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger
    from torch.distributed import distributed_c10d

    logger.setLevel(logging.ERROR)
    # DeepSpeed would build this CPU extension at run time, and fail where there is no compiler;
    # gloo does its work. To be removed when init_distributed no longer insists on it.
    __compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=timeout_s)
    # Later groups, such as DeepSpeed's of all ranks, do not inherit the first one's timeout but
    # take these, and DeepSpeed cannot pass one. To be removed when its new_group can.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, timeout)
    try:
        deepspeed.init_distributed(timeout=timeout, verbose=False)
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        expected, hint = "a port that nobody listens on", "another run may have it; choose another"
        raise UserError("MASTER_PORT", f"{port} is taken", expected, hint) from None
    announce()


def leave_distributed() -> None:
    """Leave the process group in the one order that does not abort at interpreter exit.

    Every engine must be destroyed and out of reach by now. Only after success: the barrier waits
    for every rank.
    """
    import deepspeed.comm as dist

    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
