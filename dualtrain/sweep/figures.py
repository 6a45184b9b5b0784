"""All figures of ``fit`` and ``compare``: PNG to look at, SVG for a paper.

Colours are those of Okabe and Ito, or cividis and viridis where a colour stands for a number: all
can be told apart with any colour vision. Every figure is drawn without a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dualtrain.common.files import write_bytes
from dualtrain.common.formatting import counted
from dualtrain.sweep.advice import BEST_PASSES, FEW, FEW_ALPHA, LEAST_PASSES, MANY, MOST_PASSES
from dualtrain.sweep.surface import GRID, Best, Floats, Surface

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
DASHES = ("-", "--", ":", "-.")
NUMBERS, SHARES = "cividis", "viridis"
DPI = 150
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "dualtrain",
}


@dataclass(frozen=True)
class Line:
    """A metric over N numbers of steps: mean, least and greatest over seeds, each (N,)."""

    steps: Floats
    mean: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Curves:
    """What one alpha did at one R: held-out and training loss."""

    alpha: float
    held_out: Line
    training: Line | None


@dataclass(frozen=True)
class MeanBar:
    """A bar with the ends of its interval; None where a single seed gives none."""

    label: str
    value: float
    interval: Sequence[float] | None


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG; returns the files.

    Raises:
        UserError: They cannot be written.
    """
    FigureCanvasAgg(figure)
    files = [directory / f"{name}.{kind}" for kind in ("png", "svg")]
    with rc_context(STYLE):
        for file in files:
            content, kind = BytesIO(), file.suffix[1:]
            # Without the date, so that equal figures are equal files.
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(content, format=kind, dpi=DPI, metadata=metadata, bbox_inches="tight")
            write_bytes(file, content.getvalue())
    return files


def draw_surface(surface: Surface, bests: Sequence[Best], *, metric: str) -> Figure:
    """The surface with the runs; under it the best alpha's distribution and the paper's rules.

    Args:
        bests: Of a fine grid of repetitions, in order.
        metric: Name of the metric, with its unit.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 7.6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        _paint_surface(figure, above, surface, metric)
        _paint_best(figure, below, surface, bests)
        below.set_xlabel("repetitions of the unique tokens (log scale)")
        ticks = np.unique(np.log2(surface.repetitions))
        below.set_xticks(ticks, [f"{2**t:g}" for t in ticks])
    return figure


def draw_curves(panels: Mapping[float, Sequence[Curves]], *, metric: str) -> Figure:
    """Held-out and training loss by step, a panel for each R and a colour for each alpha."""
    alphas = sorted({curve.alpha for curves in panels.values() for curve in curves})
    shades = colormaps[SHARES](np.linspace(0, 0.9, len(alphas)))
    colours = dict(zip(alphas, shades, strict=True))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 3.0 * columns, 0.8 + 2.5 * rows), layout="constrained")
        # Each panel has its own range: what sets the curves of a single pass apart would be lost
        # beside a divergence.
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for axes, (repetitions, curves) in zip(grid, panels.items(), strict=False):
            for curve in curves:
                colour, line = colours[curve.alpha], curve.held_out
                axes.plot(line.steps, line.mean, color=colour, linewidth=1.5)
                axes.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.2)
                if curve.training is not None:
                    trained = curve.training
                    axes.plot(trained.steps, trained.mean, color=colour, lw=0.8, ls=":")
            axes.set_title(counted(repetitions, "repetition"), fontsize=9)
            axes.tick_params(axis="y", labelsize=7)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel("optimizer updates", fontsize=9)
        figure.supylabel(metric, fontsize=9)
        handles = [
            grid[0].plot([], [], color=colours[alpha], label=f"α = {as_share(alpha)}")[0]
            for alpha in alphas
        ]
        handles.append(grid[0].plot([], [], color="0.4", label="held-out, mean")[0])
        curves = [curve for found in panels.values() for curve in found]
        if any((curve.held_out.low < curve.held_out.high).any() for curve in curves):
            handles.append(Patch(color="0.4", alpha=0.2, label="range of seeds"))
        if any(curve.training is not None for curve in curves):
            handles.append(
                grid[0].plot([], [], color="0.4", ls=":", lw=0.8, label="training, AR")[0]
            )
        figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def draw_bars(groups: Mapping[str, Sequence[MeanBar]], *, metric: str, better: str) -> Figure:
    """Groups of bars with 95 % intervals, such as one for each R.

    Args:
        groups: Bars by the name of their group; the same labels have the same colour.
        metric: Name of the metric, with its unit.
        better: ``lower`` or ``higher``.
    """
    labels = list(dict.fromkeys(bar.label for bars in groups.values() for bar in bars))
    colours = {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(labels)}
    width = 0.8 / max(len(bars) for bars in groups.values())
    with rc_context(STYLE):
        size = (max(4.0, 1.5 + 1.1 * len(groups)) + 1.5, 3.4)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for place, bars in enumerate(groups.values()):
            for number, bar in enumerate(bars):
                x = place + (number - (len(bars) - 1) / 2) * width
                axes.bar(x, bar.value, width * 0.92, color=colours[bar.label])
                if bar.interval is not None:
                    low, high = bar.interval
                    ends = [[bar.value - low], [high - bar.value]]
                    axes.errorbar(x, bar.value, ends, color="black", lw=1, capsize=2)
        axes.set_xticks(range(len(groups)), list(groups))
        handles = [axes.bar(0, 0, color=colours[label], label=label) for label in labels]
        figure.legend(handles=handles, loc="outside right upper", fontsize=8)
        values = [bar.value for bars in groups.values() for bar in bars]
        note = f"{better} is better"
        if min(values) > 0 and better == "lower":
            # Losses lie far from 0, which says nothing about them.
            spread = max(values) - min(values) or max(values) * 0.1
            floor = max(0.0, min(values) - 0.25 * spread)
            axes.set_ylim(floor, None)
            note += "; the axis begins above 0" * (floor > 0)
        axes.set_ylabel(f"{metric}\n({note})")
    return figure


def draw_runs(lines: Mapping[str, Mapping[str, Line]], *, metrics: Sequence[str]) -> Figure:
    """Metrics of some runs over training, a panel for each metric."""
    with rc_context(STYLE):
        figure = Figure(figsize=(1.8 + 3.4 * len(metrics), 3.4), layout="constrained")
        grid = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(grid, metrics, strict=True):
            for number, found in enumerate(lines.values()):
                if metric in found:
                    line = found[metric]
                    axes.plot(line.steps, line.mean, **_line_style(number))
            axes.set_title(metric, fontsize=9)
            axes.set_xlabel("optimizer updates")
            axes.set_ylabel("nats per token")
        handles = [
            grid[0].plot([], [], **_line_style(number), label=name)[0]
            for number, name in enumerate(lines)
        ]
        figure.legend(handles=handles, loc="outside lower center", fontsize=8)
    return figure


def _line_style(number: int) -> dict[str, Any]:
    """A colour for each of the first runs, then the same ones with other dashes."""
    colour, dashes = number % len(PALETTE), number // len(PALETTE) % len(DASHES)
    return {"color": PALETTE[colour], "linestyle": DASHES[dashes], "marker": "."}


def as_share(alpha: float) -> str:
    """An alpha as people write it: 1/8."""
    fraction = Fraction(alpha).limit_denominator(1024)
    return str(fraction) if abs(float(fraction) - alpha) < 1e-9 else f"{alpha:.3g}"


def _paint_surface(figure: Figure, axes: Axes, surface: Surface, metric: str) -> None:
    repetitions = np.linspace(*_range(np.log2(surface.repetitions)), 121)
    places = np.linspace(*_range(surface.transform(surface.alphas)), 121)
    columns, rows = np.meshgrid(repetitions, places)
    values = surface.mean(np.exp2(columns.ravel()), surface.inverse(rows.ravel()))
    values = values.reshape(columns.shape)
    colours = NUMBERS if not surface.is_loss else f"{NUMBERS}_r"
    levels: Any = 16
    if surface.is_log:
        # A run that diverges would otherwise take all colours for itself.
        levels = np.geomspace(values.min(), values.max(), 17)
    norm = LogNorm() if surface.is_log else None
    filled = axes.contourf(columns, rows, values, levels=levels, cmap=colours, norm=norm)
    axes.contour(columns, rows, values, levels=filled.levels, colors="white", linewidths=0.3)
    axes.plot(
        np.log2(surface.repetitions),
        surface.transform(surface.alphas),
        "o",
        color="white",
        markeredgecolor="black",
        markersize=4,
        clip_on=False,
        label="runs",
    )
    ticks = np.asarray(filled.levels)[::2]
    bar = figure.colorbar(filled, ax=axes, label=metric, ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:.3g}" for tick in ticks])
    bar.ax.minorticks_off()
    _label_alphas(axes, surface)
    axes.set_title("fitted surface", fontsize=9)
    axes.legend(loc="lower left", frameon=True, fontsize=8)


def _paint_best(figure: Figure, axes: Axes, surface: Surface, bests: Sequence[Best]) -> None:
    # Bins of three values of the grid that the best alpha is one of, so that none is split.
    low, high = _range(surface.transform(surface.alphas))
    step = (high - low) / (GRID - 1)
    places = low + step * (np.arange(0, GRID + 1, 3) - 0.5)
    repetitions = np.log2([best.repetitions for best in bests])
    density = np.stack(
        [np.histogram(surface.transform(b.samples), places, density=True)[0] for b in bests], axis=1
    )
    # Each R by its own greatest density: where it is broad, it would else not be seen.
    density /= density.max(axis=0)
    middles = (places[1:] + places[:-1]) / 2
    image = axes.pcolormesh(repetitions, middles, density, cmap="Greys", shading="nearest")
    figure.colorbar(image, ax=axes, label="density of the best α\n(greatest at each R: 1)")
    medians = surface.transform(np.array([best.median for best in bests]))
    axes.plot(repetitions, medians, color=PALETTE[0], lw=2, label="median of the best α")
    _paint_rules(axes, surface)
    _label_alphas(axes, surface)
    axes.set_title("best α", fontsize=9)
    axes.legend(loc="lower left", frameon=True, fontsize=8)


def _paint_rules(axes: Axes, surface: Surface) -> None:
    first, last = _range(np.log2(surface.repetitions))
    few = np.linspace(first, min(last, np.log2(FEW)), 2)
    colour, label = PALETTE[1], "the paper's rules"
    if first <= np.log2(FEW):
        heights = surface.transform(np.full(2, float(FEW_ALPHA)))
        axes.plot(few, heights, color=colour, ls="--", lw=1.5, label=label)
        label = ""
    if last >= np.log2(MANY):
        many = np.linspace(max(first, np.log2(MANY)), last, 50)

        def passes(number: int) -> Floats:
            return surface.transform(np.minimum(1.0, number / 2**many))

        axes.plot(many, passes(BEST_PASSES), color=colour, ls="--", lw=1.5, label=label)
        window = f"{LEAST_PASSES} to {MOST_PASSES} AR passes"
        axes.fill_between(
            many, passes(LEAST_PASSES), passes(MOST_PASSES), color=colour, alpha=0.15, label=window
        )


def _label_alphas(axes: Axes, surface: Surface) -> None:
    alphas = np.unique(surface.alphas)
    axes.set_yticks(surface.transform(alphas), [as_share(alpha) for alpha in alphas])
    axes.set_ylabel("α, the AR share")


def _range(values: Floats) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)
