"""Tests of: dualtrain.data.units, plan, part_order, plan_files: subsets, long documents, files."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtrain.common.errors import UserError
from dualtrain.common.locks import locked
from dualtrain.data.part_order import pieces_between
from dualtrain.data.plan import Rotation, StreamPlan
from dualtrain.data.plan_files import Build, PlanFiles
from dualtrain.data.units import Subset, Units
from dualtrain.method.mixing import Mixture, Stream


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=40), st.integers(1, 6), st.booleans())
def test_long_documents_are_shuffled_in_pieces(
    lengths: list[int], sequence_length: int, append_eos: bool
) -> None:
    subset = Subset(np.array(lengths), unique_tokens=None, append_eos=append_eos)
    units = Units(subset, sequence_length=sequence_length)
    everyone = np.arange(units.count)
    sizes = units.lengths(everyone)
    longest = max(16 * sequence_length, math.ceil(subset.tokens / 64))
    assert sizes.min() >= 1 and sizes.max() <= longest
    found: dict[int, list[tuple[int, int]]] = {}
    for unit, size in zip(everyone.tolist(), sizes.tolist(), strict=True):
        document, begin = units.locate(unit)
        found.setdefault(document, []).append((begin, begin + size))
        assert unit >= len(lengths) or (document, begin) == (unit, 0)
    for document, length in enumerate(lengths):
        pieces, whole = sorted(found[document]), length + append_eos
        assert pieces[0][0] == 0 and pieces[-1][1] == whole
        assert all(one[1] == other[0] for one, other in zip(pieces, pieces[1:], strict=False))
        assert len(pieces) == math.ceil(whole / longest)
        assert max(b - a for a, b in pieces) - min(b - a for a, b in pieces) < len(pieces)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.booleans(), st.integers(1, 5))
def test_subset_is_exact_for_any_chunk(lengths: list[int], append_eos: bool, chunk: int) -> None:
    values = np.array(lengths)
    added = 1 if append_eos else 0
    everything = int((values + added).sum())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualtrain.data.units.CHUNK", chunk)
        for unique in range(1, everything + 1):
            subset = Subset(values, unique_tokens=unique, append_eos=append_eos)
            packed = subset.packed_lengths()
            assert packed.sum() == unique == subset.tokens
            assert packed.tolist()[:-1] == (values + added).tolist()[: len(packed) - 1]
            assert 1 <= packed[-1] <= values[len(packed) - 1] + added
        whole = Subset(values, unique_tokens=None, append_eos=append_eos)
        assert (whole.documents, whole.tokens) == (len(values), everything)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.data())
def test_pieces_cover_exactly_what_is_asked(lengths: list[int], data: st.DataObject) -> None:
    order = np.random.default_rng(0).permutation(len(lengths))
    flat = [(d, i) for d in order.tolist() for i in range(lengths[d])]
    start = data.draw(st.integers(0, len(flat) - 1))
    stop = data.draw(st.integers(start + 1, len(flat)))
    pieces = pieces_between(order, np.cumsum(np.array(lengths)[order]), start, stop)
    assert [(p.document, i) for p in pieces for i in range(p.start, p.stop)] == flat[start:stop]
    assert all(piece.start < piece.stop for piece in pieces)


def plan(directory: Path | None, documents: int = 50) -> StreamPlan:
    subset = Subset(np.full(documents, 9), unique_tokens=None, append_eos=False)
    units = Units(subset, sequence_length=16)
    files = PlanFiles(directory)
    return StreamPlan(units, stream="all", rotation=None, sequence_length=16, seed=0, files=files)


def test_files_give_what_memory_gives(tmp_path: Path) -> None:
    with_files, in_memory = plan(tmp_path), plan(None)
    for index in (0, 200, 7, 1500, 60):
        assert with_files.sequence(index) == in_memory.sequence(index)


def test_array_is_built_once_by_many_threads(tmp_path: Path) -> None:
    built: list[int] = []

    def build() -> np.ndarray:
        built.append(1)
        return np.arange(10)

    def load() -> None:
        assert PlanFiles(tmp_path).load("all", 3, build).tolist() == list(range(10))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


@pytest.mark.parametrize("alpha", [None, Fraction(1, 2), Fraction(7, 8), Fraction(1, 40)])
def test_what_is_built_ahead_is_what_is_read_next(
    tmp_path: Path, alpha: Fraction | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its first part no stream waits for another, and no file is empty."""
    subset = Subset(np.full(200, 9), unique_tokens=None, append_eos=False)
    units = Units(subset, sequence_length=16)
    files, rotation, waited = PlanFiles(tmp_path), None, []
    if alpha is not None:
        mixture = Mixture(alpha=alpha, steps=400, slots=2, micro_batch=2, rotation=True)
        rotation = Rotation(units, mixture=mixture, sequence_length=16, seed=0)
    load = PlanFiles.load

    def watched(self: PlanFiles, kind: str, number: int, build: Build) -> np.ndarray:
        if (kind, number) not in self._ahead:
            waited.append(number)
        return load(self, kind, number, build)

    monkeypatch.setattr(PlanFiles, "load", watched)
    streams: tuple[Stream, ...] = ("ar", "diffusion") if alpha else ("all",)
    for stream in streams:
        waited.clear()
        plan = StreamPlan(
            units, stream=stream, rotation=rotation, sequence_length=16, seed=0, files=files
        )
        for index in range(20 if stream == "ar" else 600):
            plan.sequence(index)
        assert len(waited) == 1
    assert all(np.load(file).size for file in tmp_path.glob("*-*.npy"))


def test_next_array_is_built_ahead(tmp_path: Path) -> None:
    files = PlanFiles(tmp_path)
    files.build_ahead("ar", 1, lambda: np.arange(3), oldest=0)
    found = files.load("ar", 1, lambda: pytest.fail("was built ahead"))
    assert found.tolist() == [0, 1, 2]


def test_error_of_a_build_ahead_appears_when_it_is_needed(tmp_path: Path) -> None:
    def fail() -> np.ndarray:
        raise OSError(28, "No space left on device")

    files = PlanFiles(tmp_path)
    files.build_ahead("ar", 1, fail, oldest=0)
    with pytest.raises(UserError, match="No space left") as caught:
        files.load("ar", 1, fail)
    assert caught.value.where == str(tmp_path)
    assert files.load("ar", 1, lambda: np.arange(2)).tolist() == [0, 1]


def test_rest_of_a_killed_builder_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "building.partial").write_bytes(b"half")
    (tmp_path / "building.lock").touch()
    assert PlanFiles(tmp_path).load("ar", 0, lambda: np.arange(4)).tolist() == [0, 1, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ar-00000000.npy", "building.lock"]


def test_old_arrays_are_removed_and_come_back_when_asked(tmp_path: Path) -> None:
    files = PlanFiles(tmp_path)
    kept = [files.load("ar", n, lambda n=n: np.full(3, n)) for n in range(5)]
    files.load("diffusion", 0, lambda: np.zeros(3))
    files.build_ahead("ar", 5, lambda: np.full(3, 5), oldest=4)
    assert files.load("ar", 5, lambda: pytest.fail("was built ahead"))[0] == 5
    names = sorted(p.name for p in tmp_path.glob("*.npy"))
    assert names == ["ar-00000004.npy", "ar-00000005.npy", "diffusion-00000000.npy"]
    assert [array[0] for array in kept] == [0, 1, 2, 3, 4], "mapped arrays live on"
    assert files.load("ar", 2, lambda: np.full(3, 7)).tolist() == [7, 7, 7]


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the data plan cannot be written"):
        plan(tmp_path / "file" / "plans").sequence(0)


USE = """
import sys
from pathlib import Path
from dualtrain.data.plan_files import PlanFiles
files = PlanFiles.open(Path(sys.argv[1]), "theirs")
print("open", flush=True)
sys.stdin.read()
"""


def test_files_of_a_living_process_stay_and_of_an_ended_one_go(tmp_path: Path) -> None:
    (tmp_path / "not-ours").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", USE, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    mine = PlanFiles.open(tmp_path, "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "not-ours", "theirs"]
    process.kill()
    process.communicate()
    also_mine = PlanFiles.open(tmp_path, "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "not-ours"]
    assert mine.directory == also_mine.directory


HOLD = """
import sys, time
from pathlib import Path
from dualtrain.common.locks import locked
with locked(Path(sys.argv[1]), remove=True):
    print("held", flush=True)
    time.sleep(10**6)
"""


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    waited: list[bool] = []
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"

    def on_wait() -> None:
        waited.append(True)
        process.kill()

    with locked(lock, remove=True, on_wait=on_wait):
        assert waited == [True]
    process.wait()
    process.stdout.close()
    assert not lock.exists()


def test_lock_that_was_removed_under_a_waiter_does_not_count(tmp_path: Path) -> None:
    """One waits for a file that its holder removes, while another locks a new file in its place."""
    lock, waits, enters = tmp_path / "lock", threading.Event(), threading.Event()

    def wait() -> None:
        with locked(lock, on_wait=waits.set):
            enters.set()

    former, new = locked(lock), locked(lock)
    former.__enter__()
    thread = threading.Thread(target=wait)
    thread.start()
    assert waits.wait(10)
    lock.unlink()
    new.__enter__()
    former.__exit__(None, None, None)
    assert not enters.wait(0.2)
    new.__exit__(None, None, None)
    assert enters.wait(10)
    thread.join(10)
