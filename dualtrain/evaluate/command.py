"""``dualtrain eval``: its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dualtrain.common.options import Device, Precision, Step
from dualtrain.evaluate.request import MOST_ELBO_SAMPLES

MOST_TOKENS = 2**24
"""Tokens of a forward pass that anybody could want."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """The command line of ``dualtrain eval``."""

    path: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run, a checkpoint, or an exported model.")
    ]
    all_models: Annotated[
        bool,
        typer.Option(
            "--all", help="Every model in the directory RUN; same results are not made twice."
        ),
    ] = False
    tasks: Annotated[
        str | None,
        typer.Option(help="Names with commas, `all`, or `none`; default: those with data."),
    ] = None
    modes: Annotated[
        str | None,
        typer.Option(
            "--mode",
            help="Some of ar, prefix, pll, chain, elbo; default: what it was trained for.",
        ),
    ] = None
    tasks_dir: Annotated[
        Path | None, typer.Option(help="Data of tasks, and YAML files of your own tasks.")
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items of a task, evenly spread; default: all.")
    ] = None
    data: Annotated[
        Path | None, typer.Option(help="Dataset with the held-out text; default: the run's.")
    ] = None
    sequences: Annotated[
        int | None,
        typer.Option(min=0, help="Held-out sequences; 0: none; default: as in the recipe."),
    ] = None
    out: Annotated[
        Path | None, typer.Option(help="Directory to make; default: RUN/eval/CHECKPOINT.")
    ] = None
    step: Step = None
    device: Device = None
    precision: Precision = None
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_TOKENS, help="Tokens of a forward pass; default: by memory."),
    ] = None
    elbo_samples: Annotated[
        int,
        typer.Option(min=1, max=MOST_ELBO_SAMPLES, help="Masks for each answer in the mode elbo."),
    ] = 32
    seed: Annotated[int, typer.Option(help="Decides masks and intervals.")] = 0


def evaluate(options: EvalOptions) -> int:
    """Find held-out losses and scores on zero-shot tasks of a trained model."""
    if options.all_models:
        from dualtrain.evaluate.many import evaluate_all

        return evaluate_all(options)
    from dualtrain.evaluate.evaluate import evaluate_model

    evaluate_model(options)
    return 0
