"""Prompts from a file, and texts to one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dualtrain.checkpoint.trained import TrainedModel
from dualtrain.common.errors import UserError, nearest, raise_together
from dualtrain.common.files import writing
from dualtrain.common.input_files import InputFile, check_unicode, parse_object
from dualtrain.generate.settings import Settings
from dualtrain.generate.texts import Text
from dualtrain.recipe.yaml_source import shown

_KEY = "prompt"
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_TABLE_SUFFIXES = (".csv", ".tsv")


def read_prompts(path: Path) -> tuple[list[str], list[str]]:
    """Read prompts: of JSON an object with a ``prompt`` each, of anything else a line each.

    JSON is what a name ending in ``.jsonl``, ``.ndjson`` or ``.json`` says, and what begins with
    an object that has a ``prompt``. Empty lines are skipped; an empty prompt, or one of several
    lines, needs JSON.

    Args:
        path: Of the file, which may be compressed; ``-`` is standard input.

    Returns:
        The prompts, and the place of each, ``FILE:LINE``.

    Raises:
        UserError: The file cannot be read, has no prompts, or lines that are none.
    """
    file = InputFile.read(path)
    if file.suffix in _TABLE_SUFFIXES:
        hint = "write the column of prompts to a .txt file, or the rows to a .jsonl file"
        expected = "a line each, or JSON with a `prompt` each"
        raise UserError(file.name, "is a table, whose rows are no prompts", expected, hint)
    prompts, places, wrong = [], [], []
    is_json = file.suffix in _JSON_SUFFIXES or _begins_with_prompt(file.text())
    for number, line in file.json_parts() if is_json else _lines(file.text()):
        place = f"{file.name}:{number}"
        try:
            prompt = _prompt_in(line, place) if is_json else line
            check_unicode(prompt, place)
        except UserError as error:
            wrong.append(error)
        else:
            prompts.append(prompt)
            places.append(place)
    raise_together(wrong)
    if not prompts:
        raise UserError(file.name, "has no prompts", "one on each line")
    return prompts, places


def _lines(text: str) -> list[tuple[int, str]]:
    lines = enumerate(text.split("\n"), 1)
    return [(number, line.removesuffix("\r")) for number, line in lines if line.strip()]


def _begins_with_prompt(text: str) -> bool:
    """Whether a text that is not known to be JSON holds objects with prompts all the same."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and _KEY in first


def _prompt_in(source: str, place: str) -> str:
    expected = 'an object such as {"prompt": "Once"}'
    value = parse_object(source, place)
    if _KEY not in value:
        hint = f"did you mean {_KEY}?" if nearest(_KEY, list(value)) else ""
        raise UserError(place, f"has only {', '.join(value) or 'nothing'}", expected, hint)
    if not isinstance(value[_KEY], str):
        raise UserError(place, f"its prompt is {shown(value[_KEY])}", "text")
    return value[_KEY]


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
def result_file(file: Path) -> Iterator[Callable[[dict[str, object]], None]]:
    """Write results line by line, under the file's name once all are written.

    Yields:
        What writes a line, at once, to the file with ``.partial`` behind its name.

    Raises:
        UserError: It cannot be written.
    """
    partial = file.with_name(file.name + ".partial")
    with writing(file, where=f"--out {file}"):
        stream = partial.open("wb")
    begun = {"where": f"--out {file}", "hint": f"what could be written is in {partial}"}

    def write(values: dict[str, object]) -> None:
        with writing(file, **begun):
            stream.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
            stream.flush()

    try:
        yield write
    except BaseException:
        with suppress(OSError):  # what could not be written is tried again, and told already
            stream.close()
        raise
    with writing(file, **begun), stream:
        os.fsync(stream.fileno())
        partial.replace(file)


def record(text: Text, settings: Settings, model: TrainedModel) -> dict[str, object]:
    """Describe a text in a line of a file."""
    prompt, tokenizer = text.job.prompt, model.tokenizer
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
        "model": str(model.source.path),
    }
