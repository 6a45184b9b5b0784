"""Kill training runs at random moments, again and again, and check what is left each time.

    PYTHONPATH=tests python tests/experiments/kill_runs.py [--kills 50] [--seed 0]

Runs of two ranks save every third step. Each is started by `dualtrain run`, gets SIGKILL (one rank,
or everything at once) while it starts, trains or saves, and is started again by the same command.
After every kill: nobody is left alive; the newest checkpoint is whole by every hash, and not older
than one interval before the last step that the metrics know. A run that comes to its end must have
written the same metrics as one that was never disturbed, to the bit. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from helpers.ranks import environment
from helpers.runs import command, records, results, tiny_loader

from dualtrain.checkpoint.files import find_defects
from dualtrain.checkpoint.store import find_checkpoints
from dualtrain.recipe.load import LoadedRecipe

INTERVAL = 3
SETTINGS = (
    f"checkpoint.interval_steps={INTERVAL}",
    "checkpoint.keep=2",
    "progress.interval_steps=1",
    "eval.interval_steps=7",
    "steps=24",
    "sample={tokens: 0, infill: ''}",
    "algorithms=[{use: helpers.algorithms:Slow, args: {seconds: 0.03}}]",
)
KINDS = (
    ("engine.deepspeed=zero1",),
    ("engine.deepspeed=zero3",),
    ("engine.precision=bf16",),
    ("engine.deepspeed=zero2",),
    ("engine.deepspeed=zero0",),
)
MOMENTS = ("starting", "training", "saving", "saving")


@dataclass
class Tally:
    """What has happened so far."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    finished: int = 0
    unfinished_saves: int = 0
    most_lost: int = 0
    longest_end_s: float = 0.0


def campaign(kills: int, seed: int, dataset: Path, folder: Path) -> Tally:
    """Kill that often.

    Raises:
        SystemExit: Something is not as it must be; says what.
    """
    rng, tally = random.Random(seed), Tally()
    load = tiny_loader(dataset, folder)
    number = 0
    while sum(tally.kills.values()) < kills:
        kind = KINDS[number % len(KINDS)]
        undisturbed = load(*SETTINGS, *kind, name=f"undisturbed{number % len(KINDS)}")
        if not undisturbed.recipe.directory.exists():
            _start(undisturbed).wait()
        recipe = load(*SETTINGS, *kind, name=f"run{number}")
        for _ in range(5):
            if sum(tally.kills.values()) < kills:
                _disturb(recipe, rng, tally)
        process = _start(recipe)
        if process.wait(timeout=120) != 0:
            raise SystemExit(f"run {number} did not come to its end: {_output(recipe)}")
        if sorted(results(recipe)) != sorted(results(undisturbed)):
            raise SystemExit(f"run {number} has other metrics than the undisturbed one")
        if list(recipe.recipe.directory.glob("*.partial")):
            raise SystemExit(f"run {number} has left an unfinished checkpoint")
        tally.finished += 1
        number += 1
    return tally


def _disturb(recipe: LoadedRecipe, rng: random.Random, tally: Tally) -> None:
    """Start the run, kill it, and look at what is left."""
    moment, victim = rng.choice(MOMENTS), rng.choice(("one rank", "all"))
    before = _newest(recipe)
    process = _start(recipe)
    ranks = _wait_until(moment, recipe, process, rng)
    if process.poll() is not None or not ranks:
        process.wait(timeout=120)
        return  # it came to its end first
    targets = [rng.choice(ranks).pid] if victim == "one rank" else [process.pid, *map(_pid, ranks)]
    for target in targets:
        _kill(target)
    began = time.monotonic()
    # First our own child: psutil would take its exit code.
    code = process.wait(timeout=60)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    if alive:
        raise SystemExit(f"{alive} live on after {victim} was killed while {moment}")
    if code == 0:
        return  # the rank had done its work
    tally.longest_end_s = max(tally.longest_end_s, time.monotonic() - began)
    tally.kills[moment, victim] += 1
    print(f"kill {sum(tally.kills.values())}: {victim} while {moment}", flush=True)
    tally.unfinished_saves += len(list(recipe.recipe.directory.glob("*.partial")))
    for path in find_checkpoints(recipe.recipe.directory):
        if defects := find_defects(path, share=(0, 1)):
            raise SystemExit(f"{path} counts as whole, but {defects}")
    newest = _newest(recipe)
    done = max([r["step"] for r in records(recipe)], default=0) if _has_metrics(recipe) else 0
    tally.most_lost = max(tally.most_lost, done - newest)
    if newest < before or done - newest > INTERVAL:
        raise SystemExit(f"{done} steps were done, but the newest checkpoint is of {newest}")


def _wait_until(
    moment: str, recipe: LoadedRecipe, process: subprocess.Popen, rng: random.Random
) -> list[psutil.Process]:
    """Wait for a random time within the moment; returns the ranks."""
    directory = recipe.recipe.directory
    metrics = directory / "metrics.jsonl"
    began = time.time()
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        ranks = psutil.Process(process.pid).children()
        if moment == "starting" and len(ranks) == 2:
            time.sleep(rng.uniform(0, 6))
            return ranks
        training = metrics.exists() and metrics.stat().st_mtime > began
        if moment == "training" and training:
            time.sleep(rng.uniform(0, 1.5))
            return ranks
        if moment == "saving" and training and list(directory.glob("*.partial")):
            time.sleep(rng.choice((0, 0, rng.uniform(0, 0.1), rng.uniform(0, 0.5))))
            return ranks
        time.sleep(0.004)
    return []


def _start(recipe: LoadedRecipe) -> subprocess.Popen:
    arguments = [sys.executable, *command(recipe, "--ranks", "2")]
    with recipe.recipe.directory.with_suffix(".out").open("a") as output:
        return subprocess.Popen(
            arguments, env=environment(), stdout=output, stderr=output, start_new_session=True
        )


def _pid(process: psutil.Process) -> int:
    return process.pid


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _newest(recipe: LoadedRecipe) -> int:
    found = find_checkpoints(recipe.recipe.directory)
    return int(found[-1].name[5:]) if found else 0


def _has_metrics(recipe: LoadedRecipe) -> bool:
    return (recipe.recipe.directory / "metrics.jsonl").exists()


def _output(recipe: LoadedRecipe) -> str:
    return recipe.recipe.directory.with_suffix(".out").read_text()[-3000:]


def table(tally: Tally, seed: int) -> str:
    """The tally as Markdown."""
    lines = ["| killed while | one rank | all |", "|---|---|---|"]
    for moment in dict.fromkeys(MOMENTS):
        counts = [tally.kills[moment, victim] for victim in ("one rank", "all")]
        lines.append(f"| {moment} | {counts[0]} | {counts[1]} |")
    return "\n".join(
        [
            *lines,
            "",
            f"seed {seed}: {sum(tally.kills.values())} kills, {tally.finished} runs finished with "
            "the metrics of an undisturbed one;",
            f"{tally.unfinished_saves} kills left an unfinished checkpoint, none of which was "
            f"read; most steps lost: {tally.most_lost} (interval {INTERVAL});",
            f"longest time until everybody was gone: {tally.longest_end_s:.1f} s",
        ]
    )


def main() -> None:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from conftest import build_tiny_dataset

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        dataset = build_tiny_dataset(Path(folder) / "data")
        tally = campaign(arguments.kills, arguments.seed, dataset, Path(folder))
    print(table(tally, arguments.seed))


if __name__ == "__main__":
    main()
