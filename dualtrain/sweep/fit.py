"""``dualtrain fit``: the surface of a sweep, the best alpha on it, and the figures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualtrain.common.errors import UserError
from dualtrain.common.files import write_json
from dualtrain.common.formatting import counted
from dualtrain.progress.trackers.writer import send_figures
from dualtrain.sweep import figures
from dualtrain.sweep.figures import Curves, Line, MeanBar, as_share
from dualtrain.sweep.fit_file import (
    Axes,
    BestAlpha,
    BestAlphas,
    Fit,
    FittedRun,
    LeftOut,
    SeedMean,
    SingleObjectives,
)
from dualtrain.sweep.intervals import ONE_SEED, over_seeds, paired
from dualtrain.sweep.output import make_directory, new_table, show, with_interval
from dualtrain.sweep.reading import read_sweep
from dualtrain.sweep.results import (
    RunResult,
    choose_metric,
    differing,
    finished,
    named,
    restrict,
    rises,
    unit,
)
from dualtrain.sweep.surface import QUANTILES, SWAMPED, Best, Surface

if TYPE_CHECKING:
    from dualtrain.sweep.command import FitOptions

OWN_KEYS = ("repetitions", "alpha", "seed", "unique_tokens")
"""Keys that the fit itself is about, or that follow from them under one budget."""
CURVE_STEP = 0.25
"""Doublings of R between the points of the curve of the best alpha."""
AR, DIFFUSION = 1.0, 0.0
MAY_BE = 0.1
"""Share of posterior samples from which on an optimum at the border is mentioned."""


def fit_sweep(options: FitOptions) -> Fit:
    """Fit a sweep's surface, show what it says, and write JSON and figures.

    Raises:
        UserError: The directory is no sweep's or has no results, the metric is not there or not
            finite, points differ in more than repetitions, alpha and seed, or alphas are too few.
    """
    found = read_sweep(options.directory)
    notes = found.notes()
    metric = choose_metric(options.metric, found.runs)
    results = finished(restrict(found.runs, found.keys, options.where), notes)
    _check_alike(results, found.keys)
    runs = _fitted_runs(results, metric)
    surface = Surface(
        [run.repetitions for run in runs],
        [run.alpha for run in runs],
        [run.value for run in runs],
        is_loss=not rises(metric),
        seed=options.seed,
    )
    sampled = sorted({run.repetitions for run in runs})
    curve = [surface.best(repetitions, samples=1000) for repetitions in _curve(sampled)]
    if len({run.seed for run in runs}) == 1:
        notes.append(ONE_SEED)
    fit = Fit(
        metric=metric,
        is_loss=surface.is_loss,
        sweep=str(options.directory),
        where=options.where,
        axes=Axes(epsilon=surface.epsilon, metric="log" if surface.is_log else "as it is"),
        kernel=str(surface.kernel),
        r_squared=surface.r_squared,
        left_out=LeftOut(r_squared=surface.left_out_r_squared, rmse=surface.left_out_error),
        runs=runs,
        best_alpha=BestAlphas(
            sampled=[describe(surface.best(repetitions)) for repetitions in sampled],
            curve=[describe(best) for best in curve],
        ),
        single_objectives=[_against_single(runs, surface, r) for r in sampled],
        notes=notes,
    )
    out = options.out or options.directory / "fit" / metric
    make_directory(out, may_exist=True)
    drawn = [] if options.no_figures else _draw(out, fit, results, surface, curve)
    # Last: who finds it finds the figures that belong to it.
    write_json(out / "fit.json", fit.model_dump())
    if drawn:
        _track(results, out, drawn, fit)
    _print(fit)
    print("\nwritten:", out / "fit.json", *drawn, sep="\n  ")
    return fit


def _track(results: Sequence[RunResult], out: Path, drawn: Sequence[Path], fit: Fit) -> None:
    """Give the figures to the trackers that the runs had."""
    trackers = [*dict.fromkeys(name for run in results for name in run.trackers)]
    name = f"{Path(fit.sweep).resolve().name} {fit.metric}"
    config = {"sweep": fit.sweep, "metric": fit.metric, "where": fit.where}
    fit.notes.extend(send_figures(trackers, name, out, drawn, config))


def _check_alike(runs: list[RunResult], keys: list[str]) -> None:
    """Points of a surface differ in what its axes say, and in the seed."""
    budgets = Counter(run.steps[-1]["tokens"] for run in runs if run.steps)
    if len(budgets) > 1:
        each = ", ".join(f"{n:,} ({counted(count, 'point')})" for n, count in budgets.items())
        raise UserError(
            "dualtrain fit",
            f"points were trained on different numbers of tokens: {each}",
            "the same training budget in every point",
            "choose points with --where",
        )
    different = differing(runs, [key for key in keys if key not in OWN_KEYS])
    if different:
        values = {
            key: ", ".join(f"{value} ({counted(n, 'point')})" for value, n in counts.items())
            for key, counts in different.items()
        }
        choice = (f"--where '{k}={c.most_common(1)[0][0]}'" for k, c in different.items())
        raise UserError(
            "dualtrain fit",
            f"points differ in {'; in '.join(f'{key}: {each}' for key, each in values.items())}",
            "points of one recipe that differ in repetitions, alpha and seed",
            f"choose with {' '.join(choice)}",
        )


def _fitted_runs(runs: Sequence[RunResult], metric: str) -> list[FittedRun]:
    without = [run.label for run in runs if metric not in run.metrics]
    if without:
        raise UserError(
            "--metric",
            f"{metric} is not there, or not finite, in {named(without)}",
            "a finite number in every point",
            "evaluate these points, or leave them out with --where",
        )
    fitted = []
    for run in runs:
        alpha = run.recipe.alpha
        if not isinstance(alpha, Fraction):
            what = "alpha is a schedule"
            raise UserError(str(run.directory), what, "a constant alpha in every point")
        fitted.append(
            FittedRun(
                point=run.label,
                repetitions=run.repetitions,
                alpha=float(alpha),
                seed=run.recipe.seed,
                value=run.metrics[metric],
            )
        )
    return fitted


def _curve(sampled: Sequence[float]) -> list[float]:
    """Repetitions for the curve of the best alpha: the sampled ones, and some between."""
    between = np.exp2(np.arange(np.log2(sampled[0]), np.log2(sampled[-1]), CURVE_STEP))
    # The sampled ones as they are: who asks for one of them must find it.
    new = [float(r) for r in between if not np.isclose(r, sampled, rtol=1e-6).any()]
    return sorted([*sampled, *new])


def describe(best: Best) -> BestAlpha:
    """A best alpha as ``fit.json`` has it, with what is to be said about it."""
    notes = []
    at = f"at {counted(best.repetitions, 'repetition')}"
    if best.at_border == "lowest" and best.median > 0:
        notes.append(f"{at} the best alpha is the lowest sampled: lower ones may be better")
    if best.at_border == "highest" and best.median < 1:
        notes.append(f"{at} the best alpha is the highest sampled: higher ones may be better")
    if best.at_border is not None and best.median in (0.0, 1.0):
        notes.append(f"{at} a single objective is best: the optimum is at the border of [0, 1]")
    if best.at_border is None:
        for alpha in best.ends:
            share = float((best.samples == alpha).mean())
            if share >= MAY_BE:
                notes.append(
                    f"{at} the optimum may be at the border, alpha {alpha:g}: it is there in "
                    f"{share:.0%} of the posterior samples"
                )
    if best.effect < SWAMPED:
        notes.append(
            f"{at} noise swamps alpha: it changes the metric by {best.effect:.2g} standard "
            f"deviations of a run's noise (below {SWAMPED:g})"
        )
    return BestAlpha(
        repetitions=best.repetitions,
        quantiles={f"{q:g}": a for q, a in zip(QUANTILES, best.quantiles, strict=True)},
        ar_passes=best.median * best.repetitions,
        value=best.value,
        at_border=best.at_border,
        noise=best.noise,
        effect_in_noise=best.effect,
        notes=notes,
    )


def _against_single(
    runs: Sequence[FittedRun], surface: Surface, repetitions: float
) -> SingleObjectives:
    """Pure AR, pure diffusion, and the sampled mixture that the surface finds best, at one R."""
    by_seed: dict[float, dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run.repetitions == repetitions:
            by_seed[run.alpha][run.seed] = run.value
    mixtures = np.array(sorted(by_seed.keys() - {AR, DIFFUSION}))
    alphas = {"ar": AR, "diffusion": DIFFUSION}
    if len(mixtures):
        # By the surface rather than by the lowest mean, which would owe something to luck.
        means = surface.mean(np.full(len(mixtures), repetitions), mixtures)
        best = int(np.argmin(means) if surface.is_loss else np.argmax(means))
        alphas["mixture"] = float(mixtures[best])
    found = {
        name: _seed_mean(list(by_seed[alpha].values()), alpha)
        for name, alpha in alphas.items()
        if alpha in by_seed
    }
    for name in ("ar", "diffusion"):
        if name in found and "mixture" in found:
            differences = paired(by_seed[alphas["mixture"]], by_seed[alphas[name]])
            if differences:
                found[f"mixture_minus_{name}"] = _seed_mean(differences)
    return SingleObjectives(repetitions=repetitions, **found)


def _seed_mean(values: Sequence[float], alpha: float | None = None) -> SeedMean:
    mean = over_seeds(values)
    return SeedMean(
        alpha=alpha,
        value=float(np.mean(values)),
        seeds=len(values),
        interval=None if mean is None else [mean.low, mean.high],
    )


def _draw(
    out: Path,
    fit: Fit,
    results: Sequence[RunResult],
    surface: Surface,
    curve: Sequence[Best],
) -> list[Path]:
    metric = unit(fit.metric)
    files = figures.save(figures.draw_surface(surface, curve, metric=metric), out, "surface")
    panels = _panels(fit, results)
    if panels:
        files += figures.save(figures.draw_curves(panels, metric=metric), out, "curves")
    groups = {f"R = {entry.repetitions:g}": _bars(entry) for entry in fit.single_objectives}
    better = "lower" if fit.is_loss else "higher"
    bars = figures.draw_bars(groups, metric=metric, better=better)
    return files + figures.save(bars, out, "objectives")


def _bars(entry: SingleObjectives) -> list[MeanBar]:
    labels = {
        "AR only (α = 1)": entry.ar,
        "best mixture": entry.mixture,
        "diffusion only (α = 0)": entry.diffusion,
    }
    return [MeanBar(label, mean.value, mean.interval) for label, mean in labels.items() if mean]


def _panels(fit: Fit, results: Sequence[RunResult]) -> dict[float, list[Curves]]:
    """The metric by step, for each R and alpha; empty where evaluations during runs lack it."""
    key = fit.metric.removeprefix("best.")
    cells: dict[tuple[float, float], list[RunResult]] = defaultdict(list)
    for run, result in zip(fit.runs, results, strict=True):
        cells[run.repetitions, run.alpha].append(result)
    panels: dict[float, list[Curves]] = defaultdict(list)
    for (repetitions, alpha), runs in sorted(cells.items(), key=lambda item: item[0]):
        held_out = line_of([run.evals for run in runs], key)
        if held_out is not None:
            trained = line_of([run.steps for run in runs], "ar_loss") if key == "ar_nll" else None
            panels[repetitions].append(Curves(alpha, held_out, trained))
    return panels


def line_of(histories: Sequence[Sequence[dict[str, Any]]], key: str) -> Line | None:
    """A number of records by step over several runs; None where it is not there."""
    found = [{r["step"]: r[key] for r in h if r.get(key) is not None} for h in histories]
    steps = sorted(set.intersection(*(set(f) for f in found))) if found else []
    if not steps:
        return None
    values = np.array([[f[step] for step in steps] for f in found])
    return Line(np.array(steps, dtype=float), values.mean(0), values.min(0), values.max(0))


def _print(fit: Fit) -> None:
    digits = ".4f" if fit.is_loss else ".2f"
    of_what = " of log losses" if fit.axes.metric == "log" else ""
    print(f"{fit.metric} of {len(fit.runs)} runs in {fit.sweep}")
    print(
        f"R² {fit.r_squared:.4f}{of_what}; with all runs of a point left out "
        f"{fit.left_out.r_squared:.4f}, error {fit.left_out.rmse:{digits}}"
    )
    print(f"kernel {fit.kernel}\n")
    best_alpha = ("best α", "5 %", "95 %", "AR passes")
    table = new_table("R", *best_alpha, "mixture", "mixture − AR", "mixture − diffusion")
    for best, single in zip(fit.best_alpha.sampled, fit.single_objectives, strict=True):
        mixture = single.mixture
        table.add_row(
            f"{best.repetitions:g}",
            *(f"{best.quantiles[q]:.3g}" for q in ("0.5", "0.05", "0.95")),
            f"{best.ar_passes:.3g}",
            "-" if mixture is None or mixture.alpha is None else as_share(mixture.alpha),
            _difference(single.mixture_minus_ar, digits),
            _difference(single.mixture_minus_diffusion, digits),
        )
    show(table, [*fit.notes, *(note for best in fit.best_alpha.sampled for note in best.notes)])


def _difference(mean: SeedMean | None, digits: str) -> str:
    if mean is None:
        return "-"
    text = with_interval(mean.value, mean.interval, f"+{digits}")
    return text if mean.interval is not None else f"{text} (one seed)"
