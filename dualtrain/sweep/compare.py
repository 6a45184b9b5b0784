"""``dualtrain compare``: any runs beside each other, with intervals over held-out documents."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtrain.checkpoint.trained import ModelSource, choose, find_source, open_trained
from dualtrain.common import formatting
from dualtrain.common.errors import UserError
from dualtrain.common.files import write_json
from dualtrain.common.formatting import counted
from dualtrain.data.batches import ValidationData
from dualtrain.data.dataset import TokenDataset
from dualtrain.evaluate.heldout import DocumentLosses, document_losses
from dualtrain.sweep import figures
from dualtrain.sweep.directory import SWEEP
from dualtrain.sweep.fit import line_of
from dualtrain.sweep.intervals import over_documents
from dualtrain.sweep.output import make_directory, new_table, show, with_interval
from dualtrain.sweep.reading import read_run
from dualtrain.sweep.results import PREFIX_MINUS_AR, SCORES_RISE, RunResult

if TYPE_CHECKING:
    from dualtrain.sweep.command import CompareOptions

FEWEST_DOCUMENTS = 5
"""Below this many documents a bootstrap over them says nothing."""
WANTED_DOCUMENTS = 30
"""So many are scored, if there are, even where a recipe's held-out sequences have fewer."""
CURVES = ("ar_nll", "diffusion_nll", "prefix_nll")
PARTS = ("ar", "diffusion", "prefix")
COLUMNS = (
    ("AR", "ar_nll", "{:.4f}"),
    ("AR best", "best.ar_nll", "{:.4f}"),
    ("diffusion", "diffusion_nll", "{:.4f}"),
    ("diffusion best", "best.diffusion_nll", "{:.4f}"),
    ("prefix − AR", PREFIX_MINUS_AR, "{:+.4f}"),
    ("AR passes", "train.ar_passes", "{:.3g}"),
)


def compare_runs(options: CompareOptions) -> dict[str, Any]:
    """Compare runs, show how they differ, and write JSON and a figure.

    Returns:
        What ``comparison.json`` holds.

    Raises:
        UserError: Fewer than two runs, one of them twice, or what is no run.
    """
    if options.metric or options.where or options.to:
        raise UserError("--metric, --where, --to", "are for a single sweep", "one SWEEP_DIR")
    runs = _read_runs(options.runs)
    if options.device is not None:
        choose(options.device)  # a device that is not there is no reason to leave intervals out
    notes: list[str] = []
    losses = _document_losses(runs, options, notes)
    earlier = [n for n, run in runs.items() if run.evals and "documents" not in run.evals[-1]]
    if 0 < len(earlier) < len(runs):
        notes.append(
            f"{', '.join(earlier)}: trained by an earlier version, in another order of the data, "
            "and scored otherwise; only the differences over documents are of one scoring"
        )
    result = {
        "format": 1,
        "runs": {
            name: {"directory": str(run.directory), "metrics": _metrics(run)}
            for name, run in runs.items()
        },
        "differences": {
            "to": next(iter(runs)),
            "over": "held-out documents, drawn anew; 95 % intervals; nats per token",
            "runs": _differences(losses, options.seed or 0),
        },
        "notes": notes,
    }
    out = _new_directory(options.out)
    write_json(out / "comparison.json", result)
    drawn = _draw(runs, out)
    _print(result, runs)
    print("\nwritten:", out / "comparison.json", *drawn, sep="\n  ")
    return result


def _read_runs(paths: Sequence[Path]) -> dict[str, RunResult]:
    """The runs, each named by its directory and as many parents as tell it from the others."""
    if len(paths) < 2:
        raise UserError(
            "dualtrain compare", counted(len(paths), "run"), "two or more, or one sweep"
        )
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError("dualtrain compare", f"{path} is there twice", "each run once")
        if (path / SWEEP).is_file():
            hint = f"`dualtrain compare {path}` compares its points"
            raise UserError(str(path), "is a sweep", "runs, or one sweep alone", hint)
    runs = [read_run(path) for path in paths]
    for run in runs:
        if not run.steps and not run.evals:
            raise UserError(str(run.directory), "has no metrics yet", "a run that has trained")
    depth, names = 0, [""]
    while len(set(names)) < len(runs):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in resolved]
    return dict(zip(names, runs, strict=True))


def _metrics(run: RunResult) -> dict[str, float]:
    speeds = [speed for r in run.steps if (speed := r.get("tokens_per_second"))]
    found = dict(run.metrics)
    if speeds:
        found["tokens_per_second"] = statistics.median(speeds)
    return found


def _document_losses(
    runs: Mapping[str, RunResult], options: CompareOptions, notes: list[str]
) -> dict[str, DocumentLosses]:
    """The losses of each run's newest checkpoint on the same held-out documents, the first's first.

    None at all where there is no comparison with the first run.
    """
    if options.sequences == 0:
        return {}
    try:
        sources = {name: find_source(run.directory) for name, run in runs.items()}
    except UserError as error:
        notes.append(f"no intervals over documents: {error}")
        return {}
    reference, first = next(iter(sources.items()))
    found: dict[str, DocumentLosses] = {}
    assert first.recipe is not None and first.info is not None  # a run's checkpoint has both
    for name, source in sources.items():
        assert source.recipe is not None and source.info is not None
        if source.info.fingerprint != first.info.fingerprint:
            notes.append(f"{name} has another dataset than {reference}: no interval")
            continue
        if source.recipe.sequence_length != first.recipe.sequence_length:
            notes.append(f"{name} has another sequence length than {reference}: no interval")
            continue
        try:
            found[name] = _score(source, first, options)
        except UserError as error:
            notes.append(f"{name}: no interval: {error}")
    if reference not in found:
        return {}
    documents = len(found[reference].documents)
    if documents < FEWEST_DOCUMENTS:
        notes.append(
            f"the held-out sequences are from {documents} documents, too few for intervals over "
            "documents; --sequences takes more"
        )
        return {}
    return found


def _score(source: ModelSource, first: ModelSource, options: CompareOptions) -> DocumentLosses:
    trained = open_trained(source, device=options.device)
    recipe = first.recipe
    assert recipe is not None
    dataset = TokenDataset.open(recipe.data.path, "val")
    sequences = options.sequences
    if sequences is None:
        # They are spread over the split, so most are of different documents.
        sequences = max(recipe.eval.sequences, 2 * WANTED_DOCUMENTS)
    validation = ValidationData(
        dataset,
        sequence_length=recipe.sequence_length,
        append_eos=recipe.data.append_eos,
        document_mask=recipe.data.document_mask,
        sequences=sequences,
    )
    return document_losses(
        trained, validation, micro_batch=recipe.micro_batch, seed=options.seed or 0
    )


def _differences(losses: Mapping[str, DocumentLosses], seed: int) -> dict[str, dict[str, Any]]:
    """Differences to the first run, and of each between its own two ways of reading."""
    differences: dict[str, dict[str, Any]] = {}
    for name, own in losses.items():
        found: dict[str, Any] = {"documents": len(own.documents)}
        # Of a run against itself: what reading the first half both ways is worth.
        prefix = over_documents(own.prefix, own.ar_same_tokens, own.prefix_tokens, seed=seed)
        found["prefix_minus_ar"] = asdict(prefix)
        if differences:
            reference = losses[next(iter(losses))]
            for part in PARTS:
                tokens = own.tokens if part == "ar" else getattr(own, f"{part}_tokens")
                one, other = getattr(own, part), getattr(reference, part)
                found[part] = asdict(over_documents(one, other, tokens, seed=seed))
        differences[name] = found
    return differences


def _new_directory(out: Path | None) -> Path:
    """Make the directory asked for, or the next free one in ``comparisons``."""
    if out is None:
        places = (Path("comparisons") / f"comparison-{number}" for number in count(1))
        out = next(place for place in places if not place.exists())
    make_directory(out)
    return out


def _draw(runs: Mapping[str, RunResult], out: Path) -> list[Path]:
    lines = {
        name: {key: line for key in CURVES if (line := line_of([run.evals], key)) is not None}
        for name, run in runs.items()
    }
    metrics = [key for key in CURVES if any(key in found for found in lines.values())]
    if not metrics:
        return []
    return figures.save(figures.draw_runs(lines, metrics=metrics), out, "losses")


def _print(result: dict[str, Any], runs: Mapping[str, RunResult]) -> None:
    metrics = {name: entry["metrics"] for name, entry in result["runs"].items()}
    scores = [
        key
        for key in dict.fromkeys(key for found in metrics.values() for key in found)
        if key.startswith(SCORES_RISE) and key.endswith(".average")
    ]
    columns = [*COLUMNS, *((key, key, "{:.1f}") for key in scores)]
    headers = [name for name, _, _ in columns]
    table = new_table("run", "alpha", "R", "step", *headers, "tokens/s")
    for name, run in runs.items():
        found = metrics[name]
        table.add_row(
            name,
            str(run.recipe.model_dump(mode="json")["alpha"]),
            f"{run.repetitions:g}",
            str(run.steps[-1]["step"] if run.steps else run.evals[-1]["step"]),
            *(form.format(found[key]) if key in found else "-" for _, key, form in columns),
            formatting.count(found.get("tokens_per_second")),
        )
    print("held-out losses in nats per token, at the end and at their best")
    if not result["differences"]["runs"]:
        show(table, result["notes"])
        return
    show(table)
    _print_differences(result["differences"], result["notes"])


def _print_differences(differences: dict[str, Any], notes: Sequence[str]) -> None:
    first = differences["to"]
    count = differences["runs"][first]["documents"]
    print(f"\ndifferences to {first}, paired over {count} held-out documents (95 %)")
    table = new_table("run", "AR", "diffusion", "prefix", "own prefix − own AR")
    for name, found in differences["runs"].items():
        cells = [_cell(found.get(key)) for key in (*PARTS, "prefix_minus_ar")]
        table.add_row(name, *cells)
    show(table, notes)


def _cell(entry: dict[str, float] | None) -> str:
    if entry is None:
        return "-"
    return with_interval(entry["value"], (entry["low"], entry["high"]), "+.4f")
