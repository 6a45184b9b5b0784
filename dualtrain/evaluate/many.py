"""``dualtrain eval --all``: every model in a directory, one after another."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtrain.checkpoint.trained import check_precision, choose
from dualtrain.common.errors import EXIT_FAILED, UserError
from dualtrain.common.formatting import counted
from dualtrain.evaluate.evaluate import choose_tasks, evaluate_model
from dualtrain.evaluate.result_files import RESULTS
from dualtrain.model.build import CONFIG

if TYPE_CHECKING:
    from dualtrain.evaluate.command import EvalOptions
    from dualtrain.evaluate.report import Evaluation

_DECIDING = ("modes", "limit", "sequences", "seed", "elbo_samples")


def evaluate_all(options: EvalOptions) -> int:
    """Evaluate the models in a directory, one after another; one that fails is named.

    Returns:
        The exit code.

    Raises:
        UserError: There are no models, or options that no model could be evaluated with.
    """
    if options.out is not None or options.step is not None:
        raise UserError("--all", "is given with --out or --step", "one model for these")
    models = sorted(file.parent for file in options.path.glob(f"[!.]*/{CONFIG}"))
    if not models:
        expected = "a directory of exported models, as `dualtrain import --all` writes it"
        raise UserError(str(options.path), "holds no models", expected)
    check_precision(options.precision)
    choose(options.device)
    choose_tasks(options, [])
    failed = []
    for number, model in enumerate(models, start=1):
        print(f"[{number}/{len(models)}] {model}", flush=True)
        one = replace(options, path=model)
        try:
            evaluate_model(one, is_done=lambda evaluation, one=one: _is_done(evaluation, one))
        except UserError as error:
            failed.append(model.name)
            print(f"error: {error}", file=sys.stderr, flush=True)
    if failed:
        count = f"{len(failed)} of {counted(len(models), 'model')}"
        print(f"error: {count} failed: {', '.join(failed)}", file=sys.stderr)
    return EXIT_FAILED if failed else 0


def _is_done(evaluation: Evaluation, options: EvalOptions) -> bool:
    """Whether the newest results of the model are of the same settings, tasks and data."""
    wanted = {
        "settings": {key: evaluation.settings[key] for key in _DECIDING},
        "precision": options.precision,
        "held_out": evaluation.dataset,
        "tasks": {
            task.name: [task.file.sha256, evaluation.items[task.name].sha256]
            for task in evaluation.tasks
        },
    }
    files = evaluation.source.run_dir.glob(f"eval/*/{RESULTS}")
    step = evaluation.source.facts.get("step")
    for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True):
        found = _described(file, options)
        # The checkpoints of a run have their results in one place.
        if found is not None and found.pop("step") == step:
            if found == wanted:
                print(f"there already: {file.parent}", flush=True)
            return found == wanted
    return False


def _described(file: Path, options: EvalOptions) -> dict[str, Any] | None:
    """What results are of, and the step of their model; None where they cannot be read."""
    try:
        found = json.loads(file.read_bytes())
        settings, held_out = found["settings"], found["held_out"]
        return {
            "step": found["model"].get("step"),
            "settings": {key: settings.get(key) for key in _DECIDING},
            "precision": None if options.precision is None else settings["precision"],
            "held_out": None if held_out is None else held_out["dataset"],
            "tasks": {
                name: [task["task_file"]["sha256"], task["data"]["sha256"]]
                for name, task in found["tasks"].items()
            },
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
