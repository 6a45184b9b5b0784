"""``data convert`` with a URL as output, through the uploaders of ``streaming``.

A dataset is made in a local directory first. ``dataset.json`` goes last, as it is written last on a
disk: a directory without it is no dataset, whatever interrupted the upload.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from data_tools.accept import check_made_alike
from data_tools.reporting import Report, StageProgress
from data_tools.view import ConversionView, build_with_view, print_facts, say
from dualtrain.common.errors import UserError
from dualtrain.common.files import writing
from dualtrain.common.locks import locked
from dualtrain.data.dataset import (
    DATASET_FILE,
    INDEX_FILE,
    LEFT_OUT_FILE,
    LENGTHS_FILE,
    TEXT_BYTES_FILE,
    DatasetInfo,
)
from dualtrain.data.remote import fetch_info
from dualtrain.recipe.schema import BuildSection

if TYPE_CHECKING:
    from dualtrain.data.mds import CloudUploader

_TRIES = 3
_REPEAT = "nothing is lost here: correct the cause and give the same command again"


def is_remote(out: str) -> bool:
    """Whether an output is a URL, and not a path."""
    return "://" in out or out.startswith("dbfs:/")


def check_destination(remote: str) -> None:
    """Raise UserError unless something can be uploaded there, as far as its provider tells now."""
    _open(remote.rstrip("/"))


def convert_remote(
    build: BuildSection, url: str, local: Path | None, *, workers: int | None
) -> None:
    """Make a dataset on this machine and upload it, unless it is there."""
    existing = fetch_info(url)
    if existing is not None:
        check_made_alike(url, existing, build)
        print_facts(url, existing)
        say(f"{url} is there already, made with the same settings")
        return
    check_destination(url)  # before hours of work
    path = local or _upload_directory(url)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent / f".{path.name}.upload.lock", remove=True):
        if local is None and _holds_another(path, build):
            say(f"{path}, left by an unfinished upload of something else, is removed")
            shutil.rmtree(path)
        build_with_view(build, path, workers=workers)
        with ConversionView() as view:
            upload_dataset(path, url, report=view)
        if local is None:
            shutil.rmtree(path)
    say(f"uploaded to {url}")


def _holds_another(path: Path, build: BuildSection) -> bool:
    """Whether there is a dataset that was made differently."""
    try:
        if path.exists():
            check_made_alike(str(path), DatasetInfo.load(path), build)
    except UserError:
        return True
    return False


def _upload_directory(url: str) -> Path:
    """Where the dataset for a URL is made: the same place each time, to go on after a failure."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    return cache / "dualtrain" / "uploads" / digest


def upload_dataset(local: Path, remote: str, *, report: Report | None = None) -> None:
    """Upload a dataset; what is there already as a whole is not sent again.

    Args:
        remote: URL of a directory: ``s3://``, ``gs://``, ``hf://datasets/…``, ….

    Raises:
        UserError: Another dataset is there; the upload failed, or not all of it arrived.
    """
    remote, info = remote.rstrip("/"), DatasetInfo.load(local)
    names = _file_names(local, info)
    total = sum((local / name).stat().st_size for name in [*names, DATASET_FILE])
    with tempfile.TemporaryDirectory(prefix="dualtrain-") as folder:
        upload = _Upload(remote, local, Path(folder))
        existing = fetch_info(remote)
        if existing is not None:
            _check_same(remote, info, existing)
            return
        done = 0
        for name in [*names, DATASET_FILE]:
            if name == DATASET_FILE:
                upload.check(names)
            upload.send(name)
            done += (local / name).stat().st_size
            if report is not None:
                report.show(StageProgress("uploading", done, total, "bytes"))


class _Upload:
    """One uploader, and what it does about failures."""

    def __init__(self, remote: str, local: Path, folder: Path) -> None:
        self._remote, self._local = remote, local
        self._uploader = _open(remote, local)
        self._prefix = ""
        if remote.startswith("hf://"):
            # streaming 0.13's uploader leaves out the part of the URL below the repository, which
            # its downloader reads. To be removed when the two agree.
            self._prefix = "".join(f"{part}/" for part in remote.split("/")[5:])
        root = folder / self._prefix if self._prefix else folder / "dataset"
        root.parent.mkdir(parents=True, exist_ok=True)
        root.symlink_to(local.resolve(), target_is_directory=True)
        self._uploader.local = str(folder if self._prefix else root)

    def send(self, name: str) -> None:
        try:
            self._uploader.upload_file(self._prefix + name)
        # Every provider's library has its own exceptions, without a common base.
        except Exception as error:
            raise _failed(self._remote, name, error, self._local) from error

    def check(self, names: list[str]) -> None:
        """Raise UserError unless the files have arrived whole, where the provider can tell."""
        try:
            found = self._sizes()
        except Exception as error:
            raise _failed(self._remote, "", error, self._local) from error
        if found is None:
            return
        for name in names:
            size = (self._local / name).stat().st_size
            if found.get(name) != size:
                there = "is not there" if name not in found else f"has {found[name]:,} bytes"
                raise UserError(
                    f"{self._remote}/{name}", f"{there} after the upload", f"{size:,}", _REPEAT
                )

    def _sizes(self) -> dict[str, int] | None:
        """Bytes of each file that is there, by name; None where they cannot be listed."""
        client = getattr(self._uploader, "s3", None)
        if client is None:
            return None
        url = urlparse(self._remote)
        prefix = url.path.strip("/") + "/" if url.path.strip("/") else ""
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=url.netloc, Prefix=prefix)
        entries = [entry for page in pages for entry in page.get("Contents", [])]
        return {entry["Key"].removeprefix(prefix): entry["Size"] for entry in entries}


def _open(remote: str, local: Path | None = None) -> CloudUploader:
    from dualtrain.data.mds import UPLOADERS, CloudUploader

    if urlparse(remote).scheme not in UPLOADERS:
        known = sorted(name for name in UPLOADERS if name and ":" not in name)
        raise UserError(
            remote,
            "is not a place that datasets can be uploaded to",
            "a path, or a URL that begins with " + ", ".join(f"{name}://" for name in known),
        )
    try:
        # A URL alone, because not every uploader takes a pair; it then makes an empty directory
        # of its own, which we do without.
        uploader = CloudUploader.get(
            remote + "/" if remote.startswith("hf://") else remote,
            keep_local=True,
            retry=_TRIES,
        )
    except Exception as error:
        raise _failed(remote, "", error, local) from error
    Path(uploader.local).rmdir()
    return uploader


def _failed(remote: str, name: str, error: Exception, local: Path | None) -> UserError:
    text = " ".join(str(error).split())
    return UserError(
        f"{remote}/{name}".rstrip("/"),
        f"cannot be uploaded: {type(error).__name__}: {text}",
        "a directory in an existing bucket, and the rights to write there",
        f"the dataset is in {local}; {_REPEAT}" if local else "nothing is made yet",
    )


def _file_names(local: Path, info: DatasetInfo) -> list[str]:
    """Every file but ``dataset.json``, in the order of the upload: what others refer to first."""
    shards, indexes = [], []
    for split in info.splits:
        index = json.loads((local / split / INDEX_FILE).read_bytes())
        shards += [f"{split}/{entry['raw_data']['basename']}" for entry in index["shards"]]
        indexes.append(f"{split}/{INDEX_FILE}")
    lengths = [f"{split}/{LENGTHS_FILE}" for split in info.splits]
    also = [LEFT_OUT_FILE, *(f"{split}/{TEXT_BYTES_FILE}" for split in info.splits)]
    optional = [name for name in also if (local / name).exists()]
    return [*shards, *lengths, info.tokenizer_file, *optional, *indexes]


def _check_same(remote: str, info: DatasetInfo, existing: DatasetInfo) -> None:
    if existing.fingerprint != info.fingerprint:
        raise UserError(
            remote,
            f"holds another dataset, with fingerprint {existing.fingerprint}",
            f"nothing, or the dataset {info.fingerprint}",
            "give another URL, or remove what is there",
        )
