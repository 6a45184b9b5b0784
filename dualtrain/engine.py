"""DeepSpeed: process group, parameter groups, the engine.

The only module besides ``checkpoint`` that touches DeepSpeed, always inside functions: importing it
costs more than a second and writes to the terminal.

Muon. DeepSpeed's Muon scales an orthogonalised update by sqrt(max(1, rows/cols)); the paper scales
it by 0.2 * sqrt(max(rows, cols)). One parameter group per matrix shape turns the one into the other
exactly: lr_group = lr * scale with scale = 0.2 * sqrt(max(r, c)) / sqrt(max(1, r/c)), and
weight_decay_group = weight_decay / scale, so that decay stays p <- p * (1 - lr * weight_decay).
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from dualtrain.errors import UserError
from dualtrain.launch import World
from dualtrain.recipe.schema import OptimSection

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        label: For the log and the dry run, such as ``muon 512x192``.
        names: Parameter names, in model order.
        lr_scale: Factor between the recipe's learning rate and this group's.
        uses_muon: Muon, else AdamW.
    """

    label: str
    names: tuple[str, ...]
    lr_scale: float
    uses_muon: bool


def muon_scale(rows: int, cols: int) -> float:
    """Factor from DeepSpeed's Muon update to the paper's for a matrix (rows, cols)."""
    return 0.2 * math.sqrt(max(rows, cols)) / math.sqrt(max(1.0, rows / cols))


def group_parameters(
    shapes: Mapping[str, tuple[int, ...]], muon_names: Iterable[str]
) -> list[ParameterGroup]:
    """Divide parameters into one group per Muon matrix shape and one for AdamW.

    Args:
        shapes: Full (unpartitioned) shape of each trainable parameter by name, in model order.
        muon_names: The matrices that Muon updates; empty for AdamW alone.
    """
    chosen = set(muon_names)
    by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
    rest: list[str] = []
    for name, shape in shapes.items():
        if name in chosen:
            rows, cols = shape
            by_shape[rows, cols].append(name)
        else:
            rest.append(name)
    groups = [
        ParameterGroup(f"muon {rows}x{cols}", tuple(names), muon_scale(rows, cols), True)
        for (rows, cols), names in by_shape.items()
    ]
    if rest:
        groups.append(ParameterGroup("adamw", tuple(rest), 1.0, False))
    return groups


def build_optimizer(
    model: nn.Module, groups: list[ParameterGroup], optim: OptimSection
) -> torch.optim.Optimizer:
    """Make DeepSpeed's Muon with AdamW beside it, or AdamW alone.

    The optimizer is an object, not a ds_config entry, because DeepSpeed would otherwise choose
    Muon's matrices by their names.
    """
    parameters = dict(model.named_parameters())
    options = []
    for group in groups:
        members = [parameters[name] for name in group.names]
        for member in members:
            # ZeRO reads the tag of the parameter, the optimizer that of the group.
            member.use_muon = group.uses_muon  # type: ignore[attr-defined]
        shared = {
            "params": members,
            "lr": optim.lr * group.lr_scale,
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


def set_learning_rate(
    engine: DeepSpeedEngine, groups: Sequence[ParameterGroup], learning_rate: float
) -> None:
    """Give every group its learning rate; takes effect in the next ``engine.step()``."""
    # Some of DeepSpeed's optimizers are not torch's, but all have its parameter groups.
    optimizer = cast("torch.optim.Optimizer", engine.optimizer)
    for options, group in zip(optimizer.param_groups, groups, strict=True):
        options["lr"] = learning_rate * group.lr_scale


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
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not compile_model:
        from torch._dynamo import config as dynamo

        dynamo.disable = True


def init_distributed(*, timeout_s: float) -> None:
    """Join the process group that the environment describes."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed would build this CPU extension at run time, and fail where there is no compiler;
    # gloo does its work. To be removed when init_distributed no longer insists on it.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, object]
) -> DeepSpeedEngine:
    """Wrap model and optimizer in DeepSpeed.

    Args:
        model: On the rank's device, in fp32; DeepSpeed casts it for bf16.
        config: From ``recipe.merge``.
    """
    import deepspeed

    # BF16_Optimizer prints its memory use with print(), whatever the log level; that would tear
    # the live view. To be removed when see_memory_usage goes through the logger.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
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
