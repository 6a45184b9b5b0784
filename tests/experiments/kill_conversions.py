"""Kill conversions at random moments, again and again, and check what is there each time.

    PYTHONPATH=tests python tests/experiments/kill_conversions.py [--trials 100] [--seed 0]

Each trial converts a corpus into a place of its own, in a process that gets SIGKILL after a random
part of the time that a whole conversion takes, and is then started again, until one gets through.
After every kill the place must hold nothing or a whole dataset; in the end every byte must equal
that of a conversion that was never disturbed. Prints one JSON line: trials, kills, the stages in
which they fell, and how many conversions went on with what a killed one had left. More trials are
made, up to ten times as many, until kills fell in three stages and conversions often went on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from helpers.conversions import files_of, write_jsonl

import data_tools.sources.build_source
import data_tools.spool
from data_tools.convert import build_dataset
from data_tools.reporting import Report, StageProgress
from data_tools.sources import open_sources
from data_tools.verify import verify_dataset
from dualtrain.recipe.schema import BuildSection

BUILD = {"vocab_size": 400, "val_fraction": 0.1, "drop_duplicates": True}


class Tell(Report):
    """Passes stages and notices on to the process that watches."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def show(self, progress: StageProgress) -> None:
        self._pipe.send(("stage", progress.stage))

    def say(self, text: str) -> None:
        self._pipe.send(("notice", text))


def convert(build: BuildSection, out: Path, workers: int, pipe: Connection) -> None:
    os.setsid()  # a group of its own: the process and its workers
    # Workers of a killed process complain; of a failed one this is what one wants to read.
    os.dup2(os.open(f"{out}.stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    build_dataset(build, out, workers=workers, shard_bytes=20_000, report=Tell(pipe))


def start(
    build: BuildSection, out: Path, workers: int
) -> tuple[multiprocessing.Process, Connection]:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    # By fork: everything is imported already, and a trial takes a fraction of a second.
    process = multiprocessing.get_context("fork").Process(
        target=convert, args=(build, out, workers, theirs)
    )
    process.start()
    theirs.close()
    return process, ours


def wait_for_end_of_group(group: int) -> None:
    """The workers of a killed conversion end by themselves."""
    until = time.monotonic() + 100
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise SystemExit(f"workers of {group} live on")


def told(pipe: Connection) -> list[tuple[str, str]]:
    found = []
    try:
        while pipe.poll():
            found.append(pipe.recv())
    except EOFError:
        pass
    return found


def campaign(trials: int, seed: int, folder: Path) -> dict[str, object]:
    rng = random.Random(seed)
    words = [f"w{rng.randrange(500)}" for _ in range(60_000)]
    texts = [" ".join(words[i : i + 40 + i % 57]) for i in range(0, len(words), 60)]
    build = BuildSection.model_validate(
        {"source": str(write_jsonl(folder / "corpus.jsonl", texts))} | BUILD
    )
    build_dataset(build, folder / "expected", shard_bytes=20_000)  # also imports everything
    whole_s = {}
    for workers in (1, 2):
        began = time.monotonic()
        process, _ = start(build, folder / f"with-{workers}", workers)
        process.join()
        whole_s[workers] = time.monotonic() - began
    expected = files_of(folder / "expected")
    stages: Counter[str] = Counter()
    done = kills = went_on = 0
    for trial in range(10 * trials):
        # On a busy machine the moments of the kills may fall all in the beginning.
        is_varied = kills >= trials and 2 * went_on >= trials and len(stages) >= 3
        if trial >= trials and is_varied:
            break
        out = folder / f"trial-{trial}"
        workers = 2 if trial % 8 == 1 else 1
        while not out.exists():
            process, pipe = start(build, out, workers)
            process.join(rng.uniform(0, 1.1 * whole_s[workers]))
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
                wait_for_end_of_group(process.pid)
            elif process.exitcode:
                raise SystemExit(f"trial {trial}: {Path(f'{out}.stderr').read_text()}")
            lines = told(pipe)
            pipe.close()
            if process.exitcode:
                reached = [text for kind, text in lines if kind == "stage"]
                stages[reached[-1] if reached else "starting"] += 1
            went_on += any("going on" in text for _, text in lines)
            if out.exists():
                verify_dataset(out)
        if files_of(out) != expected:
            raise SystemExit(f"trial {trial}: {out} differs from an undisturbed conversion")
        if rest := [p.name for p in folder.iterdir() if p.name.startswith(f".{out.name}")]:
            # A process killed just after the dataset was in its place; the next call cleans up.
            build_dataset(build, out)
            if any(p.name.startswith(f".{out.name}.partial") for p in folder.iterdir()):
                raise SystemExit(f"trial {trial}: {rest} are left")
        done += 1
    return {"trials": done, "kills": kills, "went_on": went_on, "stages": dict(stages)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # Many blocks and a journal after each: kills fall between as many states as possible.
    data_tools.spool.JOURNAL_S = 0.0
    data_tools.sources.build_source.open_sources = partial(open_sources, block_bytes=5_000)
    with tempfile.TemporaryDirectory() as folder:
        json.dump(campaign(options.trials, options.seed, Path(folder)), sys.stdout)
    print()


if __name__ == "__main__":
    main()
