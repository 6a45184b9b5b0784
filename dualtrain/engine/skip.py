"""Steps without an update: those that DeepSpeed leaves out, and those that the ranks vote down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


def was_skipped(engine: DeepSpeedEngine) -> bool:
    """Whether the last ``engine.step()`` made no update, which DeepSpeed does not announce.

    It leaves a step out whose gradient is not finite, on all ranks alike; at stage 0
    ``Gradients`` sees to that.
    """
    return bool(getattr(engine.optimizer, "overflow", False))


def discard_step(engine: DeepSpeedEngine) -> None:
    """End the step as ``engine.step()`` would, but without an update.

    Weights, momentum and AdamW's count of steps stay as they are, the gradient is forgotten. Called
    in place of the ``engine.step()`` of the step's last slot, on every rank.
    """
    optimizer: Any = engine.optimizer
    with _shadowed(optimizer, _without_update(optimizer)):
        engine.step()
    if hasattr(optimizer, "overflow"):
        # It goes into checkpoints, and nothing has overflowed.
        optimizer.overflow = False


def _without_update(optimizer: Any) -> dict[str, object]:
    """What makes an optimizer of DeepSpeed 0.19.8 take its own way out of a step, by attribute."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def overflow(*_: object, **__: object) -> bool:
        optimizer.overflow = True
        return True

    def clear(closure: Callable | None = None) -> None:
        del closure
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()

    def nothing(closure: Callable | None = None) -> None:
        del closure

    if isinstance(optimizer, BF16_Optimizer):
        return {"step": clear}
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return {"_overflow_check_and_loss_scale_update": overflow}
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return {"check_grad_overflow": True, "check_overflow": overflow}
    return {"step": nothing}


@contextmanager
def _shadowed(instance: object, attributes: Mapping[str, object]) -> Iterator[None]:
    """Give an instance other attributes, methods among them, for the time of the block."""
    before = {name: vars(instance)[name] for name in attributes if name in vars(instance)}
    vars(instance).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(instance)[name]
        vars(instance).update(before)
