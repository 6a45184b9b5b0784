"""From a recipe's values with their places to a :class:`Recipe`, or to everything wrong with it.

``load`` calls :func:`validate`. All mistakes are found in one go: where a value is refused, the
checks that need it are left out and all others still run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dualtrain.common.errors import UserError, nearest
from dualtrain.recipe import describe
from dualtrain.recipe.checks import find_conflicts
from dualtrain.recipe.schema import REMOVED, Recipe
from dualtrain.recipe.yaml_source import Located, Path, Place, Plain, dotted, shown

PLACEHOLDERS: Mapping[str, Plain] = {"name": "x", "alpha": 1, "data": {"path": "x"}}
"""Values for required keys that are missing or refused, so that the other checks can run."""

MANY_KEYS = 8
"""More keys than this are not listed beside a key that is near."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe, in order of place."""

    place: Place
    path: Path
    what: str
    expected: str = ""
    hint: str = ""

    def error(self) -> UserError:
        """The problem as it is shown."""
        where = f"{self.place}: {dotted(self.path)}" if self.path else str(self.place)
        return UserError(where, self.what, self.expected, self.hint)


def validate(tree: Located) -> tuple[Recipe | None, list[Problem]]:
    """Check the values of a recipe.

    Args:
        tree: What the files and the command line say, merged.

    Returns:
        The recipe, or None and the problems.
    """
    values = tree.plain()
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds {shown(values)}"
        return None, [Problem(tree.place, (), what, "a recipe: `name: ...`, `alpha: ...`, ...")]
    refused: set[Path] = set()
    problems = [
        Problem(tree.locate(path), path, f"is no setting any more: {why}", hint="remove it")
        for path, why in REMOVED.items()
        if (given := tree.at(path)) is not None and given.value is not None
    ]
    recipe = _build(values)
    if isinstance(recipe, ValidationError):
        for path, detail in _by_path(recipe, values).items():
            refused.add(path)
            problems.append(_explain(path, detail, values, tree))
        recipe = _build_without(values, refused)
    if recipe is not None:
        for conflict in find_conflicts(recipe):
            involved = {conflict.path, *conflict.involved}
            if not any(_overlap(path, bad) for path in involved for bad in refused):
                place = _first_place(tree, (conflict.path, *conflict.involved))
                problems.append(
                    Problem(place, conflict.path, conflict.what, conflict.expected, conflict.hint)
                )
    return (None if problems else recipe), problems


def _build(values: dict[str, Plain]) -> Recipe | ValidationError:
    """Validate strictly: a quoted number is text. By way of JSON, whose lists may be tuples."""
    try:
        return Recipe.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        return error


def _build_without(values: dict[str, Plain], refused: set[Path]) -> Recipe | None:
    """Build the recipe without the refused values, adding to `refused` what else has to go."""
    pruned = _pruned(values, refused)
    recipe = _build(pruned)
    if isinstance(recipe, ValidationError):
        # What is left of a section may be refused too: do without the whole of it.
        sections = {path[:1] for path in _by_path(recipe, pruned)}
        refused |= sections
        recipe = _build(_pruned(values, refused))
    return None if isinstance(recipe, ValidationError) else recipe


def _pruned(values: dict[str, Plain], refused: Iterable[Path]) -> dict[str, Plain]:
    pruned = json.loads(json.dumps(values))
    for path in refused:
        _remove(pruned, path)
    for key, value in PLACEHOLDERS.items():
        if key not in pruned:
            pruned[key] = value
    data = pruned["data"]
    if isinstance(data, dict):
        data.setdefault("path", "x")
    return pruned


def _remove(values: Plain, path: Path) -> None:
    *parents, last = path
    for key in parents:
        if isinstance(values, dict) and key in values:
            values = values[str(key)]
        elif isinstance(values, list) and isinstance(key, int) and key < len(values):
            values = values[key]
        else:
            return
    if isinstance(values, dict):
        values.pop(str(last), None)


def _by_path(error: ValidationError, values: Plain) -> dict[Path, ErrorDetails]:
    """One error for each place in the recipe: alternatives of a value each report their own."""
    found: dict[Path, ErrorDetails] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_recipe_path(detail, values), detail)
    return found


def _recipe_path(detail: ErrorDetails, values: Plain) -> Path:
    """The error's path in the recipe: pydantic's, less the names of the kinds of a value."""
    path: list[str | int] = []
    node: Plain = values
    location = detail["loc"]
    for position, key in enumerate(location):
        if isinstance(node, dict) and key in node:
            node = node[str(key)]
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            node = node[key]
        elif detail["type"] != "missing" or position < len(location) - 1:
            continue
        path.append(key)
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append("name")
    return tuple(path)


def _explain(path: Path, detail: ErrorDetails, values: Plain, tree: Located) -> Problem:
    place, kind, value = tree.locate(path), detail["type"], detail.get("input")
    expected = describe.expectation(path)
    if path == ("sweep",):
        what = "stands for many runs, and this is about one"
        return Problem(place, path, what, "`dualtrain sweep` with this file")
    if kind == "extra_forbidden":
        siblings, hint = describe.keys(path[:-1]), describe.nearest_key(path)
        many = len(siblings) > MANY_KEYS and hint
        expected = "" if many else f"one of {', '.join(siblings)}"
        return Problem(place, path, "unknown key", expected, hint)
    if kind in ("missing", "union_tag_not_found"):
        return Problem(place, path, "is missing", expected)
    if kind == "union_tag_invalid" and isinstance(value, dict):
        value = value["name"]
    words = describe.options(path)
    if isinstance(value, str) and words:
        what = f"{shown(value)} is not known"
        return Problem(place, path, what, expected, nearest(value, words))
    if kind == "value_error":
        reason = detail.get("ctx", {}).get("error")
        return Problem(place, path, f"{shown(value)} {reason}", expected)
    if kind in ("too_short", "too_long", "string_pattern_mismatch") or "than" in kind:
        return Problem(place, path, f"{shown(value)} is not allowed", expected)
    return Problem(place, path, _mismatch(value), expected, _type_hint(value, expected))


def _mismatch(value: object) -> str:
    if value is None or isinstance(value, (dict, list, bool)):
        return f"is {shown(value)}"
    if isinstance(value, str):
        return f"{shown(value)} is text"
    return f"{shown(value)} is not allowed"


def _type_hint(value: object, expected: str) -> str:
    """How to write what was probably meant."""
    if value is None:
        return "leave the key out to take its default"
    if isinstance(value, float) and "integer" in expected and value.is_integer():
        return f"write {int(value)}"
    if not isinstance(value, str):
        return ""
    if "true" in expected and value.lower() in ("yes", "on", "no", "off", "y", "n"):
        return f"write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
    if re.fullmatch(r"[-+]?[\d_]*\d(\.\d+)?([eE][-+]?\d+)?", value):
        return f"write {value.replace('_', '')}, without {'_' if '_' in value else 'quotes'}"
    return ""


def _overlap(one: Path, other: Path) -> bool:
    """Whether one of the paths leads to the other or to a part of it."""
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _first_place(tree: Located, paths: Iterable[Path]) -> Place:
    """The place of the first of the values that stands in the recipe; some are defaults."""
    for path in paths:
        if tree.at(path) is not None:
            return tree.locate(path)
    return tree.place
