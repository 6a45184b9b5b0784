"""Interrupt a sweep at random moments, again and again: its table must come out the same.

    PYTHONPATH=tests python tests/experiments/kill_sweeps.py [--kills 20] [--points 24] [--seed 0]

The sweep has points that end, one whose loss becomes infinite, and two processes at once. It gets
SIGINT, SIGTERM or SIGKILL, while it starts, trains, saves or writes what became of a point, and is
started again by the same command. After each, nothing of it may be left running. In the end
`results.csv` must be that of a sweep that was never disturbed, to the byte. Prints what happened.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from conftest import build_tiny_dataset
from helpers.runs import TINY, environment

POINTS = """
eval: {sequences: 10, interval_steps: 4}
checkpoint: {interval_steps: 2}
sample: {tokens: 0}
sweep:
  grid: {alpha: [0, 1/2, 1]SEEDS}
  list: [{alpha: 3/4, optim.lr: 1e6}]
"""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
CODES = {
    signal.SIGINT: (75, 130, -2, 1),
    signal.SIGTERM: (75, -15, 1),
    signal.SIGKILL: (-9, 1),
}
"""Exit codes after each: saved; ended by it before there was anything to save; or the sweep had
ended before it came, with a point that failed."""


def sweep_file(folder: Path, dataset: Path, *, seeds: int = 0) -> Path:
    """A sweep of very small runs, three and one that fails, or three of each of some seeds."""
    base = TINY.format(data=dataset).partition("eval:")[0]
    file = folder / "sweep.yaml"
    more = f", seed: {list(range(seeds))}" if seeds else ""
    file.write_text(base + "progress: {interval_steps: 1}" + POINTS.replace("SEEDS", more))
    return file


def sweep(file: Path, directory: Path, *options: str) -> list[str]:
    """The command that runs it."""
    command = [sys.executable, "-m", "dualtrain", "sweep", str(file), "--dir", str(directory)]
    return [*command, "--parallel", "2", "--plain", *options]


def disturb(file: Path, directory: Path, *options: str, kills: int, seed: int) -> Counter[str]:
    """Run a sweep to its end with interruptions on the way; returns what they were.

    Args:
        file: Of the sweep.
        directory: Of its points.
        options: Of the command that runs to the end.
        kills: Interruptions.
        seed: Of their moments.
    """
    random_numbers, seen = random.Random(seed), Counter()
    for number in range(kills):
        process = subprocess.Popen(
            sweep(file, directory),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        # Most of a point's time goes into starting; training and saving are at its end.
        time.sleep(random_numbers.choice([1, 4, 7, 9]) + 3 * random_numbers.random())
        family = psutil.Process(process.pid).children(recursive=True)
        stop = STOPS[number % len(STOPS)]
        process.send_signal(stop)
        _, errors = process.communicate()
        assert process.returncode in CODES[stop], (stop, process.returncode, errors.decode())
        _, alive = psutil.wait_procs(family, timeout=100)
        assert not alive, alive
        ended = " (the sweep had ended)" if process.returncode == 1 else ""
        seen[f"{stop.name}, exit {process.returncode}{ended}"] += 1
    ended = subprocess.run(
        sweep(file, directory, *options),
        env=environment(),
        capture_output=True,
        text=True,
    )
    # One point has failed, as it has to.
    assert ended.returncode == 1, ended.stdout + ended.stderr
    return seen


def main() -> None:
    """Interrupt a sweep and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--points", type=int, default=24, help="beside the one that fails")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # A shell starts what runs in the background with SIGINT ignored, and sweeps respect that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = sweep_file(folder, build_tiny_dataset(folder), seeds=arguments.points // 3)
        disturb(file, folder / "calm", kills=0, seed=0)
        seen = disturb(file, folder / "disturbed", kills=arguments.kills, seed=arguments.seed)
        tables = [(folder / n / "results.csv").read_text() for n in ("calm", "disturbed")]
    for what, count in sorted(seen.items()):
        print(f"{count:4} x {what}")
    print(tables[0])
    print("the same table" if tables[0] == tables[1] else f"ANOTHER table:\n{tables[1]}")
    sys.exit(tables[0] != tables[1])


if __name__ == "__main__":
    main()
