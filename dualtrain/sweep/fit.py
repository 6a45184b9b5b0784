"""``dualtrain fit``: the surface of a sweep, the best alpha on it, and the figures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from dualtrain.common.errors import UserError
from dualtrain.common.files import write_json
from dualtrain.common.formatting import counted
from dualtrain.evaluate.statistics import Estimate
from dualtrain.sweep import figures
from dualtrain.sweep.advice import FIT_FORMAT
from dualtrain.sweep.definition import in_words
from dualtrain.sweep.figures import Bar, Curves, Line, as_share
from dualtrain.sweep.intervals import ONE_SEED, over_seeds, paired
from dualtrain.sweep.reading import read_sweep
from dualtrain.sweep.results import (
    RunResult,
    choose_metric,
    finished,
    named,
    restrict,
    rises,
    setting,
    unit,
)
from dualtrain.sweep.surface import QUANTILES, SWAMPED, Best, Surface
from dualtrain.sweep.tables import new_table, show, with_interval

OWN_KEYS = ("repetitions", "alpha", "seed", "unique_tokens")
"""Keys that the fit itself is about, or that follow from them under one budget."""
CURVE_STEP = 0.25
"""Doublings of R between the points of the curve of the best alpha."""
AR, DIFFUSION = 1.0, 0.0
MAY_BE = 0.1
"""Share of posterior samples from which on an optimum at the border is mentioned."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asks for.

    Attributes:
        metric: As ``results`` names it.
        where: Conditions on points, as ``results.restrict`` takes them.
        out: Directory for the results; None: ``fit/METRIC`` in the sweep's.
    """

    directory: Path
    metric: str = "ar_nll"
    where: Sequence[str] = ()
    out: Path | None = None
    seed: int = 0
    figures: bool = True


@dataclass(frozen=True)
class Sample:
    """A run as the fit sees it."""

    run: RunResult
    repetitions: float
    alpha: float
    seed: int
    value: float


def fit_sweep(options: Options) -> dict[str, Any]:
    """Fit a sweep's surface, show what it says, and write JSON and figures.

    Returns:
        What ``fit.json`` holds.

    Raises:
        UserError: The directory is no sweep's or has no results, the metric is not there or not
            finite, points differ in more than repetitions, alpha and seed, or alphas are too few.
    """
    found = read_sweep(options.directory)
    keys, notes = found.keys, found.notes()
    metric = choose_metric(options.metric, found.runs)
    runs = finished(restrict(found.runs, keys, options.where), notes)
    _check_alike(runs, keys)
    samples = _samples(runs, metric)
    surface = Surface(
        [s.repetitions for s in samples],
        [s.alpha for s in samples],
        [s.value for s in samples],
        is_loss=not rises(metric),
        seed=options.seed,
    )
    sampled = sorted({s.repetitions for s in samples})
    bests = [surface.best(repetitions) for repetitions in sampled]
    curve = [surface.best(repetitions, samples=1000) for repetitions in _curve(sampled)]
    if len({s.seed for s in samples}) == 1:
        notes.append(ONE_SEED)
    result = {
        "format": FIT_FORMAT,
        "metric": metric,
        "is_loss": surface.is_loss,
        "sweep": str(options.directory),
        "where": list(options.where),
        "axes": {
            "repetitions": "log2(R)",
            "alpha": "log2((alpha + epsilon) / (1 - alpha + epsilon))",
            "epsilon": surface.epsilon,
            "metric": "log" if surface.is_log else "as it is",
        },
        "kernel": str(surface.kernel),
        "r_squared": surface.r_squared,
        "left_out": {"r_squared": surface.left_out_r_squared, "rmse": surface.left_out_error},
        "runs": [
            {
                "point": s.run.label,
                "repetitions": s.repetitions,
                "alpha": s.alpha,
                "seed": s.seed,
                "value": s.value,
            }
            for s in samples
        ],
        "best_alpha": {
            "sampled": [_best_json(best) for best in bests],
            "curve": [_best_json(best) for best in curve],
        },
        "single_objectives": [_against_single(samples, surface, r) for r in sampled],
        "notes": notes,
    }
    out = options.out or options.directory / "fit" / metric
    _make(out)
    written = _draw(out, samples, surface, curve, result) if options.figures else []
    # Last: who finds it finds the figures that belong to it.
    write_json(out / "fit.json", result)
    written.insert(0, out / "fit.json")
    _print(result)
    print("\nwritten:", *written, sep="\n  ")
    return result


def _check_alike(runs: list[RunResult], keys: list[str]) -> None:
    """Points of a surface differ in what its axes say, and in the seed."""
    budgets = Counter(run.steps[-1]["tokens"] for run in runs)
    if len(budgets) > 1:
        each = ", ".join(f"{n:,} ({counted(count, 'point')})" for n, count in budgets.items())
        raise UserError(
            "dualtrain fit",
            f"points were trained on different numbers of tokens: {each}",
            "the same training budget in every point",
            "choose points with --where",
        )
    differing: list[str] = []
    choice: list[str] = []
    for key in keys:
        counts = Counter(in_words(setting(run, key)) for run in runs)
        if key in OWN_KEYS or len(counts) == 1:
            continue
        each = ", ".join(f"{value} ({counted(count, 'point')})" for value, count in counts.items())
        differing.append(f"{key}: {each}")
        choice.append(f"--where '{key}={counts.most_common(1)[0][0]}'")
    if differing:
        raise UserError(
            "dualtrain fit",
            f"points differ in {'; in '.join(differing)}",
            "points of one recipe that differ in repetitions, alpha and seed",
            f"choose with {' '.join(choice)}",
        )


def _samples(runs: list[RunResult], metric: str) -> list[Sample]:
    without = [run.label for run in runs if run.metric(metric) is None]
    if without:
        raise UserError(
            "--metric",
            f"{metric} is not there, or not finite, in {named(without)}",
            "a finite number in every point",
            "evaluate these points, or leave them out with --where",
        )
    samples = []
    for run in runs:
        value = run.metric(metric)
        alpha = run.recipe.alpha
        if not isinstance(alpha, Fraction):
            raise UserError(
                str(run.directory), "alpha is a schedule", "a constant alpha in every point"
            )
        assert value is not None  # checked above
        samples.append(Sample(run, run.repetitions, float(alpha), run.recipe.seed, value))
    return samples


def _curve(sampled: Sequence[float]) -> list[float]:
    """Repetitions for the curve of the best alpha: the sampled ones, and some between."""
    between = np.exp2(np.arange(np.log2(sampled[0]), np.log2(sampled[-1]), CURVE_STEP))
    # The sampled ones as they are: who asks for one of them must find it.
    new = [float(r) for r in between if not np.isclose(r, sampled, rtol=1e-6).any()]
    return sorted([*sampled, *new])


def _best_json(best: Best) -> dict[str, Any]:
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
    if best.is_swamped:
        notes.append(
            f"{at} noise swamps alpha: it changes the metric by {best.effect:.2g} standard "
            f"deviations of a run's noise (below {SWAMPED:g})"
        )
    return {
        "repetitions": best.repetitions,
        "quantiles": {f"{q:g}": a for q, a in zip(QUANTILES, best.quantiles, strict=True)},
        "ar_passes": best.median * best.repetitions,
        "value": best.value,
        "at_border": best.at_border,
        "noise": best.noise,
        "effect_in_noise": best.effect,
        "notes": notes,
    }


def by_seed(samples: Iterable[Sample], repetitions: float, alpha: float) -> dict[int, float]:
    """The metric of each seed at one (R, alpha)."""
    return {s.seed: s.value for s in samples if s.repetitions == repetitions and s.alpha == alpha}


def _against_single(
    samples: Sequence[Sample], surface: Surface, repetitions: float
) -> dict[str, Any]:
    """Pure AR, pure diffusion, and the sampled mixture that the surface finds best, at one R."""
    found = sorted({s.alpha for s in samples if s.repetitions == repetitions})
    mixtures = np.array([alpha for alpha in found if alpha not in (AR, DIFFUSION)])
    entry: dict[str, Any] = {"repetitions": repetitions}
    values = {alpha: by_seed(samples, repetitions, alpha) for alpha in found}
    named = {"ar": AR, "diffusion": DIFFUSION}
    if len(mixtures):
        # By the surface rather than by the lowest mean, which would owe something to luck.
        means = surface.mean(np.full(len(mixtures), repetitions), mixtures)
        best = int(np.argmin(means) if surface.is_loss else np.argmax(means))
        named["mixture"] = float(mixtures[best])
    for name, alpha in named.items():
        if alpha in values:
            numbers = list(values[alpha].values())
            entry[name] = {
                "alpha": alpha,
                "value": float(np.mean(numbers)),
                "seeds": len(numbers),
                "interval": _interval(over_seeds(numbers)),
            }
    for name in ("ar", "diffusion"):
        if name in entry and "mixture" in entry:
            differences = paired(values[named["mixture"]], values[named[name]])
            if differences:
                entry[f"mixture_minus_{name}"] = {
                    "value": float(np.mean(differences)),
                    "seeds": len(differences),
                    "interval": _interval(over_seeds(differences)),
                }
    return entry


def _interval(estimate: Estimate | None) -> list[float] | None:
    return None if estimate is None else [estimate.low, estimate.high]


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"{out} cannot be made: {error.strerror}"
        raise UserError("--out", what, "a directory", "choose another place") from None


def _draw(
    out: Path,
    samples: Sequence[Sample],
    surface: Surface,
    curve: Sequence[Best],
    result: dict[str, Any],
) -> list[Path]:
    metric = unit(result["metric"])
    figure = figures.draw_surface(surface, curve, metric=metric)
    files = figures.save(figure, out, "surface")
    panels = _panels(samples, result["metric"])
    if panels:
        files += figures.save(figures.draw_curves(panels, metric=metric), out, "curves")
    groups = {
        f"R = {entry['repetitions']:g}": _bars(entry) for entry in result["single_objectives"]
    }
    better = "lower" if surface.is_loss else "higher"
    return files + figures.save(
        figures.draw_bars(groups, metric=metric, better=better), out, "objectives"
    )


def _bars(entry: dict[str, Any]) -> list[Bar]:
    labels = {
        "ar": "AR only (α = 1)",
        "mixture": "best mixture",
        "diffusion": "diffusion only (α = 0)",
    }
    bars = []
    for name, label in labels.items():
        if name in entry:
            interval, value = entry[name]["interval"], entry[name]["value"]
            bars.append(Bar(label, value, None if interval is None else tuple(interval)))
    return bars


def _panels(samples: Sequence[Sample], metric: str) -> dict[float, list[Curves]]:
    """The metric by step, for each R and alpha; empty where evaluations during runs lack it."""
    key = metric.removeprefix("best.")
    cells: dict[tuple[float, float], list[RunResult]] = defaultdict(list)
    for s in samples:
        cells[s.repetitions, s.alpha].append(s.run)
    panels: dict[float, list[Curves]] = defaultdict(list)
    for (repetitions, alpha), runs in sorted(cells.items()):
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


def _print(result: dict[str, Any]) -> None:
    digits = ".4f" if result["is_loss"] else ".2f"
    print(f"{result['metric']} of {len(result['runs'])} runs in {result['sweep']}")
    left_out = result["left_out"]
    of_what = " of log losses" if result["axes"]["metric"] == "log" else ""
    print(
        f"R² {result['r_squared']:.4f}{of_what}; with all runs of a point left out "
        f"{left_out['r_squared']:.4f}, error {left_out['rmse']:{digits}}"
    )
    print(f"kernel {result['kernel']}\n")
    best_alpha = ("best α", "5 %", "95 %", "AR passes")
    table = new_table("R", *best_alpha, "mixture", "mixture − AR", "mixture − diffusion")
    singles = {entry["repetitions"]: entry for entry in result["single_objectives"]}
    for best in result["best_alpha"]["sampled"]:
        entry, quantiles = singles[best["repetitions"]], best["quantiles"]
        table.add_row(
            f"{best['repetitions']:g}",
            *(f"{quantiles[q]:.3g}" for q in ("0.5", "0.05", "0.95")),
            f"{best['ar_passes']:.3g}",
            as_share(entry["mixture"]["alpha"]) if "mixture" in entry else "-",
            *(
                _difference(entry.get(f"mixture_minus_{name}"), digits)
                for name in ("ar", "diffusion")
            ),
        )
    notes = [note for best in result["best_alpha"]["sampled"] for note in best["notes"]]
    show(table, [*result["notes"], *notes])


def _difference(entry: dict[str, Any] | None, digits: str) -> str:
    if entry is None:
        return "-"
    text = with_interval(entry["value"], entry["interval"], f"+{digits}")
    return text if entry["interval"] is not None else f"{text} (one seed)"
