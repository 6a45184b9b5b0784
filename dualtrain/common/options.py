"""Commands whose options are declared once, as the fields of a dataclass, for Typer and code."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from dualtrain.common.files import user_path

Step = Annotated[
    int | None, typer.Option(help="The checkpoint of this step of a run; default: the newest.")
]
Device = Annotated[
    str | None,
    typer.Option(metavar="cpu|cuda", help="Such as cpu or cuda:1; default: a GPU if there is one."),
]
Precision = Annotated[
    str | None,
    typer.Option(metavar="fp32|bf16", help="Default: fp32 on a CPU, else the run's."),
]


def as_command(function: Callable[..., int | None]) -> Callable[..., None]:
    """A function as Typer takes it.

    A field of an options dataclass is annotated as a parameter of a Typer command is, and its
    default is the option's.

    Args:
        function: Takes one options dataclass, or parameters of its own, or nothing; returns the
            exit code, None for success.

    Returns:
        A command with an option for each field. Its paths may begin with ``~``, of which no shell
        makes anything in ``--out=~/x``.
    """
    hints = get_type_hints(function, include_extras=True)
    options: Any = next(filter(dataclasses.is_dataclass, hints.values()), None)
    if options is not None:
        hints = get_type_hints(options, include_extras=True)

    @functools.wraps(function)
    def command(**values: object) -> None:
        values = {name: _expanded(value) for name, value in values.items()}
        code = function(**values) if options is None else function(options(**values))
        raise typer.Exit(code or 0)

    command.__annotations__ = hints
    # Typer reads it; pyright knows no such attribute of a function.
    vars(command)["__signature__"] = inspect.Signature(
        [
            parameter.replace(
                kind=inspect.Parameter.KEYWORD_ONLY,
                annotation=hints[parameter.name],
                default=_default(options, parameter),
            )
            for parameter in inspect.signature(options or function).parameters.values()
        ]
    )
    return command


def _default(options: Any, parameter: inspect.Parameter) -> object:
    for field in dataclasses.fields(options) if options is not None else ():
        if field.name == parameter.name and callable(field.default_factory):
            return field.default_factory()
    return parameter.default


def _expanded(value: object) -> object:
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    return user_path(value) if isinstance(value, Path) else value
