"""Prompts from a file, and texts to one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dualtrain.errors import UserError
from dualtrain.generate.prompts import Tokenizer
from dualtrain.generate.settings import Settings, raise_all
from dualtrain.generate.texts import Text
from dualtrain.recipe.describe import nearest

_KEY = "prompt"


def read_prompts(file: Path) -> tuple[list[str], list[str]]:
    """Read prompts: ``.jsonl`` an object with a ``prompt`` a line, anything else a prompt a line.

    Empty lines are skipped; an empty prompt, or one of several lines, needs JSON.

    Returns:
        The prompts, and the place of each, ``FILE:LINE``.

    Raises:
        UserError: The file cannot be read, has no prompts, or lines that are none.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(file), f"cannot be read: {error}", "a text file in UTF-8") from None
    prompts, places, wrong = [], [], []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            prompts.append(_prompt_in(line, place) if file.suffix == ".jsonl" else line)
        except UserError as error:
            wrong.append(error)
        places.append(place)
    raise_all(wrong)
    if not prompts:
        raise UserError(str(file), "has no prompts", "one on each line")
    return prompts, places


def _prompt_in(line: str, place: str) -> str:
    expected = 'an object such as {"prompt": "Once"}'
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(place, f"is no JSON: {error}", expected) from None
    if not isinstance(value, dict):
        raise UserError(place, f"{line[:40]!r}", expected)
    if _KEY not in value:
        hint = f"did you mean {_KEY}?" if nearest(_KEY, list(value)) else ""
        raise UserError(place, f"has only {', '.join(value) or 'nothing'}", expected, hint)
    if not isinstance(value[_KEY], str):
        raise UserError(place, f"prompt {value[_KEY]!r}", "text")
    return value[_KEY]


def partial_file(file: Path) -> Path:
    """Where results are until all are there."""
    return file.with_name(file.name + ".partial")


def refuse_existing(file: Path) -> None:
    """See that results can be written.

    Raises:
        UserError: The file exists, or its directory does not.
    """
    if file.exists():
        raise UserError("--out", f"{file} exists already", "a new file")
    if not file.parent.is_dir():
        raise UserError("--out", f"{file.parent} is no directory", "a file in one that exists")


@contextmanager
def open_results(file: Path) -> Iterator[TextIO]:
    """Open a file for results, under its name once all is written.

    Until then, and if it is not to be, they are in :func:`partial_file`.
    """
    unfinished = partial_file(file)
    with unfinished.open("w", encoding="utf-8") as stream:
        yield stream
    unfinished.replace(file)


def record(
    text: Text, settings: Settings, tokenizer: Tokenizer, *, model: str
) -> dict[str, object]:
    """Describe a text in a line of a file.

    Args:
        text: It.
        settings: How it was made.
        tokenizer: Decodes it.
        model: The directory of the model.
    """
    prompt = text.job.prompt
    found: dict[str, object] = {
        "prompt": prompt.text,
        "text": text.written(tokenizer),
        "mode": settings.mode,
        "stop": text.stop,
        "ids": text.new_ids,
    }
    if prompt.has_gaps:
        found["gaps"] = [piece.text for piece in text.pieces(tokenizer) if piece.label]
    return found | {
        "number": prompt.number,
        "sample": text.job.sample,
        "seed": settings.seed,
        "settings": settings.facts(),
        "model": model,
    }


def write_record(stream: TextIO, values: dict[str, object]) -> None:
    """Write a line at once."""
    stream.write(json.dumps(values, ensure_ascii=False) + "\n")
    stream.flush()
