"""Shards of a dataset in an object store, of which a bounded number is in a local directory.

``assemble`` makes one :class:`ShardCache` a process for both splits; a ``TokenDataset`` asks it for
each shard it reads. The ranks of a machine share the directory, and agree by locks alone:

- a shard's own lock is held shared by who reads it, exclusively by who fetches or removes it;
- ``room.lock``, held for moments, guards the sum of what is there and what is coming in. A shard
  comes in inside a directory of its own, named by its size, which counts before the first byte.

Who holds ``room.lock`` never waits for a shard's lock, and who waits for room keeps no other shard,
so somebody always goes on. The kernel frees the locks of a process that dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from dualtrain.data.dataset import INDEX_FILE, Shard, Split
from dualtrain.data.locks import flock, locked
from dualtrain.data.remote import ORIGIN_FILE, STATE_DIR, Remote, unwritable
from dualtrain.disk import user_path
from dualtrain.errors import UserError

_THREADS = 4
_RETRY_S = 0.02
_SEPARATOR = "~"


class ShardCache:
    """The shards of all splits of one dataset, fetched when they are needed.

    Args:
        url: The dataset.
        path: Its local copy, prepared by :func:`~dualtrain.data.remote.fetch_facts`.
        limit_bytes: Of the shards in `path`, those coming in included; None for no limit. Shards
            that were not read for longest go first.
        reader: This process among those of this machine that share `path`.
        readers: Their number.

    Raises:
        UserError: The limit is below the largest shard, or would remove shards of a dataset that
            was not fetched.
    """

    def __init__(
        self,
        url: str,
        path: str | Path,
        *,
        limit_bytes: int | None = None,
        reader: int = 0,
        readers: int = 1,
    ) -> None:
        self.path = user_path(path)
        self._state = self.path / STATE_DIR
        self._incoming = self._state / "incoming"
        self._locks = self._state / "locks"
        self._limit = limit_bytes
        self._reader, self._readers = reader, readers
        self._splits = [file.parent.name for file in self.path.glob(f"*/{INDEX_FILE}")]
        self._check_limit()
        self._remote = Remote(url)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")
        self._ahead: dict[str, Future[None]] = {}
        self._background: threading.Thread | None = None
        self._closed = threading.Event()
        try:
            for folder in (self._incoming, self._locks):
                folder.mkdir(parents=True, exist_ok=True)
            with self._room():
                self._make_room(0)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def is_local(self, split: Split, shard: Shard) -> bool:
        """Whether a shard is here now, with the right size."""
        try:
            return (self.path / split / shard.name).stat().st_size == shard.bytes
        except FileNotFoundError:
            return False

    @contextmanager
    def reading(self, split: Split, shard: Shard) -> Iterator[None]:
        """Have a shard in its place for the time of the block, fetched first if need be.

        Raises:
            UserError: It cannot be fetched; names it.
        """
        key = _key(split, shard)
        ahead = self._ahead.pop(key, None)
        if ahead is not None:
            ahead.result()
        with self._shard_lock(key, fcntl.LOCK_SH):
            if self.is_local(split, shard):
                self._touch(split, shard)
                yield
                return
        # Once it is ours we keep it until it is read, lest it go again in between.
        with self._shard_lock(key, fcntl.LOCK_EX):
            self._ensure(split, shard)
            self._touch(split, shard)
            yield

    def fetch_ahead(self, split: Split, shards: Sequence[Shard]) -> None:
        """Start fetching the shards that are needed next, several at a time.

        What fails is raised when that shard is read. With a limit, only as many as do not push each
        other out: this process's share of the room.
        """
        room = None if self._limit is None else self._limit // self._readers
        for shard in {shard.name: shard for shard in shards}.values():
            if room is not None and (room := room - shard.bytes) < 0:
                return
            key = _key(split, shard)
            pending = self._ahead.get(key)
            if self.is_local(split, shard) or (pending is not None and not pending.done()):
                continue
            self._ahead[key] = self._pool.submit(self._fetch_locked, split, shard)

    def fetch_all(self, split: Split, shards: Sequence[Shard]) -> None:
        """Fetch shards one after another in the background: those of the unique tokens.

        The processes of a machine begin at different shards, and leave alone what another fetches.

        Raises:
            UserError: There is no room for them: they are all read, again and again.
        """
        if self._background is not None:
            return
        self._check_room(split, shards)
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
            if self.is_local(split, shard):
                continue
            key = _key(split, shard)
            with contextlib.suppress(BlockingIOError):
                try:
                    with self._shard_lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB):
                        self._ensure(split, shard)
                except UserError as error:
                    failed: Future[None] = Future()
                    failed.set_exception(error)
                    self._ahead[key] = failed  # for who reads this shard
                    return

    def _fetch_locked(self, split: Split, shard: Shard) -> None:
        with self._shard_lock(_key(split, shard), fcntl.LOCK_EX):
            self._ensure(split, shard)

    def _ensure(self, split: Split, shard: Shard) -> None:
        """Fetch a shard unless it is here; for who holds its lock exclusively."""
        if self.is_local(split, shard):
            return
        file = self.path / split / shard.name
        try:
            file.unlink(missing_ok=True)
            incoming = self._reserve(split, shard)
        except OSError as error:
            raise unwritable(self.path, error) from None
        try:
            self._remote.download(
                f"{split}/{shard.name}",
                incoming / shard.name,
                size_bytes=shard.bytes,
                hashes=shard.hashes,
            )
            _sync(incoming / shard.name)
            with self._room():
                (incoming / shard.name).replace(file)
                shutil.rmtree(incoming)
        except OSError as error:
            raise unwritable(self.path, error) from None
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _reserve(self, split: Split, shard: Shard) -> Path:
        """Wait until there is room for a shard, and take it by a directory to download into."""
        incoming = self._incoming / f"{_key(split, shard)}{_SEPARATOR}{shard.bytes}"
        while True:
            with self._room():
                # Left by a process that died: the shard's lock is ours, so nobody uses them.
                for left in self._incoming.glob(f"{_key(split, shard)}{_SEPARATOR}*"):
                    shutil.rmtree(left, ignore_errors=True)
                if self._make_room(shard.bytes):
                    incoming.mkdir()
                    return incoming
            if self._closed.wait(_RETRY_S):
                raise UserError(str(self.path / split / shard.name), "is no longer needed")

    def _make_room(self, needed: int) -> bool:
        """Remove shards not read for long, until `needed` bytes fit; for who holds ``room.lock``.

        Returns:
            Whether they fit: all others may be in use just now.
        """
        coming = self._coming_in()
        if self._limit is None:
            return True
        shards = sorted(self._present())
        used = coming + sum(size for _, size, _ in shards)
        for _, size, file in shards:
            if used + needed <= self._limit:
                break
            if self._remove_unused(file):
                used -= size
        return used + needed <= self._limit

    def _coming_in(self) -> int:
        """Bytes of the shards that processes are fetching; clears up after those that died."""
        total = 0
        for folder in self._incoming.iterdir():
            key, _, size = folder.name.rpartition(_SEPARATOR)
            try:
                with self._shard_lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:
                total += int(size)
        return total

    def _present(self) -> Iterator[tuple[int, int, Path]]:
        """When each shard was last read, its size and its file."""
        for split in self._splits:
            for file in (self.path / split).glob("*.mds"):
                with contextlib.suppress(FileNotFoundError):  # a damaged one, just removed
                    status = file.stat()
                    yield status.st_mtime_ns, status.st_size, file

    def _remove_unused(self, file: Path) -> bool:
        key = f"{file.parent.name}{_SEPARATOR}{file.name}"
        try:
            with self._shard_lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB):
                file.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        return True

    def _touch(self, split: Split, shard: Shard) -> None:
        # Access times are often switched off, so the time of modification tells the last use.
        os.utime(self.path / split / shard.name)

    @contextmanager
    def _shard_lock(self, key: str, kind: int) -> Iterator[None]:
        # A descriptor of its own each time: that way threads exclude each other as processes do.
        descriptor = os.open(self._locks / key, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            flock(descriptor, kind, path=self._locks / key)
            yield
        finally:
            os.close(descriptor)

    def _room(self) -> contextlib.AbstractContextManager[None]:
        return locked(self._state / "room.lock")

    def _check_room(self, split: Split, shards: Sequence[Shard]) -> None:
        """Refuse a limit, or a disk, that cannot hold shards and the other splits' together."""
        others = sum(
            size for other in self._splits if other != split for size in self._sizes(other)
        )
        needed = sum(shard.bytes for shard in shards) + others
        if self._limit is not None and needed > self._limit:
            raise UserError(
                "data.cache_limit_gib",
                f"{self._limit / 2**30:.3g}, but the shards of the unique tokens and of held-out "
                f"text take {needed / 2**30:.3g} GiB, and sequences come from all of them in "
                "random order: shards would be fetched again in every step",
                f"{1.001 * needed / 2**30:.4g} or more, or null",
                "or use fewer unique tokens, such as by more repetitions",
            )
        missing = sum(shard.bytes for shard in shards if not self.is_local(split, shard))
        if missing > (free := shutil.disk_usage(self.path).free):
            raise UserError(
                str(self.path),
                f"has {free / 2**30:.3g} GiB free, and the shards of the unique tokens that are "
                f"still to be fetched take {missing / 2**30:.3g} GiB",
                "room for all of them, since sequences come from all of them in random order",
                "set data.path to a larger disk, or use fewer unique tokens",
            )

    def _sizes(self, split: str) -> list[int]:
        """Bytes of every shard of a split."""
        index = json.loads((self.path / split / INDEX_FILE).read_bytes())
        return [entry["raw_data"]["bytes"] for entry in index["shards"]]

    def _check_limit(self) -> None:
        if self._limit is None:
            return
        where = "data.cache_limit_gib"
        if not (self._state / ORIGIN_FILE).exists():
            raise UserError(
                where,
                f"would remove shards of {self.path}, which was not fetched from data.remote",
                "null, or another data.path",
            )
        if (largest := max(n for split in self._splits for n in self._sizes(split))) > self._limit:
            raise UserError(
                where,
                f"{self._limit / 2**30:.3g} GiB ({self._limit:,} bytes) has no room for the "
                f"largest shard, of {largest:,} bytes",
                f"at least {largest / 2**30:.3g}; more is faster",
            )


def _key(split: str, shard: Shard) -> str:
    return f"{split}{_SEPARATOR}{shard.name}"


def _sync(file: Path) -> None:
    # Its hash is never looked at again, so it must not lose its content in a power cut.
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
