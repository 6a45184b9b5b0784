"""``dualtrain run``: its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from dualtrain.common.errors import EXIT_DONE


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The command line of ``dualtrain run``."""

    recipe: Annotated[
        str,
        typer.Argument(help="A recipe file, or the name of a shipped one (`dualtrain recipes`)."),
    ]
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Changes to the recipe, such as optim.lr=1e-3."
        ),
    ] = field(default_factory=list)
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this machine; default: one a GPU, or 1 on a CPU."),
    ] = None
    hostfile: Annotated[
        Path | None, typer.Option(help="Run on the machines of this file through DeepSpeed.")
    ] = None
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STEP|CHECKPOINT",
            help="Branch off from a checkpoint of this run, with changes such as steps=12000.",
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved recipe and what follows from it.")
    ] = False
    plain: Annotated[
        bool, typer.Option("--plain", help="Lines instead of the live view, also on a terminal.")
    ] = False


def run(options: RunOptions) -> int:
    """Train a model; the same command continues a run that was stopped."""
    from dualtrain.training.prepare import own_places
    from dualtrain.training.start import show, start

    changes = [*own_places(options.recipe, options.overrides), *options.overrides]
    if options.start_from is None:
        from dualtrain.recipe.load import load_recipe

        loaded = load_recipe(options.recipe, changes)
    else:
        from dualtrain.training.branch import load_branch

        loaded = load_branch(options.recipe, changes, options.start_from)
    from dualtrain.training.dataset import with_dataset_there

    settled = with_dataset_there(loaded)
    if settled is not loaded:
        typer.echo(
            "data.path holds another dataset: data.build of the recipe is left out", err=True
        )
    if options.dry_run:
        show(settled, ranks=options.ranks, hostfile=options.hostfile)
        return EXIT_DONE
    return start(settled, ranks=options.ranks, hostfile=options.hostfile, plain=options.plain)
