"""Tests of: dualtrain.data.prefetch: order, bounds, errors, and that it always ends."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from dualtrain.data.batches import Batch
from dualtrain.data.prefetch import Prefetcher
from dualtrain.method.mixing import Slot, Stream


def slot(index: int) -> Slot:
    return Slot(index=index, objective="ar", stream="ar", first_sequence=2 * index, loss_scale=1.0)


class Source:
    """Batches that say which they are; may fail, wait, or count."""

    def __init__(self, *, fail_at: int | None = None, gate: threading.Event | None = None) -> None:
        self.made: list[int] = []
        self._fail_at = fail_at
        self._gate = gate

    def batch(self, stream: Stream, first_sequence: int) -> Batch:
        if self._gate is not None:
            self._gate.wait(20)
        if first_sequence == self._fail_at:
            raise OSError("disk gone")
        self.made.append(first_sequence)
        ids = torch.tensor([first_sequence])
        return Batch(ids[:, None], ids[:, None], ids[:, None], ids, stream, ((0,),))


def wait_until(condition: object, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_batches_come_in_order_and_end() -> None:
    with Prefetcher(Source(), map(slot, range(20)), depth=3) as prefetcher:
        found = [(s.index, batch.sequence_ids.item()) for s, batch in prefetcher]
    assert found == [(i, 2 * i) for i in range(20)]


def test_no_more_than_depth_are_made_ahead() -> None:
    source = Source()
    with Prefetcher(source, map(slot, itertools.count()), depth=4) as prefetcher:
        wait_until(lambda: len(source.made) == 5)  # four ready, one in hand
        time.sleep(0.05)
        assert len(source.made) == 5
        next(prefetcher)
        wait_until(lambda: len(source.made) == 6)


def test_error_comes_in_its_turn_and_stays() -> None:
    with Prefetcher(Source(fail_at=4), map(slot, range(9)), depth=8) as prefetcher:
        assert [next(prefetcher)[0].index for _ in range(2)] == [0, 1]
        for _ in range(2):
            with pytest.raises(OSError, match="disk gone"):
                next(prefetcher)


def test_error_of_the_slots_is_raised_too() -> None:
    def slots() -> Iterator[Slot]:
        yield slot(0)
        raise ZeroDivisionError

    with Prefetcher(Source(), slots(), depth=2) as prefetcher:
        next(prefetcher)
        with pytest.raises(ZeroDivisionError):
            next(prefetcher)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("consumed", [0, 3])
def test_close_ends_a_full_endless_reader(consumed: int) -> None:
    source = Source()
    prefetcher = Prefetcher(source, map(slot, itertools.count()), depth=2)
    for _ in range(consumed):
        next(prefetcher)
    wait_until(lambda: len(source.made) == consumed + 3)
    prefetcher.close()
    assert not prefetcher._thread.is_alive()
    prefetcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(prefetcher)


@pytest.mark.timeout(30)
def test_close_does_not_wait_for_ever_for_a_stuck_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualtrain.data.prefetch._JOIN_S", 0.1)
    gate = threading.Event()
    prefetcher = Prefetcher(Source(gate=gate), map(slot, range(3)), depth=2)
    prefetcher.close()
    gate.set()
    prefetcher._thread.join(10)
    assert not prefetcher._thread.is_alive()


@pytest.mark.gpu
def test_pinned_batches() -> None:
    with Prefetcher(Source(), map(slot, range(2)), depth=2, pin_memory=True) as prefetcher:
        batches = [batch for _, batch in prefetcher]
    assert [batch.sequence_ids.item() for batch in batches] == [0, 2]
    parts = [(b.inputs, b.targets, b.document_ids, b.sequence_ids) for b in batches]
    assert all(tensor.is_pinned() for tensors in parts for tensor in tensors)


def test_waiting_is_counted() -> None:
    gate = threading.Event()
    with Prefetcher(Source(gate=gate), map(slot, range(3)), depth=3) as prefetcher:
        threading.Timer(0.2, gate.set).start()
        next(prefetcher)
        assert 0.1 < prefetcher.wait_s < 5
        waited = prefetcher.wait_s
        wait_until(lambda: len(prefetcher._ready) == 2)
        next(prefetcher)
        assert prefetcher.wait_s == waited, "a batch that is ready costs no waiting"
