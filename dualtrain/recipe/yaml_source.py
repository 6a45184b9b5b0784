"""Strict YAML in and out, with the file and line of every value.

``load`` reads recipes with :func:`parse`, and ``engine.config`` reads DeepSpeed's JSON with it, so
that any later complaint can name its place. :func:`dump` writes what :func:`parse` reads back
unchanged.

Scalars follow the core schema of YAML 1.2: ``1e-3`` is a number, ``yes``, ``on`` and ``1_000`` are
text. PyYAML alone follows YAML 1.1, where ``1e-3`` is text and ``no`` is false.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dualtrain.common.errors import UserError

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]
Path = tuple[str | int, ...]
"""Keys and list indices from the root, such as ``("optim", "lr")``."""

TAG = "tag:yaml.org,2002:"
MOST_REPEATED = 10_000
"""Values that aliases may stand for, together; a few lines of them could stand for billions."""


@dataclass(frozen=True, order=True)
class Place:
    """Where a value stands: a file and its line (from 1), or ``command line`` and line 0."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Located:
    """A value of a YAML document with its place; a mapping's values and a list's items too."""

    value: Scalar | list[Located] | dict[str, Located]
    place: Place

    def plain(self) -> Plain:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def children(self) -> Mapping[str | int, Located]:
        """A section's values by their keys, or a list's items by their indices."""
        if isinstance(self.value, list):
            return dict(enumerate(self.value))
        return {**self.value} if isinstance(self.value, dict) else {}

    def child(self, key: str | int) -> Located | None:
        """A value or an item; None if it is not there."""
        return self.children().get(key)

    def at(self, path: Path) -> Located | None:
        """What stands at a path; None where nothing does."""
        node: Located | None = self
        for key in path:
            node = None if node is None else node.child(key)
        return node

    def locate(self, path: Path) -> Place:
        """The place of the value at a path, or of its nearest enclosing section that is there."""
        there = (self.at(path[:length]) for length in range(len(path), -1, -1))
        return next(node.place for node in there if node is not None)

    def leaves(self, path: Path = ()) -> Iterator[tuple[Path, Place]]:
        """Every value that is neither a section nor a list, with its path; empty ones, too."""
        if not self.children():
            yield path, self.place
        for key, child in self.children().items():
            yield from child.leaves((*path, key))


def parse(
    text: str, file: str, *, line: int | None = None, path: Path = ()
) -> tuple[Located, list[UserError]]:
    """Read one YAML document.

    Args:
        file: What to call it in places.
        line: A fixed line for all places; None counts the lines of the text.
        path: Where the document belongs in a larger one, for messages.

    Returns:
        The document (an empty one is null), and what is wrong with it but can be passed over:
        duplicate keys (the first counts), keys that are not text, tags.

    Raises:
        UserError: It is not YAML, or its aliases stand for too much.
    """
    walk = _Walk(file, line)
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return Located(None, Place(file, line or 1)), []
        return walk.convert(node, path, walk.place(node)), walk.problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file, line if line is not None else (mark.line + 1 if mark else 1))
        context = error.context
        if context and error.context_mark and error.context_mark is not mark and line is None:
            context += f" that begins on line {error.context_mark.line + 1}"
        what = ", ".join(part for part in (context, error.problem) if part)
        raise UserError(str(place), f"not valid YAML: {what}", hint=_syntax_hint(what)) from None
    except yaml.YAMLError as error:
        raise UserError(file, f"not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UserError(file, "not valid YAML: nested too deeply") from None


def dump(value: Mapping[str, object]) -> str:
    """Write a mapping as YAML that :func:`parse`, and any reader of YAML 1.1 or 1.2, reads back."""
    return yaml.dump(
        dict(value),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=100,
    )


def load(text: str) -> Any:
    """Read what :func:`dump` wrote, without places, and quickly.

    Raises:
        yaml.YAMLError: It is not YAML.
    """
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # C is ten times faster


def dotted(path: Path) -> str:
    """A path as users write it: ``algorithms.0.use``."""
    return ".".join(map(str, path))


def is_unicode(text: str) -> bool:
    """Whether a text is all characters: no half of a pair, no byte that could not be decoded."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def shown(value: object) -> str:
    """A value as YAML shows it, in one short piece."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, (list, tuple)):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Loader(yaml.SafeLoader):
    """Takes scalars for what the YAML 1.2 core schema says."""

    yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_list(self, data: Sequence[object]) -> yaml.Node:
        is_flat = not any(isinstance(item, (dict, list)) for item in data)
        return self.represent_sequence(f"{TAG}seq", data, flow_style=is_flat)


def _integer(text: str) -> int:
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_READERS: dict[str, Callable[[str], Scalar]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": _integer,
    "float": _float,
    "str": str,
}
_TAGS = {yaml.ScalarNode: tuple(_READERS), yaml.SequenceNode: ("seq",), yaml.MappingNode: ("map",)}
_SCALARS: tuple[tuple[str, str, Sequence[str | None]], ...] = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)

_Dumper.add_representer(list, _Dumper.represent_list)
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(TAG + _name, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(TAG + _name, re.compile(_pattern), _first)


class _Walk:
    """From PyYAML's nodes to :class:`Located` values: each once, or as often as aliases say."""

    def __init__(self, file: str, line: int | None) -> None:
        self._file, self._line = file, line
        self._begun: set[int] = set()
        self._open: set[int] = set()
        self._repeated = 0
        self.problems: list[UserError] = []

    def place(self, node: yaml.Node) -> Place:
        line = self._line if self._line is not None else node.start_mark.line + 1
        return Place(self._file, line)

    def convert(self, node: yaml.Node, path: Path, place: Place) -> Located:
        if id(node) in self._open:
            self._report(place, path, "an alias inside its own anchor")
            return Located(None, place)
        kind = node.tag.removeprefix(TAG)
        if kind not in _TAGS[type(node)]:
            self._report(place, path, f"the tag {node.tag!r} has no meaning here", "a plain value")
            return Located(None, place)
        self._repeated += id(node) in self._begun
        if self._repeated > MOST_REPEATED:
            what = f"aliases stand for more than {MOST_REPEATED:,} values"
            raise UserError(str(place), what, "the values themselves")
        self._begun.add(id(node))
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return Located(self._mapping(node, path), place)
            if isinstance(node, yaml.SequenceNode):
                items = enumerate(node.value)
                return Located(
                    [self.convert(item, (*path, i), self.place(item)) for i, item in items], place
                )
            return Located(self._scalar(kind, node.value, path, place), place)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Located]:
        children: dict[str, Located] = {}
        for key_node, value_node in node.value:
            # A value's place is the line of its key: there the reader looks for it.
            place, key = self.place(key_node), key_node.value
            if key_node.tag != f"{TAG}str":
                self._report(place, path, f"the key {key!r} is not text", "a name")
            elif not is_unicode(key):
                self._report(place, path, f"the key {shown(key)} has half of a character")
            elif key == "<<" and key_node.style is None:
                what = "merging with << is not part of YAML 1.2, and nothing would come of it"
                self._report(place, path, what, "the keys themselves, or `extends`")
            else:
                child = self.convert(value_node, (*path, key), place)
                first = children.setdefault(key, child)
                if first is not child:
                    line = first.place.line
                    expected = f"each key once{f'; the first is on line {line}' * bool(line)}"
                    self._report(place, (*path, key), "duplicate key", expected)
        return children

    def _scalar(self, kind: str, text: str, path: Path, place: Place) -> Scalar:
        try:
            value = _READERS[kind](text)
        except ValueError:
            self._report(place, path, f"{shown(text)} is not a number that can be read")
            return None
        if isinstance(value, str) and not is_unicode(value):
            self._report(place, path, f"{shown(text)} has half of a character", "Unicode text")
            return ""
        return value

    def _report(self, place: Place, path: Path, what: str, expected: str = "") -> None:
        where = f"{place}: {dotted(path)}" if path else str(place)
        self.problems.append(UserError(where, what, expected))


def _syntax_hint(what: str) -> str:
    if "tab" in what or "'\\t'" in what:
        return "indent with spaces, not tabs"
    if "mapping values are not allowed" in what or "cannot start any token" in what:
        return "put quotes around text that has special characters such as `: `"
    return ""
