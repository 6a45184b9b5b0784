"""The trackers by the names that ``progress.trackers`` has for them.

A name is also that of the package that is needed, and of the extra that brings it.
Modules are called ``with_NAME``: ``NAME`` alone would hide the package from type checkers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec

from dualtrain.common.errors import UserError, nearest, raise_together
from dualtrain.progress.trackers.tracker import Tracker

REGISTRY = {
    "tensorboard": "dualtrain.progress.trackers.with_tensorboard:TensorBoardTracker",
    "wandb": "dualtrain.progress.trackers.with_wandb:WandbTracker",
    "trackio": "dualtrain.progress.trackers.with_trackio:TrackioTracker",
    "mlflow": "dualtrain.progress.trackers.with_mlflow:MlflowTracker",
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse unknown trackers, and those that are not installed; imports none of them.

    Raises:
        UserError: There are such; all at once.
    """
    raise_together(_problems(names))


def _problems(names: Sequence[str]) -> Iterator[UserError]:
    for i, name in enumerate(names):
        where = f"progress.trackers.{i}"
        if name not in REGISTRY:
            what = f"no tracker {name!r}"
            yield UserError(where, what, f"one of {', '.join(REGISTRY)}", nearest(name, REGISTRY))
        elif find_spec(name) is None:
            what = f"the package `{name}` is not installed"
            yield UserError(where, what, hint=f"pip install 'dualtrain[{name}]', or leave it out")


def make_tracker(name: str) -> Tracker:
    """Make a tracker that was checked."""
    module, _, kind = REGISTRY[name].partition(":")
    return getattr(import_module(module), kind)()
