"""The source that a conversion's settings name, opened once or again and again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from data_tools.reporting import Report
from data_tools.sources import Corpus, open_sources
from data_tools.sources.find import STANDARD_INPUT, standard_input
from dualtrain.common.errors import UserError
from dualtrain.recipe.schema import BuildSection

_COPY_BYTES = 1 << 20


def source_name(build: BuildSection) -> str:
    """All of them, for messages."""
    return ", ".join(build.sources)


def open_source(build: BuildSection, stdin: IO[bytes] | None) -> Corpus:
    """Open the source of a conversion.

    Args:
        stdin: What the source ``-`` reads; None is this process's standard input.
    """
    return open_sources(
        build.sources,
        text_field=build.text_field,
        format=build.format,
        separator=build.separator,
        stdin=stdin,
    )


def open_val_source(build: BuildSection) -> Corpus | None:
    """Open what a conversion holds out as a whole, if anything.

    Raises:
        UserError: As :func:`open_source`; it is read for training, too, or can be read only once;
            another option chooses what is held out.
    """
    if not build.val_sources:
        return None
    for name, value in (("val_fraction", build.val_fraction), ("val_tokens", build.val_tokens)):
        if value is not None:
            what = f"{value} has no effect: what val_source names is held out, all of it"
            raise UserError(name, what, "one of the two", "leave it out")
    held_out = open_source(build.model_copy(update={"source": build.val_sources}), None)
    if not held_out.repeatable:
        what = "standard input or a pipe cannot be held out"
        raise UserError("val_source", what, "files", "save it to a file first")
    of_training = {os.path.realpath(file.path) for file in open_source(build, None).files}
    for file in held_out.files:
        if os.path.realpath(file.path) in of_training:
            raise UserError(
                file.name,
                "is both trained on and held out",
                "each text on one side",
                "name the files of each side, or patterns that only they match",
            )
    return held_out


def say_what_is_left(source: Corpus, report: Report) -> None:
    """Say what stands in the searched directories and is not read."""
    for note in source.notes:
        report.say(note)
    if source.ignored:
        report.say(
            f"{len(source.ignored):,} files of other kinds are not read, first {source.ignored[0]}"
        )


def repeatable(build: BuildSection, stdin: IO[bytes] | None, kept: Path) -> Callable[[], Corpus]:
    """A way to open a source again and again; standard input is first copied to the file `kept`.

    Args:
        stdin: What the source ``-`` reads; None is this process's standard input.

    Raises:
        UserError: As :func:`open_source`, or the source is a pipe with a name.
        OSError: `kept` cannot be written.
    """
    if STANDARD_INPUT not in build.sources:
        if not open_source(build, None).repeatable:
            raise UserError(
                source_name(build),
                "has a pipe, which can be read once only",
                "files, to train a tokenizer before they are encoded",
                "write it to a file, read it from standard input, or give a tokenizer",
            )
        return lambda: open_source(build, None)
    if not kept.exists():
        with kept.open("wb") as stream:
            shutil.copyfileobj(stdin or standard_input(), stream, _COPY_BYTES)
    return lambda: open_source(build, kept.open("rb"))
