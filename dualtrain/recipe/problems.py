"""From a recipe's values with their places to a :class:`Recipe`, or to everything wrong with it.

``load`` calls :func:`validate`. All mistakes are found in one go: where a value is refused, the
checks that need it are left out and all others still run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

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


def validate(tree: Located) -> tuple[Recipe | None, list[UserError]]:
    """Check the values of a recipe.

    Args:
        tree: What the files and the command line say, merged.

    Returns:
        The recipe, or None and all mistakes, in order of place.
    """
    values = tree.plain()
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds {shown(values)}"
        expected = "a recipe: `name: ...`, `alpha: ...`, ..."
        return None, [UserError(str(tree.place), what, expected)]
    found: list[tuple[Place, Path, str, str, str]] = [
        (tree.locate(path), path, f"is no setting any more: {why}", "", "remove it")
        for path, why in REMOVED.items()
        if (given := tree.at(path)) is not None and given.value is not None
    ]
    refused: set[Path] = set()
    recipe = _build(values)
    if isinstance(recipe, ValidationError):
        for path, detail in _by_path(recipe, values).items():
            refused.add(path)
            found.append((tree.locate(path), path, *_explain(path, detail)))
        recipe = _build_without(values, refused)
    for conflict in find_conflicts(recipe) if recipe is not None else ():
        paths = conflict.paths
        if not any(_overlap(path, bad) for path in paths for bad in refused):
            # Where the recipe says something of it; some of the values are defaults.
            there = (tree.at(path) for path in paths)
            place = next((node.place for node in there if node is not None), tree.place)
            found.append((place, paths[0], conflict.what, conflict.expected, conflict.hint))
    errors = [
        UserError(f"{place}: {dotted(path)}", *parts)
        for place, path, *parts in sorted(found, key=lambda problem: problem[0])
    ]
    return (None if errors else recipe), errors


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


def _explain(path: Path, detail: ErrorDetails) -> tuple[str, str, str]:
    """What is wrong with the value at a path, what is expected, and a hint."""
    kind, value, expected = detail["type"], detail.get("input"), describe.expectation(path)
    if path == ("sweep",):
        what = "stands for many runs, and this is about one"
        return what, "`dualtrain sweep` with this file", ""
    if kind == "extra_forbidden":
        siblings, hint = describe.keys(path[:-1]), describe.nearest_key(path)
        many = len(siblings) > MANY_KEYS and hint
        return "unknown key", "" if many else f"one of {', '.join(siblings)}", hint
    if kind in ("missing", "union_tag_not_found"):
        return "is missing", expected, ""
    if kind == "union_tag_invalid" and isinstance(value, dict):
        value = value["name"]
    words = describe.options(path)
    if isinstance(value, str) and words:
        return f"{shown(value)} is not known", expected, nearest(value, words)
    if kind == "value_error":
        return f"{shown(value)} {detail.get('ctx', {}).get('error')}", expected, ""
    if kind.endswith("too_short") and not value:
        return "is empty", expected, ""
    if kind in ("too_short", "too_long", "string_pattern_mismatch") or "than" in kind:
        return f"{shown(value)} is not allowed", expected, ""
    return _mismatch(value), expected, _type_hint(value, expected)


def _mismatch(value: object) -> str:
    if value is None or isinstance(value, (dict, list, bool)):
        return f"is {shown(value)}"
    return f"{shown(value)} is {'text' if isinstance(value, str) else 'not allowed'}"


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
