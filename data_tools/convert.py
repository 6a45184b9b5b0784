"""Convert sources of text into a dataset: ``train/`` and ``val/`` shards, tokenizer, facts.

Called by ``dualtrain data convert`` and, for a recipe's ``data.build``, by ``dualtrain run``. The
steps, in :class:`_Conversion`: find or train the tokenizer; encode the source block by block into a
spool; choose the documents of each split and their order; write the shards; read them back.

All of it happens in a directory beside the target, which is moved there at the end. A conversion
that is killed leaves no target, and a spool with a journal: the same command goes on from there,
another one starts again. Both say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np

from data_tools.accept import check_made_alike, effective_arguments, recorded
from data_tools.choose import choose_documents, no_documents
from data_tools.encode import DOCUMENT_ROW, Encoder, WorkerDiedError, Workers
from data_tools.reporting import Report, StageProgress
from data_tools.shards import SHARD_BYTES, SplitDocuments, import_ahead, write_dataset
from data_tools.sources import PYTHON_DOCS, Block, Corpus, CorpusFile
from data_tools.sources.build_source import (
    open_source,
    open_val_source,
    repeatable,
    say_what_is_left,
    source_name,
)
from data_tools.sources.formats import find_format
from data_tools.spool import Spool, SpoolState
from data_tools.tokenizers.ranks import find_tokenizer
from data_tools.tokenizers.tokenizer import Tokenizer
from data_tools.train_tokenizer import learn
from dualtrain.common.errors import UserError
from dualtrain.common.files import (
    absolute,
    beside,
    discard,
    in_utf8,
    publish,
    refuse_taken,
    replacing,
    reserved,
    unwritable,
    writing,
)
from dualtrain.data.dataset import (
    DATASET_FILE,
    FORMAT,
    LEFT_OUT_FILE,
    TOKENIZER_FILE,
    DatasetInfo,
    Split,
)
from dualtrain.recipe.schema import BuildSection

_KEY_FILE = "conversion.json"
_WORKERS_FROM_BYTES = 8 * 2**20


def build_dataset(
    build: BuildSection,
    path: str | Path,
    *,
    workers: int | None = None,
    report: Report | None = None,
    shard_bytes: int = SHARD_BYTES,
    stdin: IO[bytes] | None = None,
) -> DatasetInfo:
    """Make the dataset at `path`, or accept the one that is there if it was made the same way.

    Only one process builds at a time; others wait and take its result.

    Args:
        workers: Processes that encode; None: one for each core, or only this one for a small
            source. The dataset does not depend on it. Several are started by ``spawn``: a script
            that calls this needs the usual ``if __name__ == "__main__":``.
        stdin: What the source ``-`` reads; None is this process's standard input.

    Returns:
        The facts of the dataset.

    Raises:
        UserError: Unusable source or tokenizer; `path` holds something else; disk errors.
    """
    report, place = report or Report(), absolute(path)
    kept = beside(place)
    goes_on = f"what is done is kept in {in_utf8(kept)}; the same command goes on from there"
    try:
        if (place / DATASET_FILE).exists():  # also where nothing may be written
            return _accept(place, build)
        with reserved(place, marker=DATASET_FILE, on_wait=report.wait):
            if (place / DATASET_FILE).exists():
                return _accept(place, build)
            # An error in what is asked for comes before what an interrupted conversion left is
            # looked at, and leaves it alone.
            conversion = _Conversion(build, kept, report, stdin)
            try:
                info = conversion.run(workers, shard_bytes)
                publish(conversion.dataset, place)
            except WorkerDiedError:
                raise
            except UserError:
                discard(kept)  # the input has to change before it could go on
                raise
            discard(kept)
            return info
    except KeyboardInterrupt:
        if kept.exists():
            report.say(f"interrupted: {goes_on}")
        raise
    except OSError as error:
        raise unwritable(error, path, hint=goes_on if os.path.exists(kept) else "") from None


def check_build(build: BuildSection, path: str | Path) -> None:
    """Refuse what :func:`build_dataset` would refuse before it reads any text."""
    with writing(path):
        path = absolute(path)
        is_there = (path / DATASET_FILE).exists()
        refuse_taken(path, marker=DATASET_FILE)
    if is_there:
        check_made_alike(str(path), DatasetInfo.load(path), build)
        return
    if build.format is not None:
        find_format(build.format, where="data.build.format")
    if build.sources != [PYTHON_DOCS]:  # always there, and slow to look at
        open_source(build, None)
    open_val_source(build)
    if build.tokenizer is not None:
        find_tokenizer(build.tokenizer, pattern=build.tokenizer_pattern)


def _accept(path: Path, build: BuildSection) -> DatasetInfo:
    """Take the dataset that is there; UserError shows how it differs from what is asked for."""
    discard(beside(path))  # left by a process that was killed just after it had finished
    info = DatasetInfo.load(path)
    check_made_alike(str(path), info, build)
    return info


class _Conversion:
    """One conversion in a directory that may hold what an earlier one left."""

    def __init__(
        self, build: BuildSection, directory: Path, report: Report, stdin: IO[bytes] | None
    ) -> None:
        self.dataset = directory / "dataset"
        """The dataset, whole when :meth:`run` returns."""
        self._work = directory / "work"
        self._build = build
        self._report = report
        self._stdin = stdin
        self._where = source_name(build)
        self._source = open_source(build, stdin)
        say_what_is_left(self._source, report)
        self._val_source = open_val_source(build)
        if self._val_source is not None:
            say_what_is_left(self._val_source, report)
        self._given = None
        if build.tokenizer is not None:
            self._given = find_tokenizer(build.tokenizer, pattern=build.tokenizer_pattern)
        self._files = self._stamps()

    def run(self, workers: int | None, shard_bytes: int) -> DatasetInfo:
        self._prepare()
        with Workers(workers or _default_workers(self._source)) as encoders:
            tokenizer = self._tokenizer()
            dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
            spool = self._encode(tokenizer, dtype, encoders)
        table = spool.table()
        lengths = table["length"].astype(np.int64)
        is_val = table["is_val"] if self._build.val_sources else None
        choice = choose_documents(
            lengths, table["hash"], self._build, where=self._where, is_val=is_val
        )
        shutil.rmtree(self.dataset, ignore_errors=True)  # of a conversion killed while it wrote
        self.dataset.mkdir()
        spool.copy_left_out(self.dataset / LEFT_OUT_FILE)
        splits: dict[Split, SplitDocuments] = {
            split: SplitDocuments(
                order, lengths, table["bytes"], partial(spool.read, lengths), table["words"]
            )
            for split, order in choice.order.items()
        }
        left_out = Counter(spool.state.left_out) + choice.left_out
        info = DatasetInfo.model_validate(
            {
                "format": FORMAT,
                "tokenizer_file": TOKENIZER_FILE,
                "tokenizer_sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "special_tokens": tokenizer.special_tokens,
                "special_ids": tokenizer.special_ids,
                "dtype": dtype,
                "splits": {split: documents.facts for split, documents in splits.items()},
                "skipped_documents": left_out.total(),
                "left_out": dict(sorted(left_out.items())),
                "sources": recorded([CorpusFile(path, size) for path, size, _ in self._files]),
                "arguments": effective_arguments(self._build),
            }
        )
        write_dataset(
            self.dataset, info, tokenizer, splits, report=self._report, shard_bytes=shard_bytes
        )
        spool.close()
        return info

    def _prepare(self) -> None:
        """Take over what a killed conversion of the same left, or remove it, and say which."""
        directory, key = self._work.parent, self._key()
        file = self._work / _KEY_FILE
        if directory.exists():
            same = file.exists() and file.read_text() == key and self._source.repeatable
            if same:
                self._report.say(f"going on with an interrupted conversion, from {directory}")
                return
            why = "it was made from other input or with other settings"
            if not self._source.repeatable:
                why = "what it read can be read once only"
            self._report.say(f"starting again: {directory} was left unfinished, and {why}")
            shutil.rmtree(directory)
        self._work.mkdir(parents=True)
        file.write_text(key)

    def _key(self) -> str:
        """Everything that the spool depends on, as text."""
        key = {
            "version": version("dualtrain"),
            "arguments": effective_arguments(self._build),
            "tokenizer": self._given.sha256 if self._given else None,
            "special_tokens": self._given.special_tokens if self._given else None,
            "files": self._files,
            "rows": DOCUMENT_ROW.descr,
        }
        return json.dumps(key, indent=1)

    def _stamps(self) -> list[tuple[str, int, int]]:
        """(path, bytes, time of change) of each file of the source."""
        stamps = []
        for file in self._source.files + (self._val_source.files if self._val_source else ()):
            path = Path(file.path)
            status = path.stat() if path.is_file() else None  # not of a pipe
            size = status.st_size if status else file.bytes
            stamps.append((file.path, size, status.st_mtime_ns if status else 0))
        return stamps

    def _tokenizer(self) -> Tokenizer:
        if self._given is None:
            return self._trained_tokenizer()
        spec, tokenizer = self._build.tokenizer, self._given
        if tokenizer.roles:
            roles = ", ".join(f"{name} as {role}" for role, name in tokenizer.roles.items())
            self._report.say(f"{spec}: takes its own special tokens: {roles}")
        if tokenizer.added:
            self._report.say(
                f"{spec}: added {' '.join(tokenizer.added)} at the end of its vocabulary, "
                f"which has {tokenizer.vocab_size:,} ids with them"
            )
        if failures := tokenizer.round_trip_failures():
            self._report.say(
                f"{spec}: some text does not come back from its tokens as it was, such as "
                f"{failures[0]}; bits per byte count the bytes of the original"
            )
        return tokenizer

    def _trained_tokenizer(self) -> Tokenizer:
        file = self._work / TOKENIZER_FILE
        if file.exists():
            return Tokenizer.load(file)
        # Standard input is kept, or nothing of it would be left to encode.
        open_again = repeatable(self._build, self._stdin, self._work / "standard-input")
        tokenizer = learn(open_again, self._build, hold_out=True, report=self._report)
        with replacing(file) as new:
            tokenizer.save(new)
        self._source = open_again()
        return tokenizer

    def _encode(self, tokenizer: Tokenizer, dtype: str, encoders: Workers) -> Spool:
        if tokenizer.backend != "tiktoken":
            self._report.say(
                "tiktoken would not give this tokenizer's ids: encoding through tokenizers, slower"
            )
        spool = Spool(self._work, np.dtype(dtype))
        if spool.state.blocks:
            self._report.say(f"{spool.state.documents:,} documents are encoded already")
        if not spool.state.complete:
            encoder = Encoder(
                self._build, tokenizer.json, tokenizer.special_tokens, tokenizer.backend, dtype
            )
            blocks = islice(self._blocks(), spool.state.blocks, None)
            self._show_encoding(spool.state)
            try:
                for number, result in enumerate(encoders.encode(blocks, encoder)):
                    if number == 0 and encoders.are_processes:
                        import_ahead("dualtrain.data.mds")  # this process has little else to do now
                    if result.problems and self._build.on_error == "stop":
                        raise result.problems[0].error
                    spool.add(result)
                    self._show_encoding(spool.state)
            except BaseException:
                with contextlib.suppress(OSError):  # then less is left to go on with
                    spool.save()
                spool.close()
                raise
            if self._stamps() != self._files:
                raise UserError(
                    self._where,
                    "changed while it was read",
                    hint="convert again when nothing writes to it",
                )
            spool.finish()
        if not spool.state.documents:
            raise no_documents(self._where, spool.state.left_out)
        return spool

    def _blocks(self) -> Iterator[Block]:
        yield from self._source.blocks()
        if self._val_source is not None:
            for block in self._val_source.blocks():
                position = self._source.bytes + block.position
                yield replace(block, position=position, is_val=True)

    def _show_encoding(self, state: SpoolState) -> None:
        self._report.show(
            StageProgress(
                "encoding",
                state.position,
                self._source.bytes + (self._val_source.bytes if self._val_source else 0),
                "bytes",
                documents=state.documents,
                tokens=state.tokens,
                text_bytes=state.text_bytes,
            )
        )


def _default_workers(source: Corpus) -> int:
    if source.repeatable and source.bytes < _WORKERS_FROM_BYTES:
        return 1  # done before a worker has started
    return len(os.sched_getaffinity(0))
