"""What the packing plan costs: seconds, memory and room on disk, for corpora of many documents.

    python tests/benchmarks/packing_plan.py --documents 10_000_000 --alpha 1/4

Only the lengths of the documents are made (heavy-tailed, from a seed), as a mapped file. Measured:
the start (subset, units, and the first part of every stream), the parts that are built ahead, and
sequences. Memory is the highest seen less that before; of mapped files it counts pages that are
shared by all ranks and that the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

from dualtrain.data import plan_files
from dualtrain.data.plan import Rotation, StreamPlan
from dualtrain.data.plan_files import PlanFiles
from dualtrain.data.units import Subset, Units
from dualtrain.method.mixing import Mixture, Stream

LENGTH = 2048
SEQUENCES = 2000
_CHUNK = 1 << 20


def write_lengths(file: Path, documents: int) -> np.ndarray:
    """A mapped file of (documents,) int64, written without holding them."""
    rng = np.random.default_rng(0)
    lengths = np.lib.format.open_memmap(file, "w+", np.int64, (documents,))
    for first in range(0, documents, _CHUNK):
        count = min(_CHUNK, documents - first)
        lengths[first : first + count] = 1 + 300 * rng.pareto(1.5, count)
        lengths.flush()
    del lengths
    return np.asarray(np.load(file, mmap_mode="r"))


class Watch(threading.Thread):
    """Looks at this process's memory again and again: its own pages, and all that are resident."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = self.resident = 0
        self.start()

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.005)

    def look(self) -> None:
        text = Path("/proc/self/status").read_text()
        size = {key: int(n) << 10 for key, n in re.findall(r"(Rss\w+):\s+(\d+) kB", text)}
        self.own = max(self.own, size["RssAnon"])
        self.resident = max(self.resident, sum(size.values()))

    def forget(self) -> None:
        self.own = self.resident = 0
        self.look()


class Clock:
    """Prints a line for each thing that is measured."""

    def __init__(self, documents: int, folder: Path) -> None:
        self._documents, self._folder = documents, folder
        self._watch = Watch()
        self._watch.forget()
        self._own, self._resident = self._watch.own, self._watch.resident
        self._wall, self._core = time.perf_counter(), time.process_time()

    def lap(self, what: str) -> None:
        wall, core = time.perf_counter(), time.process_time()
        own = (self._watch.own - self._own) / self._documents
        resident = (self._watch.resident - self._resident) / self._documents
        disk = sum(file.stat().st_blocks * 512 for file in self._folder.iterdir())
        print(
            f"{what:<20} {wall - self._wall:6.1f} s, {core - self._core:6.1f} s of a core; bytes a "
            f"document: {own:5.2f} own memory, {resident:5.2f} with mapped files, "
            f"{disk / self._documents:5.2f} on disk",
            flush=True,
        )
        self._watch.forget()
        self._wall, self._core = time.perf_counter(), time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=lambda text: int(text.replace("_", "")), required=True)
    parser.add_argument("--alpha", type=Fraction, default=Fraction(1, 4))
    parser.add_argument("--folder", type=Path, default=None, help="Where temporary files go.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        lengths = write_lengths(Path(folder) / "lengths.npy", options.documents)
        plans = Path(folder) / "plans"
        plans.mkdir()
        measure(lengths, options.alpha, plans)


def measure(lengths: np.ndarray, alpha: Fraction, folder: Path) -> None:
    plan_files._AHEAD_AFTER_S = 10**6  # begun below, one after the other
    clock = Clock(len(lengths), folder)
    units = Units(Subset(lengths, unique_tokens=None, append_eos=False), sequence_length=LENGTH)
    mixture = Mixture(alpha=alpha, steps=10**6, slots=16, micro_batch=8, rotation=True)
    rotation = None
    if mixture.rotates:
        rotation = Rotation(units, mixture=mixture, sequence_length=LENGTH, seed=0)
    files = PlanFiles(folder)
    streams: tuple[Stream, ...] = ("ar", "diffusion") if mixture.rotates else ("all",)
    clock.lap("subset and units")
    plans = []
    for stream in streams:
        plan = StreamPlan(
            units, stream=stream, rotation=rotation, sequence_length=LENGTH, seed=0, files=files
        )
        plan.sequence(0)
        plans.append(plan)
        clock.lap(f"first part, {stream}")
    for (stream, number), (thread, is_needed) in list(files._ahead.items()):
        is_needed.set()
        thread.join()
        clock.lap(f"part {number} ahead, {stream}")
    began = time.process_time()
    for number in range(SEQUENCES):
        plans[number % len(plans)].sequence(number)
    spent = (time.process_time() - began) / SEQUENCES
    clock.lap(f"{SEQUENCES:,} sequences")
    print(f"a sequence {1e3 * spent:.2f} ms")


if __name__ == "__main__":
    main()
