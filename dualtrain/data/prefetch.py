"""Batches made ahead of the loop in a background thread, so that the loop never waits for data."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol

from dualtrain.data.batches import Batch
from dualtrain.method.mixing import Slot, Stream

_JOIN_S = 10.0


class BatchSource(Protocol):
    """What the prefetcher reads: :class:`~dualtrain.data.batches.TrainingData`."""

    def batch(self, stream: Stream, first_sequence: int) -> Batch: ...


class Prefetcher:
    """Iterate over (slot, batch), at most `depth` batches ahead of the consumer.

    An error while a batch is made is raised to the consumer when that batch's turn comes. Use it as
    a context manager, or call :meth:`close`.

    Args:
        slots: The slots in the order of the loop; may be endless.
        depth: Batches kept ready: steps ahead × slots of this rank in a step.
        pin_memory: Put tensors in page-locked memory (CUDA only).
    """

    def __init__(
        self, data: BatchSource, slots: Iterable[Slot], *, depth: int, pin_memory: bool = False
    ) -> None:
        self.wait_s = 0.0
        self._data = data
        self._depth = depth
        self._pin_memory = pin_memory
        self._ready: deque[tuple[Slot, Batch]] = deque()
        self._error: BaseException | None = None
        self._finished = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._work, args=(slots,), name="prefetch", daemon=True
        )
        self._thread.start()

    wait_s: float
    """Seconds that the consumer has waited for batches so far."""

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> tuple[Slot, Batch]:
        with self._changed:
            if self._closed:
                # Ending quietly would look like the end of training.
                raise RuntimeError("the prefetcher is closed")
            if not self._ready and not self._finished:
                began = time.perf_counter()
                self._changed.wait_for(lambda: self._ready or self._finished)
                self.wait_s += time.perf_counter() - began
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """Stop the thread and forget what it made; waits a while for a batch in the making."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(_JOIN_S)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _work(self, slots: Iterable[Slot]) -> None:
        try:
            for slot in slots:
                if not self._put(slot, self._make(slot)):
                    return
        except BaseException as error:
            # Not swallowed: it belongs to the consumer's thread, which raises it in its turn.
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _make(self, slot: Slot) -> Batch:
        batch = self._data.batch(slot.stream, slot.first_sequence)
        return batch.pin_memory() if self._pin_memory else batch

    def _put(self, slot: Slot, batch: Batch) -> bool:
        """Wait for room; whether the consumer still wants batches."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
            if self._closed:
                return False
            self._ready.append((slot, batch))
            self._changed.notify_all()
            return True
