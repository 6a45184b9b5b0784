"""The command line: load, call one function, turn errors into exit codes.

No logic lives here. Heavy modules are imported inside the commands, so that ``--help``, ``schema``
and a refused recipe answer at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from dualtrain.errors import EXIT_FAILED, EXIT_USER_ERROR, UserError
from dualtrain.launch import spare_shared_cores

PEER_GRACE_S = 3.0
"""Time the rank with the cause of a failure has to report it before the others speak."""

app = typer.Typer(
    name="dualtrain",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def common(
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Pre-train language models with an autoregressive and a masked-diffusion objective."""
    # Put before the command by the deepspeed launcher, which says the same in the environment.
    del local_rank


RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a shipped one (`dualtrain recipes`).")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as optim.lr=1e-3."),
]


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this machine; default: one a GPU, or 1 on a CPU."),
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="Run on the machines of this file through DeepSpeed.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved recipe and what follows from it.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Lines instead of the live view, also on a terminal.")
    ] = False,
) -> None:
    """Train a model; the same command continues a run that was stopped."""
    from dualtrain.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        from dualtrain.data.corpus import read_corpus
        from dualtrain.recipe.derive import derive
        from dualtrain.recipe.merge import deepspeed_config
        from dualtrain.recipe.render import print_dry_run

        corpus = read_corpus(loaded.recipe)
        derived = derive(loaded.recipe, corpus=corpus, world_size=ranks)
        per_rank = derived.slots_per_step // derived.world_size
        deepspeed_config(
            loaded.recipe, world_size=derived.world_size, slots_per_step_per_rank=per_rank
        )
        if loaded.recipe.algorithms:
            from dualtrain.algorithms import build_algorithms

            build_algorithms(loaded.recipe)
        print_dry_run(loaded, derived)
        return
    from dualtrain.start import start

    raise typer.Exit(start(loaded, ranks=ranks, hostfile=hostfile, plain=plain))


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from dualtrain.recipe.shipped import shipped_recipes

    for name, summary in shipped_recipes():
        typer.echo(f"{name:28} {summary}")


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The reference as a Markdown table.")
    ] = False,
) -> None:
    """Print the JSON schema of recipes, for editors and checkers."""
    from dualtrain.recipe.reference import json_schema, markdown_reference

    typer.echo(markdown_reference() if markdown else json.dumps(json_schema(), indent=2))


def mount_data_tools() -> None:
    """Add ``dualtrain data``."""
    from data_tools.app import app as data_app

    app.add_typer(data_app, name="data", help="Convert corpora to MDS shards and look at them.")


def main() -> None:
    """Entry point: run a command; report a failure once and leave with its exit code."""
    spare_shared_cores()
    mount_data_tools()
    try:
        app(standalone_mode=True)
    except UserError as error:
        _report_once(f"error: {error}")
        sys.exit(EXIT_USER_ERROR)
    except Exception as error:
        _report_once(traceback.format_exc(), is_consequence=_is_lost_peer(error))
        # Not sys.exit: threads of a broken process group would keep the interpreter from leaving.
        os._exit(EXIT_FAILED)


def _report_once(message: str, *, is_consequence: bool = False) -> None:
    """Print an error unless another rank is about to print the same, or its cause.

    Rank 0 speaks at once. The others, and a rank that only lost its peer, wait a moment: whoever
    started the ranks ends them as soon as the first has left.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size > 1 and (rank > 0 or is_consequence):
        time.sleep(PEER_GRACE_S)
    prefix = f"rank {rank}: " if rank > 0 else ""
    print(prefix + message, file=sys.stderr, flush=True)


def _is_lost_peer(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    signs = ("closed by peer", "connection reset", "gloo", "nccl", "distbackenderror", "store")
    return any(sign in text for sign in signs)
