"""From a line of data to a question: the Jinja templates and expressions of a task file, sandboxed.

A task file may come from anywhere, so its templates cannot reach anything but the line of data. A
field that is not there is an error and never empty text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dualtrain.errors import UserError

Record = Mapping[str, Any]
"""A line of data: a JSON object."""

_FAILURES = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a template or an expression raises on data that it was not made for."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        prompt: Text in front of the answers; may be empty.
        choices: The answers as they are scored, with their leading space if any.
        gold: Which of them is right.
        group: What results are also grouped by.
        characters: Length of each answer itself, without what is put around it.
        line: Its line in the data file, or row on the hub, from 1 on.
    """

    prompt: str
    choices: tuple[str, ...]
    gold: int
    group: str | None
    characters: tuple[int, ...]
    line: int


def compile_template(text: str) -> Callable[[Record], Any]:
    """A function from a record to the template's text.

    Raises:
        ValueError: It is no template.
    """
    try:
        return _environment().from_string(text).render
    except TemplateSyntaxError as error:
        raise ValueError(error.message) from None


def compile_expression(text: str) -> Callable[[Record], Any]:
    """A function from a record to the expression's value.

    Raises:
        ValueError: It is no expression.
    """
    try:
        return _environment().compile_expression(text, undefined_to_none=False)
    except TemplateSyntaxError as error:
        raise ValueError(error.message) from None


class Templates:
    """The compiled parts of a task file.

    Args:
        parts: By key.
        file: The task file, for messages.
    """

    def __init__(self, parts: Mapping[str | int, Callable[[Record], Any]], file: str) -> None:
        self._parts = parts
        self._file = file

    def item(self, record: Record, *, where: str, line: int) -> Item:
        """Make the question of a line of data.

        Args:
            record: The line.
            where: ``file:line`` of it, for messages.
            line: Its number.

        Raises:
            UserError: The line is not as the task file expects it.
        """
        answers = self._answers(record, where)
        group = self._value("group", record, where) if "group" in self._parts else None
        item = Item(
            prompt=self._value("prompt", record, where),
            choices=tuple(
                self._value("choice", {**record, "choice": answer}, where) for answer in answers
            ),
            gold=self._gold(record, len(answers), where),
            group=None if group is None else str(group),
            characters=tuple(map(len, answers)),
            line=line,
        )
        _check_text(item, where)
        return item

    def record(self, record: Record, *, where: str) -> dict[str, Any]:
        """Evaluate every part, for the fields of a dataset that has others.

        Raises:
            UserError: The record is not as the task file expects it.
        """
        return {str(key): self._value(key, record, where) for key in self._parts}

    def _answers(self, record: Record, where: str) -> list[str]:
        answers = self._value("choices", record, where)
        if not isinstance(answers, (list, tuple)) or len(answers) < 2:
            raise self._error(where, "choices", answers, "a list of two or more texts")
        for answer in answers:
            if not isinstance(answer, str) or not answer:
                raise self._error(where, "choices", answers, "texts that are not empty")
        return list(answers)

    def _gold(self, record: Record, count: int, where: str) -> int:
        gold = self._value("gold", record, where)
        if isinstance(gold, bool) or not isinstance(gold, int):
            hint = "`| int` makes a number of text" if isinstance(gold, str) else ""
            raise self._error(where, "gold", gold, f"a number from 0 to {count - 1}", hint)
        if not 0 <= gold < count:
            hint = "`- 1` makes numbers from 1 on begin with 0" if gold == count else ""
            raise self._error(where, "gold", gold, f"a number from 0 to {count - 1}", hint)
        return gold

    def _value(self, key: str | int, record: Record, where: str) -> Any:
        try:
            value = self._parts[key](record)
            if isinstance(value, Undefined):
                str(value)  # raises what is undefined
            return value
        except _FAILURES as error:
            fields = ", ".join(name for name in record if name != "choice") or "none"
            raise UserError(
                where,
                f"{key} of {self._file} fails: {error}",
                "data with the fields that the task file names",
                f"fields here: {fields}",
            ) from None

    def _error(self, where: str, key: str, value: Any, expected: str, hint: str = "") -> UserError:
        text = repr(value)
        text = text if len(text) <= 60 else text[:57] + "..."
        return UserError(where, f"{key} of {self._file} gives {text}", expected, hint)


def _check_text(item: Item, where: str) -> None:
    for text in (item.prompt, *item.choices):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(where, "holds half a surrogate pair", "Unicode text") from None
    if not all(item.choices):
        raise UserError(where, "an answer has no text to score", "a `choice` that is not empty")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["regex_replace"] = _regex_replace
    return environment


def _regex_replace(text: str, pattern: str, replacement: str) -> str:
    return re.sub(pattern, replacement, text)
