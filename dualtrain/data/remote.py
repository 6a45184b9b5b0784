"""A dataset in an object store: its files, one by one, through the downloaders of ``streaming``.

``assemble`` calls :func:`fetch_facts` before a dataset is opened; ``shard_cache`` fetches shards
while it is read; ``corpus`` and ``data_tools`` look at :func:`fetch_info`. A remote is any URL that
``streaming`` can download from (``s3://``, ``gs://``, ``hf://``, …), ``file://`` or a plain path.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dualtrain.common.errors import UserError
from dualtrain.common.files import DISK_FULL, file_hash, user_path
from dualtrain.common.locks import locked
from dualtrain.data.dataset import (
    DATASET_FILE,
    INDEX_FILE,
    LENGTHS_FILE,
    DatasetInfo,
    TokenDataset,
)

if TYPE_CHECKING:
    from dualtrain.data.mds import CloudDownloader

STATE_DIR = ".remote"
"""Directory of a local copy for locks and for files that are still coming in."""
ORIGIN_FILE = "origin"
"""File in it that marks a directory which :func:`fetch_facts` has made; it holds the URL."""

_FILE_SCHEME = "file://"
_TIMEOUT_S = 60.0
_WAITS_S = (1.0, 4.0)
_MISSING = frozenset({"404", "NoSuchKey", "NoSuchBucket"})
_FORBIDDEN = frozenset({"401", "403", "AccessDenied"})


class MissingRemoteFile(UserError):
    """The object store answers, and has no such file."""


class Remote:
    """The files of one remote directory. Safe to use from several threads.

    Args:
        url: The directory; a trailing slash makes no difference.

    Raises:
        UserError: No downloader knows URLs of this kind.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or "/"
        # The downloaders of streaming know plain paths, but not the scheme for them.
        path = self.url.removeprefix(_FILE_SCHEME)
        self.path = None if "://" in path or path.startswith("dbfs:") else user_path(path)
        self._base = self.url if self.path is None else str(self.path)
        self._clients = threading.local()
        self._closed = threading.Event()
        self._client()

    def download(
        self,
        name: str,
        into: Path,
        *,
        size_bytes: int | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        """Fetch a file, in up to three tries.

        Args:
            into: Where it goes, on a local disk; its directory exists, and downloaders may put
                more files there. There is nothing at `into` after an error.
            hashes: Of its content, by the algorithms' names.

        Raises:
            MissingRemoteFile: There is no such file.
            UserError: It cannot be fetched, or its content is not the expected one.
        """
        for wait_s in (*_WAITS_S, None):
            into.unlink(missing_ok=True)
            error = self._fetch(name, into) or self._damage(name, into, size_bytes, hashes or {})
            if error is None:
                return
            into.unlink(missing_ok=True)
            if isinstance(error, _Lasting):
                raise error.reason
            if wait_s is None or self._closed.wait(wait_s):
                raise error

    def close(self) -> None:
        """Let no download be tried again: nobody waits for it any more."""
        self._closed.set()

    def _client(self) -> CloudDownloader:
        from dualtrain.data.mds import CloudDownloader

        if not hasattr(self._clients, "mine"):
            try:
                self._clients.mine = CloudDownloader.get(self._base)
            except ValueError:
                raise UserError(
                    self.url,
                    "is not a place that datasets can be fetched from",
                    "a URL such as s3://bucket/directory, gs://… or hf://…, or a directory",
                ) from None
            except ImportError as error:
                what = f"needs a package that is not installed: {error}"
                raise UserError(self.url, what) from None
        return self._clients.mine

    def _fetch(self, name: str, into: Path) -> UserError | None:
        where = f"{self.url}/{name}"
        try:
            self._client().download(f"{self._base}/{name}", str(into), _TIMEOUT_S)
        except UserError as error:
            return _Lasting(error)
        # Every provider's library has its own exceptions, without a common base; none is swallowed:
        # all but those known to last are tried again, and the last one reaches the user.
        except Exception as error:
            return _explained(where, into, error)
        return None

    def _damage(
        self, name: str, file: Path, size_bytes: int | None, hashes: Mapping[str, str]
    ) -> UserError | None:
        where, hint = f"{self.url}/{name}", "upload the dataset again"
        if size_bytes is not None and (size := file.stat().st_size) != size_bytes:
            expected = f"{size_bytes:,} as in {INDEX_FILE}"
            return UserError(where, f"has {size:,} bytes", expected, hint)
        for algorithm in hashes.keys() & hashlib.algorithms_guaranteed:
            found = file_hash(file, algorithm)
            if found != hashes[algorithm]:
                expected = f"{hashes[algorithm][:12]}… as in {INDEX_FILE}"
                what = f"is damaged: its {algorithm} is {found[:12]}…"
                return UserError(where, what, expected, hint)
        return None


def fetch_info(url: str) -> DatasetInfo | None:
    """The facts of the dataset at `url`; None if there is no ``dataset.json``."""
    with tempfile.TemporaryDirectory(prefix="dualtrain-") as folder:
        try:
            return _download_info(Remote(url), Path(folder))
        except MissingRemoteFile:
            return None


def fetch_facts(url: str, path: str | Path) -> None:
    """Fetch everything but the shards of a dataset, so that it can be opened.

    Files that are there already stay. Without a connection a dataset that is here as a whole, with
    all its shards, will do. Processes that call this at the same time wait for each other.

    Args:
        path: Local directory for it; made if need be.

    Raises:
        UserError: The dataset cannot be fetched, or `path` holds another one.
    """
    remote, path = Remote(url), user_path(path)
    if remote.path is not None and remote.path.resolve() == path.resolve():
        raise UserError(
            "data.remote", f"{url!r} is data.path itself", "a local directory for a copy of it"
        )
    try:
        (path / STATE_DIR).mkdir(parents=True, exist_ok=True)
        with locked(path / STATE_DIR / "facts.lock"):
            incoming = path / STATE_DIR / "facts"
            shutil.rmtree(incoming, ignore_errors=True)
            incoming.mkdir()
            _fetch_missing(remote, path, incoming)
            shutil.rmtree(incoming, ignore_errors=True)
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> UserError:
    """What to tell the user when files cannot be put in `path`."""
    return UserError(
        str(path),
        f"cannot hold a copy of the dataset: {error.strerror or error}",
        "a writable local directory with room for it",
        "correct data.path, or free some space",
    )


def _fetch_missing(remote: Remote, path: Path, incoming: Path) -> None:
    local = DatasetInfo.load(path) if (path / DATASET_FILE).exists() else None
    if local is None and any(path.glob("*/*.mds")):
        raise UserError(
            str(path),
            f"has shards but no {DATASET_FILE}, so they cannot be told from those of {remote.url}",
            "an empty directory, or a copy of that dataset",
            "remove it, or give another data.path",
        )
    try:
        stored = _download_info(remote, incoming)
    except UserError:
        if local is not None and _is_whole(path, local):
            return
        raise
    if local is not None and local.fingerprint != stored.fingerprint:
        raise UserError(
            str(path),
            f"holds another dataset than {remote.url}: fingerprint {local.fingerprint}",
            stored.fingerprint,
            "give another data.path, or remove the directory if it is only a copy",
        )
    if local is None:
        (path / STATE_DIR / ORIGIN_FILE).write_text(remote.url + "\n")
    for name in _fact_files(stored):
        if not (path / name).exists():
            (path / name).parent.mkdir(exist_ok=True)
            remote.download(name, incoming / Path(name).name)
            (incoming / Path(name).name).replace(path / name)
    if local is None:
        (incoming / DATASET_FILE).replace(path / DATASET_FILE)


def _fact_files(info: DatasetInfo) -> list[str]:
    names = [f"{split}/{file}" for split in info.splits for file in (INDEX_FILE, LENGTHS_FILE)]
    return [info.tokenizer_file, *names]


def _download_info(remote: Remote, folder: Path) -> DatasetInfo:
    remote.download(DATASET_FILE, folder / DATASET_FILE)
    where = f"{remote.url}/{DATASET_FILE}"
    try:
        info = DatasetInfo.load(folder)
    except UserError as error:
        raise UserError(where, error.what, error.expected, "upload the dataset again") from None
    # It names a file to be written here, and came from elsewhere.
    if Path(info.tokenizer_file).name != info.tokenizer_file:
        raise UserError(where, f"names {info.tokenizer_file!r} as tokenizer", "a plain file name")
    return info


def _is_whole(path: Path, info: DatasetInfo) -> bool:
    try:
        for split in info.splits:
            dataset = TokenDataset.open(path, split, check=False)
            dataset.check_tokenizer()
            dataset.check_shards()
    except UserError:
        return False
    return True


class _Lasting(UserError):
    """Carries an error that another try would not mend."""

    def __init__(self, reason: UserError) -> None:
        self.reason = reason
        super().__init__(reason.where, reason.what)


def _explained(where: str, into: Path, error: Exception) -> UserError:
    code, text = _status(error), " ".join(str(error).split())
    if isinstance(error, FileNotFoundError) or code in _MISSING:
        return _Lasting(MissingRemoteFile(where, "is not there", hint="check the URL"))
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return _Lasting(unwritable(into.parent, error))
    hint = "check the connection, the URL and the credentials"
    failure = UserError(where, f"cannot be fetched: {type(error).__name__}: {text}", hint=hint)
    lasts = code in _FORBIDDEN or isinstance(error, (ImportError, PermissionError))
    return _Lasting(failure) if lasts else failure


def _status(error: Exception) -> str:
    """The HTTP status or the provider's code for it, wherever its library keeps it; or nothing."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    for holder in (error, response):
        for name in ("status_code", "code", "status"):
            if isinstance(value := getattr(holder, name, None), (int, str)):
                return str(int(value)) if isinstance(value, int) else value
    return ""
