"""``dualtrain compare SWEEP_DIR``: points that differ in the seed alone, group against group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualtrain.common.errors import UserError
from dualtrain.common.files import write_json
from dualtrain.sweep import figures
from dualtrain.sweep.definition import in_words
from dualtrain.sweep.figures import MeanBar
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
    setting,
    unit,
)

if TYPE_CHECKING:
    from dualtrain.sweep.command import CompareOptions

SEED, AXES = "seed", ("repetitions", "alpha")


@dataclass(frozen=True)
class Group:
    """Points that differ in the seed alone.

    Attributes:
        label: Values of the keys in which groups differ.
    """

    label: str
    values: Mapping[str, str]
    runs: Mapping[int, RunResult]

    def metric(self, name: str) -> dict[int, float]:
        """The metric of each seed."""
        bad = [run.label for run in self.runs.values() if name not in run.metrics]
        if bad:
            raise UserError("--metric", f"{name} is not there, or not finite, in {named(bad)}")
        return {seed: run.metrics[name] for seed, run in self.runs.items()}


def compare_groups(options: CompareOptions) -> dict[str, Any]:
    """Compare groups of points over their seeds; show it, and write it if a place is given.

    Returns:
        What ``comparison.json`` holds.

    Raises:
        UserError: The directory is no sweep's; conditions that hold for nothing; fewer than two
            groups; a metric that is not there.
    """
    if any(option is not None for option in (options.sequences, options.device, options.seed)):
        expected = "two or more runs; the intervals of a sweep are over its seeds"
        raise UserError("--sequences, --device, --seed", "are for runs", expected)
    (directory,) = options.runs
    found = read_sweep(directory)
    keys, notes = found.keys, found.notes()
    runs = finished(restrict(found.runs, keys, options.where), notes)
    metrics = [choose_metric(metric, runs) for metric in options.metric or ["ar_nll"]]
    different = differing(runs, [key for key in keys if key != SEED])
    usual = {key: counts.most_common(1)[0][0] for key, counts in different.items()}
    groups = make_groups(runs, usual)
    if len(groups) < 2:
        raise UserError("dualtrain compare", "one group of points only", "two or more")
    others = [f"{key}={value}" for key, value in usual.items() if key not in AXES]
    if others:
        notes.append(f"where a name does not say otherwise: {', '.join(others)}")
    reference = _reference(groups, usual, keys, options.to)
    if any(len(group.runs) == 1 for group in groups):
        notes.append(ONE_SEED)
    result = {
        "format": 1,
        "sweep": str(directory),
        "where": options.where,
        "to": reference.label,
        "metrics": {
            metric: {group.label: _entry(group, reference, metric) for group in groups}
            for metric in metrics
        },
        "notes": notes,
    }
    _print(result)
    if options.out is not None:
        _write(result, options.out)
    return result


def make_groups(runs: Sequence[RunResult], usual: Mapping[str, str]) -> list[Group]:
    """Put runs together that differ in the seed alone, in the order of the sweep.

    Args:
        usual: The keys in which they differ, each with its commonest value.
    """
    found: dict[tuple[str, ...], dict[int, RunResult]] = {}
    for run in runs:
        values = tuple(in_words(setting(run, key)) for key in usual)
        found.setdefault(values, {})[run.recipe.seed] = run
    return [
        Group(_label(values, usual), dict(zip(usual, values, strict=True)), members)
        for values, members in found.items()
    ]


def _label(values: Sequence[str], usual: Mapping[str, str]) -> str:
    """Name a group by what it is on the axes of a surface, and by what else is unusual about it."""
    parts = [
        f"{key}={value}"
        for key, value in zip(usual, values, strict=True)
        if key in AXES or value != usual[key]
    ]
    return ", ".join(parts) or "base"


def _reference(
    groups: Sequence[Group], usual: Mapping[str, str], keys: Sequence[str], to: Sequence[str]
) -> Group:
    """The group that conditions hold for; of several, the one that is usual in all else."""
    if not to:
        return groups[0]
    everything = [run for group in groups for run in group.runs.values()]
    chosen = {run.directory for run in restrict(everything, keys, to, option="--to")}
    found = [g for g in groups if any(run.directory in chosen for run in g.runs.values())]
    asked = {condition.partition("=")[0] for condition in to}
    rest = [key for key in usual if key not in asked and key not in AXES]
    plain = [group for group in found if all(group.values[key] == usual[key] for key in rest)]
    found = plain or found
    if len(found) > 1:
        raise UserError(
            "--to",
            f"{', '.join(to)} holds for {len(found)} groups: {named([g.label for g in found])}",
            "conditions that hold for one group",
            "give --to once more, or choose points with --where",
        )
    return found[0]


def _entry(group: Group, reference: Group, metric: str) -> dict[str, Any]:
    values = group.metric(metric)
    mean = over_seeds(list(values.values()))
    entry: dict[str, Any] = {
        "seeds": sorted(values),
        "mean": float(np.mean(list(values.values()))),
        "interval": None if mean is None else [mean.low, mean.high],
    }
    if group is not reference:
        differences = paired(values, reference.metric(metric))
        change = over_seeds(differences)
        entry["difference"] = float(np.mean(differences)) if differences else None
        entry["difference_interval"] = None if change is None else [change.low, change.high]
    return entry


def _print(result: dict[str, Any]) -> None:
    for metric, groups in result["metrics"].items():
        digits = ".2f" if rises(metric) else ".4f"
        table = new_table(
            unit(metric), "seeds", "mean (95 %)", f"difference to {result['to']} (95 %)"
        )
        for label, entry in groups.items():
            table.add_row(
                label,
                str(len(entry["seeds"])),
                with_interval(entry["mean"], entry["interval"], digits),
                with_interval(
                    entry.get("difference"), entry.get("difference_interval"), f"+{digits}"
                ),
            )
        is_last = metric == list(result["metrics"])[-1]
        show(table, result["notes"] if is_last else ())
        print()


def _write(result: dict[str, Any], out: Path) -> None:
    make_directory(out)
    write_json(out / "comparison.json", result)
    written = [out / "comparison.json"]
    for metric, groups in result["metrics"].items():
        bars = [MeanBar(label, entry["mean"], entry["interval"]) for label, entry in groups.items()]
        better = "higher" if rises(metric) else "lower"
        figure = figures.draw_bars({metric: bars}, metric=unit(metric), better=better)
        written += figures.save(figure, out, metric)
    print("written:", *written, sep="\n  ")
