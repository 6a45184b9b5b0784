"""The optimizer and DeepSpeed's engine, from a model and a merged configuration.

DeepSpeed is imported inside functions everywhere in this room: it takes more than a second and
writes to the terminal.
"""

from __future__ import annotations

import contextlib
import io
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dualtrain.common.cpu import has_bfloat16
from dualtrain.engine.groups import ParameterGroup
from dualtrain.engine.norm_gains import set_type, widen_groups
from dualtrain.engine.parameters import whole_parameters
from dualtrain.engine.whole_matrices import batch_whole_matrices
from dualtrain.network.norms import norm_parameters
from dualtrain.network.transformer import SwiGLU
from dualtrain.recipe.schema import OptimSection

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


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
    # On a CPU the usual one, whose rounding is that of the runs there so far.
    adamw = partial(torch.optim.AdamW, fused=next(model.parameters()).is_cuda)
    if not any(group.uses_muon for group in groups):
        return adamw([{k: v for k, v in o.items() if k != "use_muon"} for o in options])
    from deepspeed.runtime.zero.muon import original_muon
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if not next(model.parameters()).is_cuda and not has_bfloat16():
        # Emulated bf16 is slower than fp32, and less exact.
        original_muon.ns_compute_dtype = lambda _method: torch.float32
    return MuonWithAuxAdam(options, adam_optimizer=adamw)


def set_learning_rate(engine: DeepSpeedEngine, learning_rate: float) -> None:
    """Give every group its learning rate; takes effect in the next ``engine.step()``."""
    # Some of DeepSpeed's optimizers are not torch's, but all have its parameter groups.
    optimizer = cast("torch.optim.Optimizer", engine.optimizer)
    for options in optimizer.param_groups:
        options["lr"] = learning_rate * options["lr_scale"]


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]
) -> DeepSpeedEngine:
    """Wrap model and optimizer in DeepSpeed.

    Args:
        model: On the rank's device, in fp32; DeepSpeed casts it for bf16, all but its norms.
    """
    import deepspeed
    from deepspeed.runtime import torch_autocast
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    for module in model.modules():
        if isinstance(module, SwiGLU):
            module.may_pack = config["zero_optimization"]["stage"] < 3
    gains = norm_parameters(model) if config["bf16"]["enabled"] else []
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
    if isinstance(engine.optimizer, BF16_Optimizer):
        batch_whole_matrices(engine.optimizer)
        if torch.distributed.get_world_size() == 1:
            # Nothing to reduce: it would copy all gradients into a buffer and back.
            engine.buffered_allreduce_fallback = lambda *_, **__: None
    if gains:
        widen_groups(engine, gains)
        with torch.no_grad(), whole_parameters(gains):
            for gain, value in zip(gains, values, strict=True):
                gain.copy_(value)
        cast("Any", engine.optimizer).refresh_fp32_params()  # the masters, from what computes
    return engine
