"""The algorithms of a run: the one that always runs, then the recipe's own, in its order.

``dual_objective``  THE hook: gives each micro-batch its objective
``input_masking``   an extra one, and the model to write your own after

An extra algorithm is named in the recipe by its name in :data:`REGISTRY`, or as ``module:Class``.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dualtrain.algorithms.dual_objective import DualObjective
from dualtrain.algorithms.events import Algorithm
from dualtrain.algorithms.input_masking import InputMasking
from dualtrain.common.errors import UserError, nearest, raise_together

if TYPE_CHECKING:
    from dualtrain.recipe.schema import AlgorithmEntry, Recipe

__all__ = [
    "REGISTRY",
    "DualObjective",
    "InputMasking",
    "build_algorithms",
    "build_extra",
]

REGISTRY: dict[str, type[Algorithm]] = {"input_masking": InputMasking}
"""Extra algorithms by the name that a recipe uses for them."""

ALWAYS = {
    "alpha_schedule": "alpha",
    "learning_rate": "optim.schedule",
    "dual_objective": "objective",
}
"""What every run does by itself, and the part of the recipe that sets it."""

_MOVED = {
    "dualtrain.events": "dualtrain.algorithms",
    "dualtrain.mixing": "dualtrain.method.mixing",
    "dualtrain.objectives": "dualtrain.method.objectives",
    "dualtrain.randomness": "dualtrain.common.randomness",
}
"""Where earlier versions had what an algorithm imports."""

METHODS = ("match", "apply", "state_dict", "load_state_dict")


def build_algorithms(recipe: Recipe) -> list[Algorithm]:
    """Make all algorithms of a run, in the order in which they run."""
    extra: list[Algorithm] = []
    errors: list[UserError] = []
    for i, entry in enumerate(recipe.algorithms):
        try:
            extra.append(build_extra(entry, where=f"algorithms.{i}"))
        except UserError as error:
            errors.append(error)
    raise_together(errors)
    return [DualObjective(seed=recipe.seed, objective=recipe.objective), *extra]


def build_extra(entry: AlgorithmEntry, *, where: str) -> Algorithm:
    """Make one extra algorithm."""
    kind = _find(entry.use, f"{where}.use")
    _check_arguments(kind, entry.args, f"{where}.args")
    try:
        return kind(**entry.args)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}.args", f"{entry.use} refuses {entry.args}: {error}{_origin(error)}"
        ) from error


def _find(use: str, where: str) -> type[Algorithm]:
    """The class that a recipe's name means."""
    if use in REGISTRY:
        return REGISTRY[use]
    if use in ALWAYS:
        raise UserError(
            where,
            f"`{use}` runs always",
            "an extra algorithm",
            f"remove the entry; its settings are under {ALWAYS[use]}",
        )
    module, colon, name = use.partition(":")
    if not colon:
        raise UserError(
            where,
            f"no algorithm `{use}`",
            f"{', '.join(REGISTRY)}, or module:Class of your own",
            nearest(use, [*REGISTRY, *ALWAYS]),
        )
    kind = _import(module, name, where)
    missing = [method for method in METHODS if not _implements(kind, method)]
    if not isinstance(kind, type) or missing:
        lack = f"it lacks {', '.join(missing)}" if missing else "it is not a class"
        raise UserError(
            where,
            f"`{use}` is not an algorithm: {lack}",
            f"a class with {', '.join(METHODS)}",
            "derive it from dualtrain.algorithms.events.Algorithm; "
            "algorithms/input_masking.py is an example",
        )
    return kind


def _implements(kind: object, method: str) -> bool:
    found = getattr(kind, method, None)
    return callable(found) and not getattr(found, "__isabstractmethod__", False)


def _import(module: str, name: str, where: str) -> object:
    """Import what ``module:name`` means, also from the current directory."""
    # A console script's path lacks the directory it is run in, where the user's module lies.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _import_error(module, where, error) from error
        raise UserError(
            where,
            f"cannot import `{module}`: no module `{error.name}`",
            "a module in the current directory or on PYTHONPATH",
            f"run it from the directory of {error.name}.py, or set PYTHONPATH",
        ) from None
    except Exception as error:
        raise _import_error(module, where, error) from error
    if not hasattr(found, name):
        classes = [key for key, value in vars(found).items() if inspect.isclass(value)]
        raise UserError(
            where,
            f"module `{module}` has no `{name}`",
            f"a class that {found.__file__} defines",
            nearest(name, classes),
        )
    return getattr(found, name)


def _import_error(module: str, where: str, error: Exception) -> UserError:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return UserError(
        where,
        f"importing `{module}` failed: {type(error).__name__}: {error}{_origin(error)}",
        "a module that can be imported",
        f"{missing} is {_MOVED[missing]} now" if missing in _MOVED else "",
    )


def _origin(error: Exception) -> str:
    """The line that raised an error, since a user's mistake is printed without its traceback."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" [{frame.filename}:{frame.lineno}]"


def _check_arguments(kind: type[Algorithm], args: Mapping[str, object], where: str) -> None:
    """Compare a recipe's arguments with the constructor's, by name."""
    accepted = {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(
        parameter.kind is parameter.VAR_KEYWORD
        for parameter in inspect.signature(kind).parameters.values()
    )
    unknown = [] if takes_any else [name for name in args if name not in accepted]
    missing = [
        name
        for name, parameter in accepted.items()
        if parameter.default is parameter.empty and name not in args
    ]
    if not unknown and not missing:
        return
    problems = []
    if unknown:
        problems.append(f"no argument `{'`, `'.join(unknown)}`")
    if missing:
        problems.append(f"`{'`, `'.join(missing)}` missing")
    raise UserError(
        where,
        f"{kind.__name__}: {' and '.join(problems)}",
        ", ".join(accepted) or "no arguments",
        nearest(unknown[0], accepted) if unknown else "",
    )
