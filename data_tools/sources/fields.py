"""Where the text of a record stands: ``text``, nested ``meta.text``, in lists ``turns[].text``.

``[]`` makes a document of each item of a list. It has to be written: nothing else says whether the
strings of a list are documents, or the paragraphs of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from data_tools.sources.documents import BadInput, Document

ITEMS = "[]"
EACH = "to make each string a document, give --text-field '{}'"


def steps(field: str, names: Iterable[str]) -> list[str]:
    """The keys, and :data:`ITEMS`, that lead to the text; a record's own name may hold dots."""
    return [field] if field in names else field.replace(ITEMS, f".{ITEMS}").split(".")


def no_field(where: str, field: str, names: Iterable[str], *, kind: str) -> BadInput:
    """The record has no such field (or column: its `kind`)."""
    known = ", ".join(f"'{name}'" for name in names) or "none"
    return BadInput.at(
        "no text field",
        where,
        f"has no {kind} '{field}'",
        f"one of its {kind}s: {known}",
        "set text_field",
    )


def documents(record: Any, field: str, where: str) -> Iterator[Document | BadInput]:
    """The text of a JSON record, or its texts."""
    if not isinstance(record, dict):
        kind = type(record).__name__
        yield BadInput.at("no text field", where, f"is a JSON {kind}", "a JSON object")
        return
    if field in record:  # nearly always
        yield _document(record[field], field, where)
        return
    yield from _found(record, steps(field, record), (), where)


def _found(
    value: Any, left: Sequence[str], path: tuple[str, ...], where: str
) -> Iterator[Document | BadInput]:
    name = ".".join(path).replace(f".{ITEMS}", ITEMS)
    if not left:
        yield _document(value, name, where)
    elif left[0] == ITEMS and isinstance(value, list):
        for number, item in enumerate(value, start=1):
            yield from _found(item, left[1:], (*path, ITEMS), f"{where}: item {number}")
    elif left[0] != ITEMS and isinstance(value, dict):
        key = left[0]
        if key in value:
            yield from _found(value[key], left[1:], (*path, key), where)
        else:
            names = [".".join((*path, other)) for other in value]
            yield no_field(where, ".".join((*path, key)), names, kind="field")
    else:
        expected = "a list" if left[0] == ITEMS else f"an object with '{left[0]}'"
        yield _no_string(value, name, where, expected)


def _document(value: Any, field: str, where: str) -> Document | BadInput:
    if not isinstance(value, str):
        return _no_string(value, field, where, "a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        what = f"field '{field}' holds half a surrogate pair"
        return BadInput.at("lone surrogate", where, what, "text that UTF-8 can express")
    return Document(value, where)


def _no_string(value: Any, field: str, where: str, expected: str) -> BadInput:
    strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
    hint = EACH.format(field + ITEMS) if strings and value else ""
    what = f"field '{field}' is {json.dumps(value)[:60]}"
    return BadInput.at("text is not a string", where, what, expected, hint)
