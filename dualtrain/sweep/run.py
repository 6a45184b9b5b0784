"""``dualtrain sweep``: every point of a sweep, each once; checks first, then runs, then a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dualtrain.common import formatting
from dualtrain.common.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_SAVED_AFTER_SIGNAL,
    UserError,
    raise_together,
)
from dualtrain.common.files import write_text
from dualtrain.data.corpus import read_corpus
from dualtrain.derived.derive import derive
from dualtrain.launch.world import launched_ranks
from dualtrain.recipe.schema import Recipe
from dualtrain.sweep.definition import cell, load_sweep
from dualtrain.sweep.directory import OUTCOME, check, prepare
from dualtrain.sweep.output import new_table, show
from dualtrain.sweep.plan import choose_points, print_plan
from dualtrain.sweep.reading import read_sweep
from dualtrain.sweep.results import named, setting, table_text
from dualtrain.sweep.runner import Runner
from dualtrain.sweep.view import SweepView
from dualtrain.training.dataset import build_missing_dataset, check_dataset, missing_dataset
from dualtrain.training.start import examine

if TYPE_CHECKING:
    from dualtrain.sweep.command import SweepOptions

TABLE = "results.csv"
TABLE_METRICS = ("ar_nll", "best.ar_nll", "diffusion_nll", "prefix_nll", "prefix_minus_ar")


def run_sweep(options: SweepOptions) -> int:
    """Run what is left of a sweep, and show the results; returns the exit code.

    Raises:
        UserError: for all that can be refused before the first point starts.
    """
    if launched_ranks(os.environ) > 1:
        raise UserError(
            "dualtrain sweep",
            "was started by a launcher of ranks",
            "one process, which starts the ranks of each point itself",
            "in a batch script call it without srun",
        )
    sweep = load_sweep(options.file, options.overrides, directory=options.directory)
    points = choose_points(sweep, index=options.index, shard=options.shard)
    recipes = [point.loaded.recipe for point in points]
    _examine(recipes, options.ranks)
    check(sweep)
    datasets = {recipe.data.path: recipe for recipe in recipes}.values()
    missing = [problem for recipe in datasets if (problem := missing_dataset(recipe))]
    if options.dry_run:
        print_plan(sweep, points, options)
        for problem in missing:
            print(f"warning: {problem}; this machine will refuse the sweep")
        return EXIT_DONE
    raise_together(missing)
    # Once, before points that run at once would wait for it.
    for recipe in datasets:
        build_missing_dataset(recipe)
    for recipe in recipes:
        derive(recipe, corpus=read_corpus(recipe), world_size=options.ranks)
    prepare(sweep)
    with SweepView(sweep.keys, plain=options.plain) as view:
        runner = Runner(
            points,
            parallel=options.parallel,
            ranks=options.ranks,
            devices=find_devices(),
            retry_failed=options.retry_failed,
            on_change=view.change,
            on_poll=view.poll,
        )
        view.say(f"{sweep.source}: {formatting.counted(len(points), 'point')} in {sweep.directory}")
        view.start(runner.jobs)
        runner.run()
    print_results(sweep.directory)
    return _summary(runner)


def _examine(recipes: Sequence[Recipe], ranks: int | None) -> None:
    """Refuse what any of the points would refuse, as far as that can be told without a dataset."""
    own = {"name", "run_dir", "seed", "alpha", "steps", "unique_tokens", "repetitions"}
    for recipe in {recipe.model_dump_json(exclude=own): recipe for recipe in recipes}.values():
        examine(recipe, ranks)
        check_dataset(recipe)
    for recipe in recipes:
        corpus = read_corpus(recipe)
        if corpus is not None or recipe.unique_tokens != "all":
            derive(recipe, corpus=corpus, world_size=ranks)


def _summary(runner: Runner) -> int:
    """Say what a reader of the table should know; returns the exit code."""

    def labels(state: str) -> str:
        return named([job.point.label for job in runner.jobs if job.state == state])

    if elsewhere := labels("elsewhere"):
        print(f"left to the processes that run them: {elsewhere}")
    if failed := labels("failed"):
        print(f"failed: {failed}")
        print(f"each has the reason in its {OUTCOME}; --retry-failed tries them again")
    stopped = labels("stopped")
    if runner.is_stopping or stopped:
        print(f"stopped by a signal{': ' * bool(stopped)}{stopped}; the same command goes on")
        return EXIT_SAVED_AFTER_SIGNAL
    return EXIT_FAILED if failed else EXIT_DONE


def find_devices() -> list[str]:
    """The CUDA devices of this process, as ``CUDA_VISIBLE_DEVICES`` names them."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:
        return [name.strip() for name in asked.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def print_results(directory: Path) -> None:
    """Show the points that have ended, and write ``results.csv``."""
    found = read_sweep(directory)
    keys, runs = found.keys, found.runs
    known = [m for m in TABLE_METRICS if any(m in run.metrics for run in runs)]
    write_text(directory / TABLE, table_text(keys, runs, known))
    table = new_table(*keys, "state", *known)
    for run in runs:
        numbers = [run.metrics.get(metric) for metric in known]
        table.add_row(
            *(cell(setting(run, key)) for key in keys),
            run.state,
            *("-" if number is None else f"{number:.4f}" for number in numbers),
        )
    print()
    show(table, [f"not begun, or gone: {named(found.absent)}"] if found.absent else [])
    print(f"\nwritten: {directory / TABLE}")
