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
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dualtrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, UserError
from dualtrain.launch import spare_shared_cores
from dualtrain.peers import ROLL_CALL_S, LostPeer
from dualtrain.terminal import forget_output, open_missing_output

PEER_GRACE_S = 3.0
"""Time rank 0 has to report a failure of all ranks before the others speak."""

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
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STEP|CHECKPOINT",
            help="Branch off from a checkpoint of this run, with changes such as steps=12000.",
        ),
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

    if start_from is None:
        loaded = load_recipe(recipe, overrides or [])
    else:
        from dualtrain.branch import load_branch

        loaded = load_branch(recipe, overrides or [], start_from)
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
def replay(
    path: Annotated[
        Path, typer.Argument(help="RUN_DIR/non-finite/step-N, or RUN_DIR for its newest report.")
    ],
    slot: Annotated[
        int | None,
        typer.Option(help="Slot of that step; default: the first that was not finite."),
    ] = None,
) -> None:
    """Repeat a slot whose loss was not finite; exit code 1 when its loss comes out another."""
    from dualtrain.replay import replay as run_again

    found = run_again(path, slot=slot)
    typer.echo("\n".join(found.lines()))
    raise typer.Exit(EXIT_DONE if found.is_same else EXIT_FAILED)


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
    open_missing_output()
    spare_shared_cores()
    mount_data_tools()
    try:
        app(standalone_mode=True)
    except UserError as error:
        _report_once(f"error: {error}")
        if "WORLD_SIZE" in os.environ:
            # A rank may have an engine, which Python's tidying up does not survive.
            _leave_at_once(EXIT_USER_ERROR)
        sys.exit(EXIT_USER_ERROR)
    except LostPeer as error:
        if str(error):
            _report(f"error: {error}")
        if os.environ["RANK"] == "0":
            # The store may be in this process, and ranks that noticed later still ask it who lives.
            time.sleep(ROLL_CALL_S)
        _leave_at_once(EXIT_FAILED)
    except Exception:
        _report_once(traceback.format_exc())
        _leave_at_once(EXIT_FAILED)
    finally:
        _flush()


def _report_once(message: str) -> None:
    """Print an error unless another rank is about to print the same.

    Rank 0 speaks at once. The others wait a moment: whoever started the ranks ends them as soon as
    the first has left.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size > 1 and rank > 0:
        time.sleep(PEER_GRACE_S)
    prefix = f"rank {rank}: " if rank > 0 else ""
    _report(prefix + message)


def _report(message: str) -> None:
    # Nobody may be there to read it any more; the exit code remains.
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def _leave_at_once(code: int) -> NoReturn:
    """Leave without Python's tidying up, which threads of a broken process group would hold up."""
    _flush()
    os._exit(code)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        # Python would fail to write the same at its exit, and change the exit code for it.
        forget_output()
