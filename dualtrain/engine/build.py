"""DeepSpeed: process group, optimizer, the engine.

The only module besides ``checkpoint`` that touches DeepSpeed, always inside functions: importing it
costs more than a second and writes to the terminal.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from itertools import product
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dualtrain.common.errors import UserError
from dualtrain.engine.groups import ParameterGroup
from dualtrain.engine.norm_gains import set_type, widen_groups
from dualtrain.launch.peers import announce
from dualtrain.launch.ranks import World
from dualtrain.network.norms import norm_parameters
from dualtrain.recipe.schema import OptimSection

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Full shape of each trainable parameter by name, in model order, partitioned or not."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def build_optimizer(
    model: nn.Module, groups: list[ParameterGroup], optim: OptimSection
) -> torch.optim.Optimizer:
    """Make DeepSpeed's Muon with AdamW beside it, or AdamW alone.

    The optimizer is an object, not a ds_config entry, because DeepSpeed would otherwise choose
    Muon's matrices by their names. What a norm keeps in fp32 is in a group of its own, because
    ZeRO's buffers are by group and of one type.
    """
    parameters = dict(model.named_parameters())
    kept = {id(parameter) for parameter in norm_parameters(model)}
    options = []
    for group, is_kept in product(groups, (False, True)):
        members = [parameters[name] for name in group.names]
        members = [member for member in members if (id(member) in kept) is is_kept]
        if not members:
            continue
        for member in members:
            # ZeRO reads the tag of the parameter, the optimizer that of the group.
            member.use_muon = group.uses_muon  # type: ignore[attr-defined]
        shared = {
            "params": members,
            "lr": optim.lr * group.lr_scale,
            "lr_scale": group.lr_scale,
            "weight_decay": optim.weight_decay / group.lr_scale,
            "use_muon": group.uses_muon,
        }
        if group.uses_muon:
            shared |= {"momentum": optim.momentum, "ns_method": optim.newton_schulz}
        else:
            shared |= {"betas": optim.betas, "eps": optim.eps}
        options.append(shared)
    if not any(group.uses_muon for group in groups):
        return torch.optim.AdamW([{k: v for k, v in o.items() if k != "use_muon"} for o in options])
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam(options, adam_optimizer=torch.optim.AdamW)


def set_learning_rate(engine: DeepSpeedEngine, learning_rate: float) -> None:
    """Give every group its learning rate; takes effect in the next ``engine.step()``."""
    # Some of DeepSpeed's optimizers are not torch's, but all have its parameter groups.
    optimizer = cast("torch.optim.Optimizer", engine.optimizer)
    for options in optimizer.param_groups:
        options["lr"] = learning_rate * options["lr_scale"]


def choose_device(world: World) -> torch.device:
    """The rank's GPU, or the CPU where there is none.

    Raises:
        UserError: when there are more ranks than GPUs on this machine.
    """
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
    """Refuse bf16 on a device that would only emulate it.

    Raises:
        UserError: for bf16 on a GPU older than Ampere.
    """
    if precision != "bf16" or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            "engine.precision",
            f"bf16 is not supported by {torch.cuda.get_device_name(device)}",
            "fp32 on this device, or a GPU of compute capability 8.0 or newer",
            "add engine.precision=fp32",
        )


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
        from torch._dynamo import config as dynamo

        dynamo.disable = True


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


def partitioned_build(config: Mapping[str, object]) -> AbstractContextManager[object]:
    """A context in which modules are made with partitioned parameters, at stage 3 only.

    No rank ever holds the whole model then. Values that a module's ``__init__`` gives its
    parameters survive, values that come later need :func:`whole_parameters`.

    Args:
        config: From ``recipe.merge``.
    """
    zero = config["zero_optimization"]
    assert isinstance(zero, Mapping)
    if zero["stage"] != 3:
        return contextlib.nullcontext()
    import deepspeed

    # It would replace torch's linear function, for the whole training and in every model.
    plain = {**config, "zero_optimization": {**zero, "memory_efficient_linear": False}}
    return deepspeed.zero.Init(config_dict_or_path=plain)


@contextlib.contextmanager
def whole_parameters(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gather those that are partitioned for the time of the block; every rank must enter.

    Changes made on rank 0 are given to all at the end; those made on other ranks are lost.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, object]
) -> DeepSpeedEngine:
    """Wrap model and optimizer in DeepSpeed.

    Args:
        model: On the rank's device, in fp32; DeepSpeed casts it for bf16, all but its norms.
        config: From ``recipe.merge``.
    """
    import deepspeed
    from deepspeed.runtime import torch_autocast

    bfloat16 = config["bf16"]
    assert isinstance(bfloat16, Mapping)
    gains = norm_parameters(model) if bfloat16["enabled"] else []
    with whole_parameters(gains):
        values = [gain.detach().clone() for gain in gains]
    for value in values:
        torch.distributed.broadcast(value, src=0)  # as DeepSpeed does with whole parameters
    set_type(gains, torch.bfloat16)
    # An earlier engine of this process that used autocast leaves a mark by which ZeRO would reduce
    # this one's gradients in bf16. To be removed when DeepSpeed keeps it in the engine.
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    # BF16_Optimizer prints its memory use with print(), whatever the log level; that would tear
    # the live view. To be removed when see_memory_usage goes through the logger.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
    if gains:
        widen_groups(engine, gains)
        with torch.no_grad(), whole_parameters(gains):
            for gain, value in zip(gains, values, strict=True):
                gain.copy_(value)
        cast("Any", engine.optimizer).refresh_fp32_params()  # the masters, from what computes
    return engine


def leave_distributed() -> None:
    """Leave the process group in the one order that does not abort at interpreter exit.

    Every engine must be destroyed and out of reach by now. Only after success: the barrier waits
    for every rank.
    """
    import deepspeed.comm as dist

    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
