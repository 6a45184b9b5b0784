"""From a line of data to a question: the Jinja templates and expressions of a task file, sandboxed.

A task file may come from anywhere, so its templates cannot reach anything but the line of data. A
field that is not there is an error and never empty text; so is one that is null, and a boolean, a
list or a section that would become text as Python writes it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dualtrain.common.errors import UserError
from dualtrain.common.input_files import check_unicode
from dualtrain.recipe.yaml_source import shown

Record = Mapping[str, Any]
"""A line of data: a JSON object."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        prompt: Text in front of the answers; may be empty.
        choices: The answers as they are scored, with their leading space if any.
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
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def compile_expression(text: str) -> Callable[[Record], Any]:
    """A function from a record to the expression's value.

    Raises:
        ValueError: It is no expression.
    """
    try:
        return _environment().compile_expression(text, undefined_to_none=False)
    except TemplateSyntaxError as error:
        raise ValueError(error.message) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class Templates:
    """The compiled parts of a task file."""

    def __init__(self, parts: Mapping[str | int, Callable[[Record], Any]], file: str) -> None:
        self._parts = parts
        self._file = file

    def item(self, record: Record, *, where: str, line: int) -> Item:
        """Make the question of a line of data.

        Args:
            where: ``file:line`` of it, for messages.

        Raises:
            UserError: The line is not as the task file expects it.
        """
        record = _guard_fields(record, where)
        answers = self._answers(record, where)
        group = self._group(record, where) if "group" in self._parts else None
        item = Item(
            prompt=self._value("prompt", record, where),
            choices=tuple(
                self._value("choice", {**record, "choice": answer}, where) for answer in answers
            ),
            gold=self._gold(record, len(answers), where),
            group=group,
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
        record = _guard_fields(record, where)
        return {str(key): self._value(key, record, where) for key in self._parts}

    def _answers(self, record: Record, where: str) -> list[str]:
        answers = self._value("choices", record, where)
        if not isinstance(answers, (list, tuple)) or len(answers) < 2:
            raise self._error(where, "choices", answers, "a list of two or more texts")
        for answer in answers:
            if not isinstance(answer, str) or not answer:
                is_number = _is_text(answer) and not isinstance(answer, str)
                hint = "`| map('string') | list` makes text of numbers" if is_number else ""
                raise self._error(where, "choices", answers, "texts that are not empty", hint)
        return list(answers)

    def _gold(self, record: Record, count: int, where: str) -> int:
        gold = self._value("gold", record, where)
        expected = f"a number from 0 to {count - 1}"
        if _is_boolean(gold) or not isinstance(gold, int):
            raise self._error(where, "gold", gold, expected, _gold_hint(gold))
        if not 0 <= gold < count:
            hint = "`- 1` makes numbers from 1 on begin with 0" if gold == count else ""
            raise self._error(where, "gold", gold, expected, hint)
        return gold

    def _group(self, record: Record, where: str) -> str:
        group = self._value("group", record, where)
        if not _is_text(group):
            raise self._error(where, "group", group, "text or a number")
        return str(group)

    def _value(self, key: str | int, record: Record, where: str) -> Any:
        try:
            value = self._parts[key](record)
            if isinstance(value, Undefined):
                str(value)  # raises what is undefined
            return value
        except Exception as error:  # the template is the user's code, and may raise anything
            fields = ", ".join(name for name in record if name != "choice") or "none"
            raise UserError(
                where,
                f"{key} of {self._file} fails: {error}",
                "a value in each field that the task file names",
                f"fields here: {fields}",
            ) from None

    def _error(self, where: str, key: str, value: Any, expected: str, hint: str = "") -> UserError:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
        text = text if len(text) <= 60 else text[:57] + "..."
        return UserError(where, f"{key} of {self._file} gives {text}", expected, hint)


def as_json(value: object, **options: Any) -> str:
    """JSON of what templates work with; options of ``json.dumps``.

    Raises:
        TypeError: Something in it has no word in JSON.
    """
    if isinstance(value, Undefined):
        str(value)  # raises what is undefined
    return json.dumps(_plain(value), sort_keys=True, default=_refuse_in_json, **options)


def _plain(value: Any) -> Any:
    """The value of the data that a guarded one stands for."""
    if isinstance(value, Undefined):
        return None
    if isinstance(value, _Boolean):
        return bool(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _refuse_in_json(value: object) -> None:
    raise TypeError(f"a {type(value).__name__}")


def _check_text(item: Item, where: str) -> None:
    for text in (item.prompt, *item.choices, item.group or ""):
        check_unicode(text, where)
    if not all(item.choices):
        raise UserError(where, "an answer has no text to score", "a `choice` that is not empty")


def _gold_hint(gold: object) -> str:
    try:
        _whole_number(gold)
    except ValueError:
        is_letter = isinstance(gold, str) and len(gold) == 1 and gold.isalpha()
        return "`['A', 'B'].index(...)` makes a number of a letter" if is_letter else ""
    return "`| int` makes a whole number of it"


class _Null(StrictUndefined):
    """A field without a value. It can be asked for (`or`, `is none`, `default`), but never used."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "null"


class _Boolean(int):
    """A boolean of the data: it may be asked and counted with, but is not text."""

    _path: str

    def __new__(cls, value: bool, path: str) -> _Boolean:
        self = super().__new__(cls, value)
        self._path = path
        return self

    def __repr__(self) -> str:
        return "true" if self else "false"

    def __str__(self) -> str:
        raise TypeError(f"{self._path!r} is {self!r} and no text")

    def __format__(self, spec: str) -> str:
        return str(self)


class _List(list):
    """A list of the data, which is not text."""

    def __init__(self, values: Any, path: str) -> None:
        super().__init__(values)
        self._path = path

    def __str__(self) -> str:
        raise TypeError(f"{self._path!r} is a list and no text")


class _Object(dict):
    """An object of the data: its fields come before the methods of a dict, and it is not text."""

    def __init__(self, values: Any, path: str) -> None:
        super().__init__(values)
        self._path = path

    def get(self, key: Any, default: Any = None) -> Any:
        missing = _Null(hint=f"{self._path!r} has no {key!r}") if default is None else default
        return super().get(key, missing)

    def __str__(self) -> str:
        raise TypeError(f"{self._path!r} is a section and no text")


def _guard_fields(record: Record, where: str) -> dict[str, Any]:
    try:
        return {key: _guard(value, str(key)) for key, value in record.items()}
    except RecursionError:
        raise UserError(where, "is nested too deeply", "a JSON object") from None


def _guard(value: Any, path: str) -> Any:
    if value is None:
        return _Null(hint=f"{path!r} is null")
    if isinstance(value, bool):
        return _Boolean(value, path)
    if isinstance(value, float) and not math.isfinite(value):
        return _Null(hint=f"{path!r} is {value}")
    if isinstance(value, dict):
        fields = ((key, _guard(inner, f"{path}.{key}")) for key, inner in value.items())
        return _Object(fields, path)
    if isinstance(value, (list, tuple)):
        return _List((_guard(inner, f"{path}[{n}]") for n, inner in enumerate(value)), path)
    return value


class _CodeGenerator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Let ``~`` take nothing that is no text either."""
        self.write("environment.concatenate((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator

    @staticmethod
    def concatenate(parts: Iterable[Any]) -> str:
        return "".join(str(_finalize(part)) for part in parts)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, _Object) and attribute in obj:
            return obj[attribute]
        return self._named(obj, attribute, super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self._named(obj, argument, super().getitem(obj, argument))

    def _named(self, obj: Any, name: Any, found: Any) -> Any:
        """What was found, or an error that says where it is missing."""
        is_missing = isinstance(found, Undefined) and not isinstance(found, _Null)
        if is_missing and isinstance(obj, (_List, _Object)):
            return self.undefined(hint=f"{obj._path!r} has no {name!r}")
        return found


def _environment() -> _Environment:
    environment = _Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=_finalize
    )
    environment.filters |= {
        **{name: _of_text(environment.filters[name]) for name in _TEXT_FILTERS},
        "int": _whole_number,
        "float": _number,
        "regex_replace": _regex_replace,
    }
    environment.policies |= {"json.dumps_function": as_json, "json.dumps_kwargs": {}}
    environment.tests |= {
        "none": lambda value: value is None or isinstance(value, _Null),
        "boolean": _is_boolean,
        "true": lambda value: _is_boolean(value) and value == 1,
        "false": lambda value: _is_boolean(value) and value == 0,
    }
    return environment


def _is_boolean(value: object) -> bool:
    return isinstance(value, (bool, _Boolean))


def _is_text(value: object) -> bool:
    """Text, or a number, which becomes it."""
    return isinstance(value, (str, int, float)) and not _is_boolean(value)


def _finalize(value: Any) -> Any:
    """Refuse to show what is no text, as Python would write it."""
    if isinstance(value, (Undefined, _Boolean, _List, _Object)):
        str(value)  # raises, with the name of the field
    if not _is_text(value):
        raise ValueError(f"{shown(value)} is no text")
    return value


_TEXT_FILTERS = ("capitalize", "lower", "string", "title", "trim", "upper")


def _of_text(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes text and numbers only."""
    return wraps(function)(lambda value, *rest: function(_finalize(value), *rest))


_REFUSE: Any = object()


def _whole_number(value: Any, default: Any = _REFUSE, base: int = 10) -> Any:
    """Jinja's `int`, but without a default it refuses what is no whole number, where that has 0."""
    try:
        if isinstance(value, str):
            try:
                return int(value, base)
            except ValueError:
                value = float(value)  # "2.0"
        if value == int(value):
            return int(value)
    except (OverflowError, TypeError, ValueError):
        pass
    return _instead(value, default, "a whole number")


def _number(value: Any, default: Any = _REFUSE) -> Any:
    """Jinja's `float`, but without a default it refuses what is no number, where that has 0."""
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        return _instead(value, default, "a number")


def _instead(value: object, default: Any, kind: str) -> Any:
    if default is _REFUSE:
        raise ValueError(f"{shown(value)} is not {kind}")
    return default


def _regex_replace(text: Any, pattern: str, replacement: str) -> str:
    return re.sub(pattern, replacement, str(text))
