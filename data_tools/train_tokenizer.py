"""Train a tokenizer on a source, for ``data tokenizer train`` and for conversions without one."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from data_tools.choose import may_be_held_out
from data_tools.encode import reason_to_leave_out, text_hash
from data_tools.reporting import Report, StageProgress
from data_tools.sources import BadInput, Corpus
from data_tools.sources.build_source import repeatable, say_what_is_left, source_name
from data_tools.tokenizers.tokenizer import Backend, Tokenizer
from dualtrain.common.errors import UserError
from dualtrain.common.files import absolute, in_utf8, replacing, writing
from dualtrain.recipe.schema import BuildSection

TRAINING_BYTES = 256 * 2**20
"""Of a larger corpus a share of about this size, chosen by hash, is enough."""
_MEASURED_BYTES = 16 * 2**20
_SHOWN_EVERY = 8


@dataclass(frozen=True)
class TrainedTokenizer:
    """What ``data tokenizer train`` tells."""

    vocab_size: int
    backend: Backend
    bytes_per_token: float
    measured_bytes: int


def train_tokenizer(
    build: BuildSection,
    out: str | Path,
    *,
    stdin: IO[bytes] | None = None,
    report: Report | None = None,
) -> TrainedTokenizer:
    """Train on all documents of a source and write the ``tokenizer.json``.

    Args:
        build: Corpus, filters and ``vocab_size``; the rest does not matter here.
        out: File to write, which must not exist.
        stdin: What the source ``-`` reads; None is this process's standard input.

    Raises:
        UserError: `out` exists or cannot be written; no text; unusable source.
    """
    with writing(out):
        return _train(build, absolute(out), stdin, report or Report())


def _train(
    build: BuildSection, out: Path, stdin: IO[bytes] | None, report: Report
) -> TrainedTokenizer:
    if out.exists():
        raise UserError(in_utf8(out), "exists", "a new file", "remove it or choose another name")
    kept = out.with_name(f".{out.name}.standard-input")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        open_again = repeatable(build, stdin, kept)
        say_what_is_left(open_again(), report)
        tokenizer = learn(open_again, build, hold_out=False, report=report)
        measured = _measure(tokenizer, open_again, build)
        with replacing(out) as file:
            tokenizer.save(file)
    finally:
        with contextlib.suppress(OSError):
            kept.unlink()
    return measured


def learn(
    open_again: Callable[[], Corpus], build: BuildSection, *, hold_out: bool, report: Report
) -> Tokenizer:
    """Train a tokenizer of ``build.vocab_size`` on a source.

    Args:
        open_again: Gives the source anew for each reading.
        hold_out: Learn nothing from documents that may be held out.

    Raises:
        UserError: There is no text; input that cannot be read, unless ``on_error`` is ``skip``.
    """
    hashes, sizes = array("Q"), array("q")
    stage = "looking through the text"
    for text in _texts(open_again(), build, report, stage):
        data = text.encode()
        hashes.append(text_hash(data))
        sizes.append(len(data))
    found = np.array(hashes, dtype=np.uint64)
    size = np.array(sizes, dtype=np.int64)
    used = np.ones(len(found), dtype=bool)
    if hold_out and len(found):
        used = ~may_be_held_out(size, found, build)
    share = TRAINING_BYTES / max(1, int(size[used].sum()))
    if share < 1:
        used &= found % 2**20 < int(share * 2**20)
    if not hold_out and not used.any():
        raise UserError(source_name(build), "has no text to learn from")
    stage = "training the tokenizer"
    report.show(StageProgress(stage, 0, 0, "bytes"))
    again = _texts(open_again(), build, report, stage)
    texts = (text for text, use in zip(again, used, strict=False) if use)
    return Tokenizer.train(texts, build.vocab_size)


def _texts(source: Corpus, build: BuildSection, report: Report, stage: str) -> Iterator[str]:
    """The documents that pass the filters."""
    for number, block in enumerate(source.blocks()):
        for document in block.documents():
            if isinstance(document, BadInput):
                if build.on_error == "stop":
                    raise document.error
            elif document.ids is not None:
                raise UserError(
                    document.where,
                    "holds token ids, from which no tokenizer can be trained",
                    "the tokenizer that made them",
                    "name it with --tokenizer",
                )
            elif reason_to_leave_out(document, build) is None:
                yield document.text
        if number % _SHOWN_EVERY == 0:
            report.show(StageProgress(stage, block.position, source.bytes, "bytes"))


def _measure(
    tokenizer: Tokenizer, open_again: Callable[[], Corpus], build: BuildSection
) -> TrainedTokenizer:
    """Encode the beginning of the source."""
    size = tokens = 0
    for text in _texts(open_again(), build, Report(), ""):
        size += len(text.encode())
        tokens += len(tokenizer.encode_array(text))
        if size >= _MEASURED_BYTES:
            break
    return TrainedTokenizer(tokenizer.vocab_size, tokenizer.backend, size / tokens, size)
