"""Who decides each key of a DeepSpeed configuration: the one table that ``config`` goes by.

- ``recipe``: the recipe decides; a ds_config may repeat the value, but not contradict it.
- ``ds_config``: the JSON file decides; where it is silent, the default here is sent.
- ``fixed``: only one value works with dualtrain.

DeepSpeed ignores unknown keys at the top and would use its own defaults, which change between
versions; so every value is sent. A key outside the table is an error, though DeepSpeed may know it:
what it is for is dualtrain's own work, or has not been tried with Muon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Value = bool | int | float | str | None
Owner = Literal["recipe", "ds_config", "fixed"]
Kind = Literal["bool", "int", "text", "section"]


@dataclass(frozen=True)
class Rule:
    """What may stand at one key.

    Attributes:
        why: For ``recipe`` the recipe's key; for ``fixed`` the reason.
        kind: For ``ds_config``, the kind of value.
        value: For ``fixed`` the value; for ``ds_config`` the default, None where none is sent.
        choices: For ``ds_config``, the allowed values, if they are few.
    """

    owner: Owner
    why: str = ""
    kind: Kind | None = None
    value: Value = None
    choices: tuple[Value, ...] = ()


def _recipe(key: str) -> Rule:
    return Rule("recipe", key)


def _free(kind: Kind, default: Value = None, choices: tuple[Value, ...] = ()) -> Rule:
    return Rule("ds_config", kind=kind, value=default, choices=choices)


def _fixed(value: Value, why: str) -> Rule:
    return Rule("fixed", why, value=value)


_OWN_CHECKPOINTS = "dualtrain writes and checks checkpoints"
_OWN_METRICS = "metrics are in metrics.jsonl; see the recipe's progress section"
_DENSE = "the model is dense and is not split within a layer"
_PROFILING = "it prints and waits for the device in every step"
_QUANTIZED = "it would change the numbers that are trained on"
_NVME = "offloading to NVMe is not tested with Muon"

RULES: dict[str, Rule] = {
    # Batches.
    "train_batch_size": _recipe("global_batch"),
    "train_micro_batch_size_per_gpu": _recipe("micro_batch"),
    "gradient_accumulation_steps": _recipe("global_batch / micro_batch / ranks"),
    "managed_gradient_accumulation": _fixed(True, "the loop relies on it"),
    # Optimizer. The engine is given the optimizer as an object and sets learning rates itself.
    "optimizer": _recipe("optim"),
    "scheduler": _recipe("optim.schedule"),
    "gradient_clipping": _recipe("optim.clip_norm (DeepSpeed's clips Muon's update)"),
    "zero_allow_untested_optimizer": _fixed(True, "Muon counts as untested"),
    "zero_force_ds_cpu_optimizer": _fixed(False, "it would refuse Muon when offloading"),
    # Precision; see merge.precision_settings.
    "bf16": _recipe("engine.precision"),
    "fp16": _recipe("engine.precision"),
    "torch_autocast": _recipe("engine.precision"),
    "data_types": _recipe("engine.precision"),
    # Communication.
    "communication_data_type": _free("text", "fp32", ("fp32", "bf16")),
    "prescale_gradients": _free("bool", False),
    "gradient_predivide_factor": _free("int", 1),
    "gradient_allreduce_op": _fixed("mean", "losses are means over the slots of a step"),
    # ZeRO.
    "zero_optimization": _free("section"),
    "zero_optimization.stage": _free("int", choices=(0, 1, 2, 3)),
    "zero_optimization.contiguous_gradients": _free("bool", True),
    "zero_optimization.reduce_scatter": _free("bool", True),
    "zero_optimization.reduce_bucket_size": _free("int", 100_000_000),
    "zero_optimization.use_multi_rank_bucket_allreduce": _free("bool", True),
    "zero_optimization.allgather_partitions": _free("bool", True),
    "zero_optimization.allgather_bucket_size": _free("int", 100_000_000),
    "zero_optimization.overlap_comm": _free("bool", False),
    "zero_optimization.sub_group_size": _free("int", 1_000_000_000),
    "zero_optimization.parameter_alignment": _free("bool", False),
    "zero_optimization.ignore_unused_parameters": _free("bool", True),
    "zero_optimization.memory_efficient_linear": _free("bool", True),
    "zero_optimization.log_trace_cache_warnings": _free("bool", False),
    "zero_optimization.enable_sanity_checks": _free("bool", False),
    "zero_optimization.stage3_prefetch_bucket_size": _free("int", 50_000_000),
    "zero_optimization.stage3_param_persistence_threshold": _free("int", 100_000),
    "zero_optimization.stage3_model_persistence_threshold": _free("int"),
    "zero_optimization.stage3_max_live_parameters": _free("int", 1_000_000_000),
    "zero_optimization.stage3_max_reuse_distance": _free("int", 1_000_000_000),
    "zero_optimization.stage3_module_granularity_threshold": _free("int", 0),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _free("bool", False),
    "zero_optimization.stage3_allgather_sequential": _free("bool", False),
    "zero_optimization.offload_optimizer": _free("section"),
    "zero_optimization.offload_optimizer.device": _free("text", "none", ("none", "cpu")),
    "zero_optimization.offload_optimizer.pin_memory": _free("bool", True),
    "zero_optimization.offload_param": _free("section"),
    "zero_optimization.offload_param.device": _free("text", "none", ("none", "cpu")),
    "zero_optimization.offload_param.pin_memory": _free("bool", True),
    "zero_optimization.round_robin_gradients": _fixed(
        False, "checkpoints read whole parameters, which it scatters"
    ),
    "zero_optimization.elastic_checkpoint": _fixed(
        False, "Muon's state cannot be reloaded with it"
    ),
    "zero_optimization.load_from_fp32_weights": _fixed(True, "resuming would not be exact"),
    "zero_optimization.compute_grad_norm": _fixed(True, "ZeRO 1 in bf16 needs it"),
    "zero_optimization.legacy_stage1": _fixed(False, "DeepSpeed has removed it"),
    "zero_optimization.zero_hpz_partition_size": _fixed(1, "it is not tested with Muon"),
    "zero_optimization.zero_quantized_weights": _fixed(False, _QUANTIZED),
    "zero_optimization.zero_quantized_nontrainable_weights": _fixed(False, _QUANTIZED),
    "zero_optimization.zero_quantized_gradients": _fixed(False, _QUANTIZED),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _fixed(False, _OWN_CHECKPOINTS),
    "zero_optimization.save_muon_momentum_buffer_in_memory": _fixed(False, _NVME),
    "zero_optimization.pipeline_loading_checkpoint": _fixed(False, _DENSE),
    "zero_optimization.override_module_apply": _fixed(True, "initialisation relies on it"),
    # What dualtrain does itself.
    "activation_checkpointing": _recipe("model.activation_checkpointing"),
    "compile": _recipe("model.compile"),
    "timers": _recipe("progress"),
    "steps_per_print": _fixed(10**9, _OWN_METRICS),
    "wall_clock_breakdown": _fixed(False, _PROFILING),
    "memory_breakdown": _fixed(False, _PROFILING),
    "dump_state": _fixed(False, _OWN_METRICS),
    "disable_python_gc": _fixed(False, "it lets memory grow"),
    "disable_allgather": _fixed(False, "weights would differ between ranks"),
}
"""By dotted key. A section is listed with its keys, unless it is not the ds_config's at all."""
