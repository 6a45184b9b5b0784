"""Tests of: dualtrain.engine.config, ds_rules.

The DeepSpeed configuration: every value sent, unknown keys and contradictions refused.
"""

from __future__ import annotations

import json

import pytest

from dualtrain.common.errors import UserError, UserErrors
from dualtrain.data.corpus import CorpusFacts
from dualtrain.derived.derive import derive
from dualtrain.engine.config import (
    bfloat16_mode,
    merge_settings,
    read_ds_config,
    zero_stage,
)
from dualtrain.engine.ds_rules import RULES
from dualtrain.recipe.load import load_recipe

TOP = {key for key in RULES if "." not in key}

# What DeepSpeed 0.19.8 reads and a ds_config may not have: data, metrics, checkpoints and other
# things that dualtrain does itself, old names, and what has not been tried with Muon.
_LEFT_OUT = """
aio amp autotuning bfloat16 checkpoint comet comms_logger compression_training csv_monitor
curriculum_learning data_efficiency dataloader_drop_last datastates_ckpt eigenvalue elasticity
expert_parallel flops_profiler graph_harvesting hybrid_engine log_level nebula pipeline
progressive_layer_drop quantize_training seq_parallel_communication_data_type
sequence_parallel_size sparse_attention sparse_gradients tensor_parallel tensorboard
use_data_before_expert_parallelism vocabulary_size wandb weight_quantization
"""
_LEFT_OUT_OF_ZERO = """
allgather_sequential cpu_offload cpu_offload_param cpu_offload_use_pin_memory
gather_16bit_weights_on_model_save leaf_module max_live_parameters max_reuse_distance
mics_hierarchical_params_gather mics_shard_size model_persistence_threshold
module_granularity_threshold offload_optimizer.buffer_count offload_optimizer.cpuadam_cores_perc
offload_optimizer.fast_init offload_optimizer.nvme_path offload_optimizer.pipeline_read
offload_optimizer.pipeline_write offload_optimizer.ratio offload_optimizer.super_offload
offload_param.buffer_count offload_param.buffer_size offload_param.max_in_cpu
offload_param.nvme_path param_persistence_threshold prefetch_bucket_size
stage3_gather_fp16_weights_on_model_save use_all_reduce_for_fetch_params zenflow zeropp_loco_param
"""
LEFT_OUT, LEFT_OUT_OF_ZERO = set(_LEFT_OUT.split()), set(_LEFT_OUT_OF_ZERO.split())


def merge(ds_config="zero1", **changes) -> dict:
    settings = {"precision": "fp32", "micro_batch": 4, "accumulation": 2, "world_size": 3}
    return merge_settings(str(ds_config), **(settings | changes))


def write(tmp_path, values) -> str:
    path = tmp_path / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values, indent=1))
    return str(path)


def errors_of(path, **changes) -> list[str]:
    with pytest.raises(UserError) as caught:
        merge(path, **changes)
    error = caught.value
    return [str(e) for e in (error.errors if isinstance(error, UserErrors) else [error])]


class Spy(dict):
    """A configuration that remembers which keys are looked up in it."""

    seen: set[str] = set()

    def __contains__(self, key):
        self.seen.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def keys(self):
        return self


# The table against the installed DeepSpeed


def test_every_top_level_key_that_deepspeed_reads_is_decided_upon():
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(Spy(train_batch_size=1))
    # sequence_parallel_size is read elsewhere, by deepspeed.initialize.
    assert Spy.seen == TOP | LEFT_OUT - {"sequence_parallel_size"}
    assert not TOP & LEFT_OUT


def test_every_key_of_deepspeeds_zero_section_is_decided_upon():
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def keys_of(model) -> set[str]:
        fields = model.model_fields
        return set(fields) | {field.alias for field in fields.values() if field.alias}

    inner = "zero_optimization."
    decided = {key.removeprefix(inner) for key in RULES if key.startswith(inner)}
    known = keys_of(DeepSpeedZeroConfig) | set(_REMOVED_ZERO_CONFIG_KEYS)
    for name, model in (
        ("offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("offload_param", DeepSpeedZeroOffloadParamConfig),
    ):
        known |= {f"{name}.{key}" for key in keys_of(model)}
    assert known == decided | LEFT_OUT_OF_ZERO
    assert not decided & LEFT_OUT_OF_ZERO


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_accepts_what_is_merged(stage, precision, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    files = [f"zero{stage}"]
    if stage:
        offload = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
        files.append(write(tmp_path, {"zero_optimization": offload}))
    for file in files:
        settings = merge(file, precision=precision, world_size=1)
        accepted = DeepSpeedConfig(settings)
        assert accepted.zero_optimization_stage == zero_stage(settings) == stage
        assert accepted.gradient_clipping == 0
        assert accepted.train_batch_size == 8
        mode = bfloat16_mode(precision, stage)
        assert accepted.bfloat16_config.enabled == (mode == "weights")
        assert accepted.torch_autocast_enabled == (mode == "autocast")
        assert not accepted.float16_config.enabled
        offloads = accepted.zero_config.offload_optimizer
        assert (offloads is not None) == (file != f"zero{stage}")


# What is sent


def test_every_value_of_the_table_is_sent():
    settings = merge("zero2")
    expected = {
        key
        for key in TOP
        if RULES[key].owner in ("fixed", "ds_config")
        or key in ("bf16", "fp16", "torch_autocast", "data_types", "gradient_clipping", "timers")
        or key.startswith(("train_", "gradient_accumulation"))
    }
    assert set(settings) == expected
    sent = settings["zero_optimization"]
    for key, rule in RULES.items():
        if key.startswith("zero_optimization.") and key.count(".") == 1 and rule.value is not None:
            assert key.rpartition(".")[2] in sent


def test_batches_are_those_of_the_recipe():
    recipe = load_recipe("quickstart", ["global_batch=48"]).recipe
    corpus = CorpusFacts(tokens=10**6, documents=1000, vocab_size=2048)
    settings = derive(recipe, corpus=corpus, world_size=3).deepspeed
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["train_batch_size"] == 48


@pytest.mark.parametrize(
    ("precision", "stage", "mode"),
    [
        ("fp32", 0, "off"),
        ("fp32", 3, "off"),
        ("bf16", 0, "autocast"),
        ("bf16", 1, "weights"),
        ("bf16", 2, "autocast"),
        ("bf16", 3, "weights"),
    ],
)
def test_bf16_accumulates_and_communicates_in_fp32(precision, stage, mode):
    settings = merge(f"zero{stage}", precision=precision)
    assert bfloat16_mode(precision, stage) == mode
    is_bf16 = mode == "weights"
    assert settings["bf16"] == {"enabled": is_bf16, "immediate_grad_update": is_bf16}
    assert settings["torch_autocast"]["enabled"] == (mode == "autocast")
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32"


def test_the_files_values_are_sent(tmp_path):
    values = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e6, "overlap_comm": True},
        "communication_data_type": "bf16",
    }
    settings = merge(write(tmp_path, values))
    assert settings["communication_data_type"] == "bf16"
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["overlap_comm"]) == (2, 5e6, True)
    assert zero["round_robin_gradients"] is False


def test_stage_3_never_scatters_gradients(tmp_path):
    silent = write(tmp_path, {"zero_optimization": {"stage": 3}})
    assert merge(silent)["zero_optimization"]["reduce_scatter"] is False
    asked = write(tmp_path, {"zero_optimization": {"stage": 3, "reduce_scatter": True}})
    (error,) = errors_of(asked)
    assert "reduce_scatter: true does not work at stage 3" in error


def test_parameters_of_two_types_are_not_fetched_by_all_reduce(tmp_path):
    zero = {"stage": 3, "stage3_use_all_reduce_for_fetch_params": True}
    asked = write(tmp_path, {"zero_optimization": zero})
    (error,) = errors_of(asked, precision="bf16")
    assert "fetch_params: true does not work in bf16" in error
    assert merge(asked)["zero_optimization"]["stage3_use_all_reduce_for_fetch_params"] is True


def test_values_that_repeat_the_recipe_are_accepted(tmp_path):
    values = {
        "zero_optimization": {"stage": 1},
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 0,
        "bf16": {"enabled": False},
        "steps_per_print": 1000000000,
    }
    assert merge(write(tmp_path, values))["train_micro_batch_size_per_gpu"] == 4


# What is refused


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        # Unknown keys, at every level.
        ({"zero_optimisation": {}}, ["zero_optimisation: unknown key", "mean zero_optimization?"]),
        ({"gradient_cliping": 1}, ["gradient_cliping: unknown key", "mean gradient_clipping?"]),
        ({"_comment": "mine"}, ["_comment: unknown key"]),
        (
            {"zero_optimization": {"stag": 1}},
            ["zero_optimization.stag: unknown key", "mean stage?"],
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"devise": "cpu"}}},
            ["zero_optimization.offload_optimizer.devise: unknown key", "did you mean device?"],
        ),
        # Contradictions of the recipe.
        (
            {"train_batch_size": 32},
            ["train_batch_size: 32 conflicts with the recipe, where global_batch decides", "24"],
        ),
        (
            {"train_micro_batch_size_per_gpu": 8},
            ["8 conflicts with the recipe, where micro_batch decides it — expected 4"],
        ),
        ({"gradient_accumulation_steps": 1}, ["where global_batch / micro_batch / ranks decides"]),
        (
            {"gradient_clipping": 1.0},
            ["gradient_clipping: 1.0 conflicts", "where optim.clip_norm", "expected 0.0"],
        ),
        ({"bf16": {"enabled": True}}, ["where engine.precision decides it"]),
        ({"fp16": {"enabled": True}}, ["where engine.precision decides it"]),
        ({"bf16": {"enabld": False}}, ["where engine.precision decides it"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer: ", "where optim decides it", "no such key"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["where optim.schedule decides it"]),
        ({"activation_checkpointing": {}}, ["where model.activation_checkpointing decides it"]),
        # What dualtrain cannot work with.
        ({"zero_allow_untested_optimizer": False}, ["Muon counts as untested — expected true"]),
        ({"wall_clock_breakdown": True}, ["wall_clock_breakdown: true is not supported"]),
        ({"tensorboard": {"enabled": True}}, ["tensorboard: unknown key", "leaves to the ds_conf"]),
        (
            {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
            ["zero_optimization.round_robin_gradients: true is not supported: checkpoints read"],
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
            ["offload_optimizer.device: 'nvme' is not allowed — expected one of none, cpu"],
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            ["offload_optimizer: has no effect at stage 0 — expected stage 1 or above"],
        ),
        # Wrong kinds.
        ({"zero_optimization": True}, ["zero_optimization: true is not allowed — expected a sec"]),
        (
            {"zero_optimization": {"stage": "1"}},
            ["'1' is not allowed — expected one of 0, 1, 2, 3"],
        ),
        ({"zero_optimization": {"stage": True}}, ["true is not allowed"]),
        ({"zero_optimization": {"stage": 4}}, ["4 is not allowed — expected one of 0, 1, 2, 3"]),
        (
            {"zero_optimization": {"stage": 1, "overlap_comm": 1}},
            ["1 is not allowed — expected tr"],
        ),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "5e8"}},
            ["'5e8' is not allowed — expected a number >= 0"],
        ),
        (
            {"zero_optimization": {}},
            ["zero_optimization.stage: is missing — expected 0, 1, 2 or 3"],
        ),
        ({}, ["zero_optimization.stage: is missing"]),
    ],
)
def test_refused(tmp_path, values, messages):
    given = {"zero_optimization": {"stage": 1}} | values if values else values
    path = write(tmp_path, given)
    errors = errors_of(path)
    assert len(errors) == 1 and errors[0].startswith(f"{path}:")
    for message in messages:
        assert message in errors[0]


def test_all_problems_at_once_with_their_lines(tmp_path):
    text = """{
\t"zero_optimization": {
\t\t"stage": 1,
\t\t"stage": 2,
\t\t"overlap_com": true
\t},
\t"gradient_cliping": 1
}"""
    path = write(tmp_path, text)
    assert [error.split(" — ")[0].split(" (")[0] for error in errors_of(path)] == [
        f"{path}:4: zero_optimization.stage: duplicate key",
        f"{path}:5: zero_optimization.overlap_com: unknown key",
        f"{path}:7: gradient_cliping: unknown key",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'a': 1}", ":1: not valid JSON"),
        ('{"a": 1,\n}', "not valid JSON"),
        ("[]", "is a list — expected a JSON object"),
    ],
)
def test_what_is_no_json(tmp_path, text, message):
    (error,) = errors_of(write(tmp_path, text))
    assert message in error


def test_an_unknown_ds_config_shows_the_nearest():
    (error,) = errors_of("zero4")
    assert error.startswith("engine.deepspeed: 'zero4': no such file, and no shipped ds_config")
    assert "zero0, zero1, zero2, zero2-offload, zero3" in error and "did you mean zero" in error


def test_offloading_is_seen(tmp_path):
    values = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    assert read_ds_config(write(tmp_path, values)).offloads_optimizer
    assert not read_ds_config("zero1").offloads_optimizer
    assert merge(str(tmp_path / "ds.json"))["zero_optimization"]["offload_optimizer"] == {
        "device": "cpu",
        "pin_memory": True,
    }
