"""Convert a source of text into a dataset: ``train/`` and ``val/`` shards, tokenizer, facts.

Called by ``dualtrain data convert`` and, for a recipe's ``data.build``, by ``dualtrain run``. The
source is read three times: to survey it (which documents, how large, which are held out), to train
the tokenizer unless one is given, and to encode. Tokens go through a flat file, because documents
are shuffled on disk and a corpus may be larger than memory.

All of it happens in a directory beside the target, which is renamed to the target when everything
has been read back. A conversion that fails or is killed leaves no target.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.readers import BUILTIN, Document, Source, open_source
from data_tools.spool import Spool
from data_tools.tokenizer import Tokenizer
from dualtrain.data.dataset import (
    DATASET_FILE,
    FORMAT,
    LENGTHS_FILE,
    TOKENIZER_FILE,
    TOKENS_FIELD,
    DatasetInfo,
    Split,
    SplitInfo,
    TokenDataset,
)
from dualtrain.data.locks import locked
from dualtrain.errors import UserError
from dualtrain.randomness import generator
from dualtrain.recipe.schema import BuildSection

Progress = Callable[[str, int, int], None]
"""Told (what is being done, how far it is, how far it goes or 0 if unknown)."""

SHARD_BYTES = 1 << 26

_SPLITS: tuple[Split, ...] = ("train", "val")
_BATCH_CHARACTERS = 1 << 20
_TOKENIZER_BYTES = 256 * 2**20
_HASHES = 1 << 64
_DOCUMENT_TOKENS = 1 << 30


def build_dataset(
    build: BuildSection,
    path: str | Path,
    *,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> DatasetInfo:
    """Make the dataset at `path`, or accept the one that is there if it was made the same way.

    Only one process builds at a time; others wait and take its result.

    Args:
        build: What to convert, and how.
        path: Directory to make.
        progress: Called now and then, see :data:`Progress`.
        shard_bytes: Largest size of a shard.

    Returns:
        The facts of the dataset.

    Raises:
        UserError: Unusable source or tokenizer; `path` holds something else; disk errors.
    """
    report: Progress = progress or (lambda stage, done, total: None)
    path = Path(os.path.abspath(Path(path).expanduser()))
    if (path / DATASET_FILE).exists():  # also where nothing may be written
        return _accept(path, build)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.parent / f".{path.name}.lock"
        with locked(lock, remove=True, on_wait=lambda: report("waiting for another build", 0, 0)):
            if (path / DATASET_FILE).exists():
                return _accept(path, build)
            if path.is_file() or (path.exists() and any(path.iterdir())):
                raise UserError(
                    str(path),
                    f"is in the way: it exists and has no {DATASET_FILE}",
                    "a new or empty directory",
                    "remove it or choose another path",
                )
            return _build_beside(build, path, report, shard_bytes)
    except OSError as error:
        place = error.filename or path
        raise UserError(str(place), f"cannot be written: {error.strerror or error}") from None


def _build_beside(
    build: BuildSection, path: Path, report: Progress, shard_bytes: int
) -> DatasetInfo:
    partial = path.parent / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed build: we hold the lock
    try:
        partial.mkdir()
        info = _Conversion(build, partial, report, shard_bytes).run()
        _flush(partial)
        partial.replace(path)
        return info
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _flush(directory: Path) -> None:
    """Have everything on the disk before the rename that declares it whole."""
    for place in [*directory.rglob("*"), directory]:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _accept(path: Path, build: BuildSection) -> DatasetInfo:
    """Take the dataset that is there; UserError shows how it differs from what is asked for."""
    info = DatasetInfo.load(path)
    there, asked = dict(info.arguments), build.model_dump()
    differences = [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in asked.items()
        if there.get(name) != value
    ]
    if not differences:
        differences = _changed_files(info, build)
    if differences:
        raise UserError(
            str(path),
            "holds a dataset made differently: " + "; ".join(differences),
            "the same settings and files",
            "choose another path, or remove the directory to have it made again",
        )
    return info


def _changed_files(info: DatasetInfo, build: BuildSection) -> list[str]:
    """What changed in the source since; what is no longer there need not be the same."""
    differences = []
    given = build.tokenizer
    if given and Path(given).exists() and Tokenizer.load(given).sha256 != info.tokenizer_sha256:
        differences.append(f"{given} is another tokenizer now")
    if build.source.startswith(BUILTIN):
        return differences  # changes with Python, which must not stop an old run
    try:
        now = {f.path: f.bytes for f in open_source(build.source).files}
    except UserError:
        return differences
    then = {f.path: f.bytes for f in info.sources}
    changed = sorted(p for p in then.keys() | now.keys() if then.get(p) != now.get(p))
    if changed:
        differences.append(f"{len(changed)} source files changed since, first {changed[0]}")
    return differences


@dataclass(frozen=True)
class _Survey:
    """What the first reading of the source found."""

    hashes: np.ndarray
    """(documents,) uint64, of the text; empty documents are left out everywhere."""
    sizes: np.ndarray
    """(documents,) int64, UTF-8 bytes."""
    held_out: np.ndarray
    """(documents,) bool."""
    skipped: int


class _Conversion:
    """One conversion into an empty directory, step by step in :meth:`run`."""

    def __init__(
        self, build: BuildSection, directory: Path, report: Progress, shard_bytes: int
    ) -> None:
        self._build = build
        self._directory = directory
        self._report = report
        self._shard_bytes = shard_bytes
        self._source: Source = open_source(build.source, text_field=build.text_field)

    def run(self) -> DatasetInfo:
        survey = self._survey()
        tokenizer = self._tokenizer(survey)
        tokenizer.save(self._directory / TOKENIZER_FILE)
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        spools = self._encode(survey, tokenizer, np.dtype(dtype))
        info = self._info(survey, tokenizer, spools, dtype)
        for split, spool in spools.items():
            self._write(split, spool, info)
            spool.file.unlink()
        (self._directory / DATASET_FILE).write_text(info.model_dump_json(indent=2) + "\n")
        return info

    def _documents(self) -> Iterator[Document]:
        """The documents of the source that hold any text."""
        return (document for document in self._source if document.text.strip())

    def _survey(self) -> _Survey:
        hashes, sizes, skipped = array("Q"), array("q"), 0
        for document in self._source:
            if not document.text.strip():
                skipped += 1
                continue
            text = document.text.encode()
            digest = hashlib.blake2b(text, digest_size=8).digest()
            hashes.append(int.from_bytes(digest, "little"))
            sizes.append(len(text))
            if len(sizes) % 1000 == 0:
                self._report("reading", len(sizes), 0)
        if not sizes:
            raise UserError(
                self._build.source,
                f"no documents are left: {skipped} are empty" if skipped else "has no documents",
                "some text",
            )
        found = np.array(hashes, dtype=np.uint64)
        held_out = _held_out(found, self._build.val_fraction, self._build.source)
        return _Survey(found, np.array(sizes, dtype=np.int64), held_out, skipped)

    def _tokenizer(self, survey: _Survey) -> Tokenizer:
        if self._build.tokenizer is not None:
            return Tokenizer.load(self._build.tokenizer)
        # Held-out text must not shape the vocabulary. Of a large corpus a share by hash is enough.
        trained = ~survey.held_out
        share = _TOKENIZER_BYTES / max(1, int(survey.sizes[trained].sum()))
        if share < 1:
            trained &= survey.hashes % 2**20 < int(share * 2**20)
        count = int(trained.sum())
        self._report("training the tokenizer", 0, count)
        texts = (d.text for d, used in zip(self._documents(), trained, strict=False) if used)
        return Tokenizer.train(texts, self._build.vocab_size)

    def _encode(self, survey: _Survey, tokenizer: Tokenizer, dtype: np.dtype) -> dict[Split, Spool]:
        spools: dict[Split, Spool] = {}
        for split in _SPLITS:
            spools[split] = Spool(self._directory / f"{split}.tokens", dtype)
        reserved = set(tokenizer.special_ids) - {tokenizer.special_tokens["<unk>"]}
        total, number = len(survey.sizes), 0
        for documents in _batched(self._documents()):
            encoded = tokenizer.encode_batch([document.text for document in documents])
            for document, tokens in zip(documents, encoded, strict=True):
                if number == total:
                    raise self._changed(total)
                _check_tokens(document, tokens, reserved)
                spool = spools["val" if survey.held_out[number] else "train"]
                if len(tokens):  # a tokenizer's normalisation may leave nothing of a text
                    spool.add(tokens, int(survey.sizes[number]))
                number += 1
            self._report("encoding", number, total)
        if number != total:
            raise self._changed(total)
        for split, spool in spools.items():
            spool.close()
            if not spool.lengths:
                raise UserError(
                    self._build.source, f"no documents are left for {split}", "more text"
                )
        return spools

    def _changed(self, total: int) -> UserError:
        return UserError(
            self._build.source,
            "changed while it was read",
            f"the {total:,} documents of the first reading",
            "convert again when nothing writes to it",
        )

    def _info(
        self, survey: _Survey, tokenizer: Tokenizer, spools: dict[Split, Spool], dtype: str
    ) -> DatasetInfo:
        return DatasetInfo.model_validate(
            {
                "format": FORMAT,
                "tokenizer_file": TOKENIZER_FILE,
                "tokenizer_sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "special_tokens": tokenizer.special_tokens,
                "special_ids": tokenizer.special_ids,
                "dtype": dtype,
                "splits": {
                    split: SplitInfo(
                        documents=len(spool.lengths), tokens=sum(spool.lengths), bytes=spool.bytes
                    )
                    for split, spool in spools.items()
                },
                "skipped_documents": survey.skipped
                + len(survey.sizes)
                - sum(len(spool.lengths) for spool in spools.values()),
                "sources": self._source.files,
                "arguments": self._build.model_dump(),
            }
        )

    def _write(self, split: Split, spool: Spool, info: DatasetInfo) -> None:
        from streaming import MDSWriter

        count, seed = len(spool.lengths), self._build.shuffle_seed
        order = np.arange(count)
        if seed is not None:
            order = generator(seed, "documents on disk", _SPLITS.index(split)).permutation(count)
        # Not as a context manager: that would write an index over whatever is there on an error.
        writer = MDSWriter(
            columns={TOKENS_FIELD: f"ndarray:{info.dtype}"},
            out=str(self._directory / split),
            hashes=["sha256"],
            size_limit=self._shard_bytes,
        )
        for number, tokens in enumerate(spool.documents(order)):
            writer.write({TOKENS_FIELD: tokens})
            if number % 1000 == 0:
                self._report(f"writing {split}", number, count)
        writer.finish()
        lengths = np.frombuffer(spool.lengths, dtype=np.int64)[order]
        np.save(self._directory / split / LENGTHS_FILE, lengths)
        self._read_back(split, spool, order, info)

    def _read_back(self, split: Split, spool: Spool, order: np.ndarray, info: DatasetInfo) -> None:
        dataset = TokenDataset(self._directory, split, info)
        dataset.check_shards()
        dataset.check_documents()
        picked = np.unique(np.linspace(0, len(order) - 1, 100).astype(np.int64))
        for document, tokens in zip(picked.tolist(), spool.documents(order[picked]), strict=True):
            if not np.array_equal(dataset.read(document), tokens):
                raise UserError(
                    str(dataset.shard_of(document)),
                    f"document {document} reads back differently from what was written",
                    hint="check the disk",
                )


def _held_out(hashes: np.ndarray, val_fraction: float, source: str) -> np.ndarray:
    """Which documents go to ``val``: those with the lowest hashes, so equal texts go together.

    At least one is held out, and at least one is not.
    """
    lowest, highest = int(hashes.min()), int(hashes.max())
    if lowest == highest:
        raise UserError(
            source,
            "one document cannot be divided into train and val"
            if len(hashes) == 1
            else "all documents are the same",
            "at least two different documents",
            "split the text into several files or JSON lines",
        )
    bound = min(max(int(val_fraction * _HASHES), lowest + 1), highest)
    return hashes < np.uint64(bound)


def _batched(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_tokens(document: Document, tokens: np.ndarray, reserved: set[int]) -> None:
    if len(tokens) >= _DOCUMENT_TOKENS:
        raise UserError(
            document.where,
            f"the document has {len(tokens):,} tokens",
            f"fewer than {_DOCUMENT_TOKENS:,}: offsets in a shard have 32 bits",
            "split it",
        )
    if not reserved.isdisjoint(tokens.tolist()):
        raise UserError(
            document.where,
            "the tokenizer makes special tokens of this text",
            "ordinary tokens only",
            "use a byte-level tokenizer, or leave the tokenizer out to have one trained",
        )
