"""``dualtrain generate``: its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dualtrain.common.options import Device, Precision, Step
from dualtrain.generate.settings import Settings


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Settings):
    """The command line of ``dualtrain generate``: settings, and where texts come from and go."""

    path: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory, a checkpoint, or an export.")
    ]
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to continue, or a text with gaps: 'The <mask:8> sat'. Default: a new text."
        ),
    ] = None
    file: Annotated[
        Path | None,
        typer.Option(
            help="Prompts: a line each, or JSON with a `prompt` each; `-`: standard input."
        ),
    ] = None
    out: Annotated[
        Path | None, typer.Option(help="Write the texts to this file, as JSON lines.")
    ] = None
    step: Step = None
    device: Device = None
    precision: Precision = None
    plain: Annotated[
        bool, typer.Option("--plain", help="Finished texts only, also on a terminal.")
    ] = False
    trace: Annotated[bool, typer.Option("--trace", help="Diffusion: a line for each step.")] = False


def generate(options: GenerateOptions) -> None:
    """Generate text: from left to right, behind a prompt read bidirectionally, or into gaps."""
    from dualtrain.generate.generate import generate_and_show

    generate_and_show(options)
