"""A ds_config and what a recipe says become the configuration that DeepSpeed is given.

``derive`` calls :func:`merge_settings` and :func:`read_ds_config`. Who decides which key is in
``ds_rules``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from dualtrain.common.errors import UserError, nearest, raise_together
from dualtrain.engine.ds_rules import RULES, Rule, Value
from dualtrain.recipe.shipped import find_ds_config
from dualtrain.recipe.yaml_source import Located, Plain, parse, shown

Precision = Literal["fp32", "bf16"]
BFloat16 = Literal["off", "autocast", "weights"]

_KIND_NAMES = {
    "bool": "true or false",
    "int": "a number >= 0",
    "text": "text",
    "section": "a section",
}


@dataclass(frozen=True)
class DsConfig:
    """A ds_config file, checked by itself.

    Attributes:
        offloads_optimizer: Whether master weights and optimizer states live in host memory.
        offloads_parameters: Whether the weights do, too, while they are not used.
    """

    file: str
    tree: Located
    stage: int
    offloads_optimizer: bool
    offloads_parameters: bool


def merge_settings(
    ds_config: str, *, precision: Precision, micro_batch: int, accumulation: int, world_size: int
) -> dict[str, object]:
    """Merge a ds_config with the few settings of a recipe that DeepSpeed has to know.

    Args:
        accumulation: Micro-steps of a rank in a step: S / world_size, or 2 S / world_size where
            each batch is run with both objectives.

    Returns:
        What ``deepspeed.initialize`` takes.

    Raises:
        UserError: There is no such ds_config; it has unknown keys, values of the wrong kind, or
            values that contradict the recipe. All are named, with file and line.
    """
    given = read_ds_config(ds_config)
    settings: dict[str, object] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
        # Clipping is that of dualtrain.engine.gradients; DeepSpeed's default is 1.0.
        "gradient_clipping": 0.0,
        # It would wait for the device twice in every slot.
        "timers": {"throughput": {"enabled": False}},
        **precision_settings(precision, given.stage),
    }
    mode = bfloat16_mode(precision, given.stage)
    raise_together([*_conflicts(given.tree, settings), *_check_types(given, mode)])
    free = given.tree.plain()
    assert isinstance(free, dict)
    for key, rule in RULES.items():
        if "." not in key and key not in settings and rule.owner in ("fixed", "ds_config"):
            settings[key] = free.get(key, rule.value)
    settings["zero_optimization"] = _zero_settings(free["zero_optimization"], given.stage)
    return settings


def precision_settings(precision: Precision, stage: int) -> dict[str, object]:
    """The precision sections of DeepSpeed 0.19.8 that keep everything but the matrix products fp32.

    fp32 master weights, accumulated gradients, momentum and norm gains are what the method asks
    for, and ``"bf16": {"enabled": true}`` alone gives none of the last three. ``norm_gains`` sees
    to the gains; what does for the others depends on the stage:

    - 1 and 3: bf16 weights with ``grad_accum_dtype`` fp32. At stage 1 this selects BF16_Optimizer.
      Momentum at stage 3 has the type of the communication, which is fp32 unless the ds_config
      says otherwise.
    - 0: a bf16 module makes an empty optimizer step at the start, so Adam begins at t = 2. Hence
      fp32 weights under torch.autocast.
    - 2: gradients of a bf16 module are accumulated, and Muon's momentum kept, in bf16, whatever
      ``grad_accum_dtype`` says. Hence autocast, too.

    DeepSpeed's own ``torch_autocast`` is used, as the engine disables any other around it. No
    module is declared safe for low-precision communication, so gradients are reduced in fp32.
    """
    autocasts = precision == "bf16" and stage in (0, 2)
    in_bf16 = precision == "bf16" and not autocasts
    autocast: dict[str, object] = {"enabled": autocasts}
    if autocasts:
        autocast |= {"dtype": "bfloat16", "lower_precision_safe_modules": []}
    return {
        # Gradients in bf16 go into the fp32 sums as they come, not all after the backward pass.
        "bf16": {"enabled": in_bf16, "immediate_grad_update": in_bf16},
        "fp16": {"enabled": False},
        "torch_autocast": autocast,
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def zero_stage(config: Mapping[str, object]) -> int:
    """The ZeRO stage of a merged configuration."""
    zero = config["zero_optimization"]
    assert isinstance(zero, Mapping)
    return int(zero["stage"])


def bfloat16_mode(precision: Precision, stage: int) -> BFloat16:
    """How bf16 is used at a stage: ``autocast`` keeps the module in fp32, ``weights`` its norms."""
    if precision == "fp32":
        return "off"
    return "autocast" if stage in (0, 2) else "weights"


def read_ds_config(path_or_name: str) -> DsConfig:
    """Read a ds_config and check all that can be checked without a recipe."""
    path = find_ds_config(path_or_name, where="engine.deepspeed")
    file = str(path)
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except OSError as error:
        raise UserError(file, f"cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}", f"not valid JSON: {error.msg}") from None
    except ValueError:
        raise UserError(file, "is not UTF-8 text", "JSON") from None
    # JSON is YAML but for tabs, which it allows between values only; read so, it has lines.
    tree, errors = parse(text.replace("\t", " "), file)
    if not isinstance(tree.value, dict):
        raise UserError(file, f"is {shown(tree.plain())}", "a JSON object")
    raise_together([*errors, *_check(tree, "")])
    zero = tree.child("zero_optimization")
    stage = zero.child("stage") if zero else None
    if stage is None or not isinstance(stage.value, int):
        where = f"{zero.place if zero else tree.place}: zero_optimization.stage"
        raise UserError(where, "is missing", "0, 1, 2 or 3")
    assert zero is not None
    raise_together(_check_stage(zero, stage.value))
    optimizer, parameters = (
        _is_offloaded(zero, section) for section in ("offload_optimizer", "offload_param")
    )
    return DsConfig(file, tree, stage.value, optimizer, parameters)


def _is_offloaded(zero: Located, section: str) -> bool:
    given = zero.child(section)
    device = given.child("device") if given else None
    return device is not None and device.value == "cpu"


def _zero_settings(given: Plain, stage: int) -> dict[str, object]:
    """Every ZeRO value: what the file says, what is fixed, the defaults of the table."""
    assert isinstance(given, dict)
    settings: dict[str, object] = {}
    for key, rule in RULES.items():
        parent, _, name = key.rpartition(".")
        if parent != "zero_optimization" or rule.kind == "section":
            continue
        value = given.get(name, rule.value)
        if value is not None:
            settings[name] = value
    for section in ("offload_optimizer", "offload_param"):
        inner = given.get(section)
        if isinstance(inner, dict) and inner.get("device", "none") != "none":
            settings[section] = {"pin_memory": True, **inner}
    if stage == 3:
        # Muon needs whole gradients there.
        settings["reduce_scatter"] = False
    return settings


def _check(node: Located, prefix: str) -> Iterator[UserError]:
    """Unknown and fixed keys, and kinds of values, in a section of a ds_config."""
    assert isinstance(node.value, dict)
    for name, child in node.value.items():
        key = f"{prefix}{name}"
        where = f"{child.place}: {key}"
        rule = RULES.get(key)
        if rule is None:
            siblings = [
                k.removeprefix(prefix) for k in RULES if k.rpartition(".")[0] == prefix[:-1]
            ]
            expected = "a key that dualtrain leaves to the ds_config"
            yield UserError(where, "unknown key", expected, nearest(name, siblings))
        elif rule.owner == "fixed" and not _agrees(child.plain(), rule.value):
            what = f"{shown(child.plain())} is not supported: {rule.why}"
            yield UserError(where, what, shown(rule.value), "remove it")
        elif rule.owner == "ds_config" and not _fits(child, rule):
            choices = ", ".join(str(choice) for choice in rule.choices)
            expected = f"one of {choices}" if choices else _KIND_NAMES[rule.kind or "text"]
            yield UserError(where, f"{shown(child.plain())} is not allowed", expected)
        elif rule.kind == "section":
            yield from _check(child, f"{key}.")


def _check_stage(zero: Located, stage: int) -> Iterator[UserError]:
    """What depends on the ZeRO stage."""
    scatter = zero.child("reduce_scatter")
    if stage == 3 and scatter is not None and scatter.value is not False:
        where = f"{scatter.place}: zero_optimization.reduce_scatter"
        yield UserError(where, "true does not work at stage 3: Muon needs whole gradients", "false")
    for section, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        given = zero.child(section)
        if given is not None and stage < lowest:
            where = f"{given.place}: zero_optimization.{section}"
            yield UserError(where, f"has no effect at stage {stage}", f"stage {lowest} or above")


def _check_types(given: DsConfig, mode: BFloat16) -> Iterator[UserError]:
    """What does not work where the norms of a bf16 module are fp32."""
    name = "stage3_use_all_reduce_for_fetch_params"
    zero = given.tree.child("zero_optimization")
    node = zero.child(name) if zero else None
    if given.stage == 3 and mode == "weights" and node is not None and node.value is True:
        what = "true does not work in bf16: norms are fp32, and it fetches one type only"
        yield UserError(f"{node.place}: zero_optimization.{name}", what, "false", "remove it")


def _fits(node: Located, rule: Rule) -> bool:
    value = node.value
    if rule.choices:
        return type(value) is type(rule.choices[0]) and value in rule.choices
    if rule.kind == "bool":
        return isinstance(value, bool)
    if rule.kind == "int":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    return isinstance(value, dict if rule.kind == "section" else str)


def _conflicts(tree: Located, settings: Mapping[str, object]) -> Iterator[UserError]:
    """Values of a ds_config that contradict the recipe."""
    assert isinstance(tree.value, dict)
    for key, child in tree.value.items():
        rule = RULES[key]
        if rule.owner == "recipe" and not _agrees(child.plain(), settings.get(key, _NOTHING)):
            made = settings.get(key)
            expected = json.dumps(made) if key in settings else "no such key"
            given = json.dumps(child.plain())
            what = f"{given} conflicts with the recipe, where {rule.why} decides it"
            yield UserError(f"{child.place}: {key}", what, expected, "remove it here")


_NOTHING = object()


def _agrees(given: Plain | Value, made: object) -> bool:
    """Whether a given value repeats one that is decided elsewhere; ``auto`` leaves it to us."""
    if given == "auto":
        return made is not _NOTHING
    if isinstance(given, dict):
        return isinstance(made, Mapping) and all(
            _agrees(value, made.get(key, _NOTHING)) for key, value in given.items()
        )
    return isinstance(given, bool) == isinstance(made, bool) and given == made
