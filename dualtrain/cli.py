"""The command line: a function of a room for each command; errors become exit codes.

Each room's ``command`` module declares the options and imports the heavy modules inside its
functions, so that ``--help``, ``schema`` and a refused recipe answer at once.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from dualtrain.common.errors import EXIT_FAILED, EXIT_USER_ERROR, UserError
from dualtrain.common.files import file_problem
from dualtrain.common.options import as_command
from dualtrain.common.terminal import forget_output, prepare_streams
from dualtrain.evaluate.command import evaluate
from dualtrain.export.command import export, import_
from dualtrain.generate.command import generate
from dualtrain.launch.peers import ROLL_CALL_S, LostPeer
from dualtrain.launch.world import prepare_environment
from dualtrain.recipe.command import recipes, schema
from dualtrain.sweep.command import alpha, compare, fit, sweep
from dualtrain.training.command import run

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


for command in (run, sweep, fit, alpha, compare, generate, export, recipes, schema):
    app.command()(as_command(command))
app.command("eval")(as_command(evaluate))
app.command("import")(as_command(import_))


def mount_data_tools() -> None:
    """Add ``dualtrain data``."""
    from data_tools.command import app as data_app

    app.add_typer(data_app, name="data", help="Convert corpora to MDS shards and look at them.")


def main() -> None:
    """Entry point: run a command; report a failure once and leave with its exit code."""
    prepare_streams()
    prepare_environment()
    mount_data_tools()
    try:
        _check_current_directory()
        app(standalone_mode=True)
    except LostPeer as error:
        if str(error):
            _report(f"error: {error}")
        if os.environ["RANK"] == "0":
            # The store may be in this process, and ranks that noticed later still ask it who lives.
            time.sleep(ROLL_CALL_S)
        _leave_at_once(EXIT_FAILED)
    except Exception as error:
        mistake = _mistake(error)
        if mistake is None:
            _report_once(traceback.format_exc())
            _leave_at_once(EXIT_FAILED)
        _report_once(f"error: {mistake}")
        if "WORLD_SIZE" in os.environ:
            # A rank may have an engine, which Python's tidying up does not survive.
            _leave_at_once(EXIT_USER_ERROR)
        sys.exit(EXIT_USER_ERROR)
    finally:
        _flush()


def _check_current_directory() -> None:
    # Whatever asks for a relative path later would fail in words of its own, or wait for ever.
    try:
        os.getcwd()
    except OSError as error:
        what = f"cannot be found: {error.strerror}"
        raise UserError("current directory", what, "one that is there", "cd to another") from None


def _mistake(error: Exception) -> UserError | None:
    """The error as one of the user's or of the machine's, if it is one."""
    if isinstance(error, OSError):
        return file_problem(error)
    if "torch" in sys.modules or isinstance(error, MemoryError):
        from dualtrain.model.memory import is_out_of_memory

        if is_out_of_memory(error):
            what = f"ran out: {str(error).splitlines()[0] if str(error) else 'no more'}"
            return UserError("memory", what[:300], "more", "use smaller batches or a smaller model")
    return error if isinstance(error, UserError) else None


def _report_once(message: str) -> None:
    """Print an error unless another rank is about to print the same.

    Rank 0 speaks at once. The others wait a moment: whoever started the ranks ends them as soon as
    the first has left.
    """
    rank = os.environ.get("RANK", "0")  # as the launcher says; it may be what is wrong
    if rank != "0":
        time.sleep(PEER_GRACE_S)
    prefix = f"rank {rank}: " if rank != "0" else ""
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
