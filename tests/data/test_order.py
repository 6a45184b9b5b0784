"""Tests of: dualtrain.data.plan, part_order, units: the order, against one that is written naively.

The order of the data is part of the method and of every run that was ever begun. Here it is written
down once more, position by position, as the docstring of ``plan`` says it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from dualtrain.common.randomness import KeyedPermutation, generator
from dualtrain.data import part_order, plan, units
from dualtrain.data.plan import Rotation, StreamPlan
from dualtrain.data.plan_files import PlanFiles
from dualtrain.data.units import Subset, Units
from dualtrain.method.mixing import Mixture, Stream

Position = tuple[int, int]
Piece = list[Position]
Ranges = Callable[[int], list[tuple[int, int]]]

HEAVY = [int(n) for n in 1 + 4 * np.random.default_rng(0).pareto(1.1, 400)]
CORPORA = {
    "one document": [1700],
    "forty": [17 * (n % 7) + 1 + n for n in range(40)],
    "a heavy tail": HEAVY,
    "one longer than all others": [9, 30, 2, 1, 44, 600, 3],
    "tiny ones": [1 + n % 3 for n in range(150)],
}


def cut_in_pieces(lengths: list[int], unique: int, length: int) -> list[Piece]:
    """Documents as lists of positions, long ones in pieces; the further pieces at the end."""
    longest = max(-(-unique // 64), 16 * length)
    firsts, further = [], []
    left = unique
    for document, whole in enumerate(lengths):
        whole = min(whole, left)
        left -= whole
        positions = [(document, n) for n in range(whole)]
        if not positions:
            break
        size = -(-whole // -(-whole // longest))
        pieces = [positions[n : n + size] for n in range(0, whole, size)]
        firsts.append(pieces[0])
        further += pieces[1:]
    return firsts + further


def arcs(mixture: Mixture, stream: Stream, total: int, length: int) -> Ranges:
    """What the stream has of an epoch, as ranges of the circle."""
    ar_walks = mixture.alpha_at(0) <= Fraction(1, 2)

    def walked(epoch: int) -> int:
        ar = mixture.ar_tokens(epoch * total, length)
        return ar if ar_walks else epoch * total - ar

    def ranges(epoch: int) -> list[tuple[int, int]]:
        begin, end = walked(epoch), walked(epoch + 1)
        end -= begin - begin % total
        begin %= total
        if (stream == "ar") == ar_walks:
            return [(begin, min(end, total)), (0, max(0, end - total))]
        return [(max(0, end - total), begin), (min(end, total), total)]

    return ranges


def naive_parts(
    pieces: list[Piece], stream: Stream, mixture: Mixture | None, length: int, seed: int
) -> Iterator[Piece]:
    """The positions of part after part of a stream."""
    total = sum(map(len, pieces))
    number = {"ar": 0, "diffusion": 1, "all": 2}[stream]
    starts, ranges = [0] * len(pieces), lambda epoch: [(0, total), (0, 0)]
    if mixture is not None:
        at = 0
        for piece in generator(seed, "circle").permutation(len(pieces)).tolist():
            starts[piece], at = at, at + len(pieces[piece])
        ranges = arcs(mixture, stream, total, length)
    for epoch in range(10**6):
        order = generator(seed, "document order", number, epoch).permutation(len(pieces)).tolist()
        for begin, end in ranges(epoch):
            first, middle, last = [], [], []
            for piece in order:
                start = starts[piece] if mixture is not None else 0
                stop = start + len(pieces[piece])
                if mixture is None:
                    middle += pieces[piece] if end else []
                    continue
                kept = pieces[piece][max(0, begin - start) : max(0, end - start)]
                is_cut = start < begin, stop > end
                place = {(True, False): first, (False, True): last}.get(is_cut, middle)
                place += kept if start < end and stop > begin else []
            yield first + middle + last


def naive_sequences(
    parts: Iterator[Piece], stream: Stream, length: int, seed: int, count: int
) -> list[Piece]:
    number = {"ar": 0, "diffusion": 1, "all": 2}[stream]
    positions: Piece = []
    bounds = [0]
    while len(positions) < (count + 1) * length or bounds[-1] == bounds[-2]:
        positions += next(parts)
        bounds.append(len(positions))
    windows = [positions[n : n + length] for n in range(0, len(positions), length)]
    found = list(windows)
    for part, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        # Those that begin in the part and end in it, too.
        first, stop = -(-begin // length), end // length
        if stop > first:
            order = KeyedPermutation(stop - first, seed, "sequence order", number, part)
            found[first:stop] = [windows[first + order[n]] for n in range(stop - first)]
    return found[:count]


@pytest.mark.parametrize("block", [2, 1024])
@pytest.mark.parametrize("alpha", [None, *map(Fraction, ("0.0805", "1/2", "255/256"))])
@pytest.mark.parametrize("corpus", CORPORA)
def test_order_is_the_naive_one(
    corpus: str,
    alpha: Fraction | None,
    block: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also over blocks, chunks and slices of lengths that are tiny, and with eight bytes a unit."""
    lengths, length, seed = CORPORA[corpus], 7, 3
    if block < 1024:
        for module in (part_order, plan):
            monkeypatch.setattr(module, "BLOCK", block)
        for module in (part_order, plan, units):
            monkeypatch.setattr(module, "CHUNK", 4 * block)
        monkeypatch.setattr(units, "_FEWEST_IN_SLICE", 3)
        monkeypatch.setattr(part_order, "_SMALL_NUMBERS", 0)
    unique = int(sum(lengths) / Fraction("2.5"))
    mixture = None
    if alpha is not None:
        mixture = Mixture(alpha=alpha, steps=10**4, slots=3, micro_batch=2, rotation=True)
    np.save(tmp_path / "lengths.npy", np.array(lengths, dtype=np.int64))
    mapped = np.asarray(np.load(tmp_path / "lengths.npy", mmap_mode="r"))
    made = Units(Subset(mapped, unique_tokens=unique, append_eos=False), sequence_length=length)
    rotation = None
    if mixture is not None:
        rotation = Rotation(made, mixture=mixture, sequence_length=length, seed=seed)
    pieces = cut_in_pieces(lengths, unique, length)
    streams: tuple[Stream, ...] = ("all",) if mixture is None else ("ar", "diffusion")
    for stream in streams:
        found = StreamPlan(
            made,
            stream=stream,
            rotation=rotation,
            sequence_length=length,
            seed=seed,
            files=PlanFiles(None),
        )
        # Some epochs, or what a small alpha leaves of them.
        of_ar = Fraction(1) if alpha is None else alpha
        share = 1 - of_ar if stream == "diffusion" else of_ar
        count = max(3, int(3 * unique * share / length))
        parts = naive_parts(pieces, stream, mixture, length, seed)
        for index, wanted in enumerate(naive_sequences(parts, stream, length, seed, count)):
            spans = found.sequence(index)
            assert [(s.document, n) for s in spans for n in range(s.start, s.stop)] == wanted


def test_a_part_takes_four_bytes_a_unit_and_shares_the_shuffle_of_eight(tmp_path: Path) -> None:
    lengths = np.full(50_000, 9)
    made = Units(Subset(lengths, unique_tokens=None, append_eos=False), sequence_length=16)
    words = part_order.build_order(made, generator(1, "document order", 2, 0), None)
    assert words.nbytes <= 4.05 * 50_000
    expected = generator(1, "document order", 2, 0).permutation(50_000)
    assert np.array_equal(words[:50_000], expected)
