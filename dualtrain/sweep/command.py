"""``dualtrain sweep``, ``fit``, ``alpha`` and ``compare``: their options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from dualtrain.common.options import Device

LARGEST_SEED = 2**32 - 1
PAPER_SLOTS = 256
"""Devices of the paper's runs, each of which has one objective in a step."""

Where = Annotated[
    list[str],
    typer.Option(metavar="KEY=VALUE", help="Only points with this value; may be repeated."),
]


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The command line of ``dualtrain sweep``."""

    file: Annotated[
        str, typer.Argument(metavar="SWEEP", help="A recipe with a `sweep:` section, or its name.")
    ]
    overrides: Annotated[
        list[str],
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe of all points."),
    ] = field(default_factory=list)
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the points go; default: sweeps/NAME.")
    ] = None
    parallel: Annotated[
        int, typer.Option(min=1, help="Points at once; GPUs and cores are divided among them.")
    ] = 1
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes of a point, as for `dualtrain run`.")
    ] = None
    index: Annotated[
        int | None, typer.Option(help="Only this point: $SLURM_ARRAY_TASK_ID, for one.")
    ] = None
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Only the points I, I + N, I + 2 N and so on."),
    ] = None
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try points again that failed before.")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the points with tokens and estimated time.")
    ] = False
    plain: Annotated[
        bool, typer.Option("--plain", help="Lines instead of the live table, also on a terminal.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The command line of ``dualtrain fit``."""

    directory: Annotated[
        Path, typer.Argument(metavar="SWEEP_DIR", help="A sweep, or models evaluated with --all.")
    ]
    metric: Annotated[
        str, typer.Option(help="What to fit: ar_nll, diffusion_nll, best.ar_nll, ar.blimp, ...")
    ] = "ar_nll"
    where: Where = field(default_factory=list)
    out: Annotated[
        Path | None, typer.Option(help="Directory for the results; default: SWEEP_DIR/fit/METRIC.")
    ] = None
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Decides restarts and posterior samples.")
    ] = 0
    no_figures: Annotated[bool, typer.Option("--no-figures", help="Only fit.json.")] = False


@dataclass(frozen=True, kw_only=True)
class AlphaOptions:
    """The command line of ``dualtrain alpha``."""

    repetitions: Annotated[float, typer.Option(help="Passes over the unique tokens.")]
    fit: Annotated[
        Path | None, typer.Option(help="A fit.json of `dualtrain fit`; default: the paper's rules.")
    ] = None
    slots: Annotated[
        int, typer.Option(min=1, help="Micro-batches in a step, global_batch / micro_batch.")
    ] = PAPER_SLOTS


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The command line of ``dualtrain compare``: of any runs, or of the points of one sweep."""

    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Directories of runs, or of one sweep.")
    ]
    metric: Annotated[
        list[str],
        typer.Option(help="What points of a sweep are compared by; repeatable; default: ar_nll."),
    ] = field(default_factory=list)
    where: Where = field(default_factory=list)
    to: Annotated[
        list[str],
        typer.Option(metavar="KEY=VALUE", help="Points that a sweep's others are compared with."),
    ] = field(default_factory=list)
    sequences: Annotated[
        int | None,
        typer.Option(
            min=0, help="Held-out sequences for intervals; 0: none; default: some 30 documents."
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory to make; default: a new one in comparisons/; of a sweep none."
        ),
    ] = None
    device: Device = None
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=LARGEST_SEED, help="Decides masks and bootstrap; default: 0."),
    ] = None


def sweep(options: SweepOptions) -> int:
    """Train every point of a grid; the same command skips what is finished and goes on."""
    from dualtrain.sweep.run import run_sweep

    return run_sweep(options)


def fit(options: FitOptions) -> None:
    """Fit a Gaussian process to a sweep: the surface over repetitions and alpha, the best alpha."""
    from dualtrain.sweep.fit import fit_sweep

    fit_sweep(options)


def alpha(options: AlphaOptions) -> None:
    """Say which alpha to train with, and what of it some slots realise."""
    from dualtrain.sweep.advice import by_fit, by_rules

    repetitions = options.repetitions
    advice = by_rules(repetitions) if options.fit is None else by_fit(options.fit, repetitions)
    typer.echo("\n".join(advice.lines(options.slots)))


def compare(options: CompareOptions) -> None:
    """Compare runs: losses, AR passes, speed, tasks, and intervals over held-out documents.

    Of a sweep: points that differ in more than the seed, with intervals over seeds.
    """
    from dualtrain.sweep.directory import is_sweep

    if len(options.runs) == 1 and is_sweep(options.runs[0]):
        from dualtrain.sweep.groups import compare_groups

        compare_groups(options)
    else:
        from dualtrain.sweep.compare import compare_runs

        compare_runs(options)
