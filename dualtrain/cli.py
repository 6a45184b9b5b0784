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
        if loaded.recipe.eval.tasks:
            from dualtrain.evaluate.in_training import read_tasks

            read_tasks(loaded.recipe.eval)
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
def export(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or one of its checkpoints.")],
    to: Annotated[Path, typer.Option("--to", help="A new or empty directory.")],
    step: Annotated[
        int | None, typer.Option(help="Of a run, the checkpoint of this step; default: the newest.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="fp32|bf16", help="Precision of the exported weights.")
    ] = "fp32",
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest file of weights, such as 500MB.")
    ] = "5GB",
) -> None:
    """Write a model as a directory for transformers: weights, tokenizer and model card."""
    from dualtrain.export import export_checkpoint

    exported = export_checkpoint(
        path,
        to=to,
        step=step,
        precision=dtype,
        max_shard_size=max_shard_size,
        on_note=lambda note: typer.echo(f"note: {note}", err=True),
    )
    typer.echo("\n".join(exported.lines()))


@app.command()
def generate(
    path: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory, a checkpoint, or an export.")
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to continue, or a text with gaps: 'The <mask:8> sat'. Default: a new text."
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="ar|prefix|diffusion", help="Default: diffusion if there are gaps, else ar."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Of a text, at most; default: 64.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token; default: 0.8.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest that together have probability p.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Of tokens the text has already; ar and prefix; 1: none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same text.")] = 0,
    samples: Annotated[int, typer.Option(help="Texts for each prompt.")] = 1,
    steps: Annotated[
        int | None, typer.Option(help="Diffusion: passes for a text; default: one a token.")
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            metavar="confidence|random|left_to_right",
            help="Diffusion: which masks are filled first; default: confidence.",
        ),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(help="Diffusion: tokens in a block, blocks one after another; default: all."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Prompts: one a line, or .jsonl with a `prompt` a line.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the texts to this file, as JSON lines.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Of a run, the checkpoint of this step; default: the newest.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda", help="Default: a GPU if there is one.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="fp32|bf16", help="Default: fp32 on a CPU, else the run's."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Texts at once, at most.")] = 16,
    plain: Annotated[
        bool, typer.Option("--plain", help="Finished texts only, also on a terminal.")
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Diffusion: a line for each step.")
    ] = False,
) -> None:
    """Generate text: from left to right, behind a prompt read bidirectionally, or into gaps."""
    from dualtrain.generate.command import Request, generate
    from dualtrain.generate.settings import Wishes

    generate(
        Request(path, prompt, file, out, step, device, precision, batch, plain, trace),
        Wishes(
            mode=mode,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            samples=samples,
            steps=steps,
            order=order,
            block=block,
        ),
    )


@app.command("eval")
def evaluate(
    path: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, a checkpoint, or an exported model.")
    ],
    tasks: Annotated[
        str | None,
        typer.Option(help="Names with commas, `all`, or `none`; default: those with data."),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="Of ar, prefix, pll, chain, elbo; default: what it was trained for."),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="Data of tasks, and YAML files of your own tasks.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items of a task, evenly spread; default: all.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Dataset with the held-out text; default: the run's.")
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(min=0, help="Held-out sequences; 0: none; default: as in the recipe."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to make; default: RUN/eval/CHECKPOINT.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of a run; default: newest.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1; default: a GPU if there is one.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or bf16; default: fp32 on a CPU, else the run's.")
    ] = None,
    tokens_per_batch: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a forward pass; default: by memory.")
    ] = None,
    elbo_samples: Annotated[
        int, typer.Option(min=1, help="Masks for each answer in the mode elbo.")
    ] = 32,
    seed: Annotated[int, typer.Option(help="Of masks and of intervals.")] = 0,
) -> None:
    """Held-out losses and zero-shot tasks of a trained model."""
    from dualtrain.evaluate.command import Options
    from dualtrain.evaluate.command import evaluate as run_evaluation

    run_evaluation(
        Options(
            path=path,
            step=step,
            tasks=tasks,
            modes=mode,
            tasks_dir=tasks_dir,
            limit=limit,
            data=data,
            sequences=sequences,
            out=out,
            device=device,
            precision=precision,
            tokens_per_batch=tokens_per_batch,
            elbo_samples=elbo_samples,
            seed=seed,
        )
    )


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
