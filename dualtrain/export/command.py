"""``dualtrain export``: its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dualtrain.common.options import Step


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The command line of ``dualtrain export``."""

    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or one of its checkpoints.")]
    to: Annotated[Path, typer.Option(help="A new or empty directory; with --all, one for each.")]
    all_checkpoints: Annotated[
        bool, typer.Option("--all", help="Every checkpoint; those that are there are passed over.")
    ] = False
    push: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Also upload to this repository on the hub; with --all, branches."
        ),
    ] = None
    step: Step = None
    dtype: Annotated[
        str, typer.Option(metavar="fp32|bf16", help="Precision of the exported weights.")
    ] = "fp32"
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest file of weights, such as 500MB.")
    ] = "5GB"


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """The command line of ``dualtrain import``."""

    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE[@REVISION]",
            help="A state dict, its directory, or a repository such as ltg/dual-lm-470m.",
        ),
    ]
    to: Annotated[Path, typer.Option(help="A new or empty directory; with --all, one for each.")]
    all_revisions: Annotated[
        bool, typer.Option("--all", help="Every revision; those that are there are passed over.")
    ] = False
    config: Annotated[
        Path | None, typer.Option(help="Its JSON file of sizes; default: beside the weights.")
    ] = None
    tokenizer: Annotated[
        Path | None, typer.Option(help="Its tokenizer.json; default: beside the weights.")
    ] = None
    dtype: Annotated[
        str, typer.Option(metavar="fp32|bf16", help="Precision of the written weights.")
    ] = "fp32"


def import_(options: ImportOptions) -> None:
    """Write a model of the paper's released code as `dualtrain export` writes ours."""
    from dualtrain.export.released import import_released

    for imported in import_released(
        options, on_note=lambda note: typer.echo(f"note: {note}", err=True)
    ):
        typer.echo("\n".join(imported.lines()))


def export(options: ExportOptions) -> None:
    """Write a model as a directory for transformers: weights, tokenizer and model card."""
    from dualtrain.export.revisions import exports, push

    for branch, directory, exported in exports(
        options, on_note=lambda note: typer.echo(f"note: {note}", err=True)
    ):
        if exported is not None:
            typer.echo("\n".join(exported.lines()))
        if options.push is not None:
            typer.echo(f"pushed to {push(directory, options.push, branch=branch)}")
