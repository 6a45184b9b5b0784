"""Shards of a dataset in an object store, fetched into a local directory, where they stay.

``assemble`` makes one :class:`ShardCache` a process for both splits; a ``TokenDataset`` asks it for
each shard it reads. The ranks of a machine share the directory: who fetches a shard holds a lock on
it, and it comes in beside its place, so that a shard that is there is whole.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dualtrain.common.errors import UserError
from dualtrain.common.files import sync, user_path
from dualtrain.common.locks import locked
from dualtrain.data.dataset import Shard, Split
from dualtrain.data.remote import STATE_DIR, Remote, unwritable

_THREADS = 4


class ShardCache:
    """The shards of all splits of one dataset, fetched when they are needed.

    Args:
        path: Its local copy, prepared by :func:`~dualtrain.data.remote.fetch_facts`.
        reader: This process among those of this machine that share `path`.
    """

    def __init__(self, url: str, path: str | Path, *, reader: int = 0, readers: int = 1) -> None:
        self.path = user_path(path)
        self._incoming = self.path / STATE_DIR / "incoming"
        self._locks = self.path / STATE_DIR / "locks"
        self._reader, self._readers = reader, readers
        self._remote = Remote(url)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")
        self._ahead: dict[str, Future[None]] = {}
        self._background: threading.Thread | None = None
        self._closed = threading.Event()
        try:
            for folder in (self._incoming, self._locks):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def is_local(self, split: Split, shard: Shard) -> bool:
        """Whether a shard is here now, with the right size."""
        try:
            return (self.path / split / shard.name).stat().st_size == shard.bytes
        except FileNotFoundError:
            return False

    def require(self, split: Split, shard: Shard) -> None:
        """Have a shard in its place, fetched first if need be."""
        ahead = self._ahead.pop(_key(split, shard), None)
        if ahead is not None:
            ahead.result()
        self._fetch(split, shard)

    def fetch_ahead(self, split: Split, shards: Sequence[Shard]) -> None:
        """Start fetching the shards that are needed next, several at a time.

        What fails is raised when that shard is read.
        """
        for shard in {shard.name: shard for shard in shards}.values():
            key = _key(split, shard)
            pending = self._ahead.get(key)
            if self.is_local(split, shard) or (pending is not None and not pending.done()):
                continue
            self._ahead[key] = self._pool.submit(self._fetch, split, shard)

    def fetch_all(self, split: Split, shards: Sequence[Shard]) -> None:
        """Fetch shards one after another in the background: those of the unique tokens.

        The processes of a machine begin at different shards, and leave alone what another fetches.

        Raises:
            UserError: The disk has no room for them: they are all read, again and again.
        """
        if self._background is not None:
            return
        missing = sum(shard.bytes for shard in shards if not self.is_local(split, shard))
        if missing > (free := shutil.disk_usage(self.path).free):
            raise UserError(
                str(self.path),
                f"has {free / 2**30:.3g} GiB free, and the shards of the unique tokens that are "
                f"still to be fetched take {missing / 2**30:.3g} GiB",
                "room for all of them, since sequences come from all of them in random order",
                "set data.path to a larger disk, or use fewer unique tokens",
            )
        first = len(shards) * self._reader // self._readers
        order = [*shards[first:], *shards[:first]]
        self._background = threading.Thread(
            target=self._fetch_in_order, args=(split, order), name="all-shards", daemon=True
        )
        self._background.start()

    def close(self) -> None:
        """Fetch nothing more; a download in progress comes to its end first."""
        self._closed.set()
        self._remote.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._background is not None:
            self._background.join()

    def _fetch_in_order(self, split: Split, shards: Sequence[Shard]) -> None:
        for shard in shards:
            if self._closed.is_set():
                return
            with contextlib.suppress(BlockingIOError):
                try:
                    self._fetch(split, shard, wait=False)
                except UserError as error:
                    failed: Future[None] = Future()
                    failed.set_exception(error)
                    self._ahead[_key(split, shard)] = failed  # for who reads this shard
                    return

    def _fetch(self, split: Split, shard: Shard, *, wait: bool = True) -> None:
        """Fetch a shard unless it is here.

        Raises:
            BlockingIOError: Another process or thread fetches it, and we are not to ``wait``.
        """
        if self.is_local(split, shard):
            return
        incoming = self._incoming / _key(split, shard)
        try:
            with locked(self._locks / incoming.name, wait=wait):
                if self.is_local(split, shard):
                    return
                shutil.rmtree(incoming, ignore_errors=True)  # of a process that died
                incoming.mkdir()
                try:
                    self._remote.download(
                        f"{split}/{shard.name}",
                        incoming / shard.name,
                        size_bytes=shard.bytes,
                        hashes=shard.hashes,
                    )
                    # Its hash is never looked at again, so a power cut must not take its content.
                    sync(incoming / shard.name)
                    (incoming / shard.name).replace(self.path / split / shard.name)
                finally:
                    shutil.rmtree(incoming, ignore_errors=True)
        except BlockingIOError:
            raise
        except OSError as error:
            raise unwritable(self.path, error) from None


def _key(split: Split, shard: Shard) -> str:
    return f"{split}~{shard.name}"
