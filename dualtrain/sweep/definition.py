"""The ``sweep:`` section of a recipe, and the points it stands for.

A sweep is a recipe with a section more; ``extends:`` keeps the two apart where that is wanted::

    extends: quickstart
    name: mixtures
    sweep:
      grid:                        # every combination; a list of such grids is as good
        repetitions: [1, 8, 32]
        alpha: [0, 1/4, 1/2, 1]
        seed: [0, 1, 2]
      list:                        # single points beside it
        - {alpha: 1, repetitions: 32, optim.weight_decay: 0.8}

Everything is checked before the first point starts: each point as a recipe of its own, no point
twice, and the training budget the same wherever repetitions vary.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from pathlib import Path

from dualtrain.common.errors import UserError, UserErrors, nearest, raise_together
from dualtrain.common.files import user_path
from dualtrain.data.corpus import read_corpus
from dualtrain.derived.derive import run_length
from dualtrain.recipe.load import COMMAND_LINE, LoadedRecipe, RecipeTree, read_recipe
from dualtrain.recipe.schema import Recipe
from dualtrain.recipe.yaml_source import Located, Place, Plain, shown
from dualtrain.training.dataset import with_dataset_there

SECTION = "sweep"
OWN_KEYS = ("grid", "list", "directory")
FIXED_KEYS = ("name", "run_dir", "extends", SECTION)
"""Keys that a sweep sets itself, or that mean nothing in a point."""
LONGEST_NAME = 180
"""Characters of a directory's name; file systems stop at 255 bytes."""

_LENGTH_KEYS = ("repetitions", "alpha", "seed", "steps", "unique_tokens")

CELL_WIDTH = 24
"""Characters of a value in a table, at most."""

Values = dict[str, Located]


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        number: Its place in the sweep, from 0; what ``--index`` asks for.
        values: The value of each key that its grid sets, as the checked recipe has it.
        directory: Of the run; named by the values.
        place: Where the sweep asks for it.
    """

    number: int
    values: Mapping[str, Plain]
    directory: Path
    loaded: LoadedRecipe
    place: Place

    @property
    def label(self) -> str:
        """The name of its directory."""
        return self.directory.name

    def cells(self, keys: Sequence[str]) -> list[str]:
        """Its values of some keys, for a table; empty where it sets none."""
        return [cell(self.values[key]) if key in self.values else "" for key in keys]


@dataclass(frozen=True)
class Sweep:
    """All points of a sweep.

    Attributes:
        source: Its file, as the user may open it.
        keys: The recipe's keys that points set, in the order in which the file has them.
    """

    source: str
    directory: Path
    keys: tuple[str, ...]
    points: tuple[Point, ...]


def load_sweep(
    path_or_name: str, overrides: Sequence[str] = (), *, directory: Path | None = None
) -> Sweep:
    """Read a sweep and check every point of it.

    Args:
        path_or_name: A recipe with a ``sweep:`` section: a file, or the name of a shipped one.
        overrides: ``key=value`` for all points, as for ``dualtrain run``.
        directory: Where the points go, in place of what the file says.

    Raises:
        UserError: There is no such section; points that are no recipes, that are there twice, or
            that differ in repetitions and in their number of training tokens; all at once.
    """
    whole = read_recipe(path_or_name, overrides)
    section = whole.tree.child(SECTION)
    if section is None:
        raise UserError(
            whole.source,
            "has no `sweep:` section",
            "`sweep: {grid: {alpha: [0, 1/2, 1], seed: [0, 1, 2]}}` beside or over a recipe",
        )
    asked, errors = _read_section(section)
    errors += _without_effect(overrides, asked)
    # What was wrong in the text comes first: it is left out, and would be missed here.
    raise_together(errors and (whole.errors or errors))
    base = whole.without(SECTION)
    keys = tuple(dict.fromkeys(key for values in asked for key in values))
    folder = directory or _directory(section, base)
    points, errors = _make_points(base, asked, folder)
    errors = errors or _duplicates(points, asked) or _unequal_budgets(points)
    raise_together(errors)
    return Sweep(whole.source, folder, keys, tuple(points))


def value_at(recipe: Recipe, key: str) -> Plain:
    """The value of a recipe at a dotted key, as plain data.

    Raises:
        KeyError: There is no such key in this recipe.
    """
    node: Plain = recipe.model_dump(mode="json")
    for part in key.split("."):
        if isinstance(node, dict):
            node = node[part]
        elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            raise KeyError(key)
    return node


def in_words(value: Plain) -> str:
    """A value in a table: numbers short, text as it is, all else as JSON."""
    if isinstance(value, float):
        # Short where that is the same number; values that differ never look alike.
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value)


def cell(value: Plain) -> str:
    """A value in a narrow column."""
    text = in_words(value)
    return text if len(text) <= CELL_WIDTH else text[: CELL_WIDTH - 1] + "…"


def directory_name(values: Mapping[str, Plain]) -> str:
    """Name a point's directory by its values: ``repetitions=32,alpha=1_8,seed=0``."""
    name = ",".join(f"{key}={_in_name(value)}" for key, value in values.items())
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 10] + "-" + _digest(values)


def _in_name(value: Plain) -> str:
    text = in_words(value)
    if isinstance(value, (dict, list)) or len(text) > 40:
        return _digest(value)
    name = re.sub(r"[^A-Za-z0-9.+-]", "_", text)
    # Texts such as a/b and a_b must not share a directory; fractions have one spelling.
    is_told_apart = name == text or re.fullmatch(r"\d+/\d+", text)
    return name if is_told_apart else f"{name}-{_digest(value)}"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _directory(section: Located, base: RecipeTree) -> Path:
    asked = section.child("directory")
    if asked is not None:
        if not isinstance(asked.value, str) or not asked.value:
            what = f"is {shown(asked.plain())}"
            raise UserError(f"{asked.place}: sweep.directory", what, "a directory")
        return user_path(asked.value)
    name = base.tree.child("name")
    # A name that is missing or wrong is reported with the points.
    return Path("sweeps") / (str(name.value) if name is not None else "sweep")


def _read_section(section: Located) -> tuple[list[Values], list[UserError]]:
    """What each point sets, in order; or what is wrong with the section."""
    if not isinstance(section.value, dict):
        what = f"is {shown(section.plain())}"
        return [], [UserError(f"{section.place}: sweep", what, "`grid:`, `list:` or both")]
    errors = [
        UserError(
            f"{child.place}: sweep.{key}",
            "unknown key",
            f"one of {', '.join(OWN_KEYS)}",
            nearest(key, OWN_KEYS),
        )
        for key, child in section.value.items()
        if key not in OWN_KEYS
    ]
    points: list[Values] = []
    for grid in _mappings(section.child("grid"), "grid", errors):
        points += _combinations(grid, errors)
    for single in _mappings(section.child("list"), "list", errors):
        points.append(single)
    if not points and not errors:
        errors.append(UserError(f"{section.place}: sweep", "has no points", "`grid:` or `list:`"))
    return points, errors


def _mappings(node: Located | None, name: str, errors: list[UserError]) -> Iterator[Values]:
    """The grids, or single points, of a section: a mapping, or a list of them."""
    if node is None:
        return
    for item in node.value if isinstance(node.value, list) else [node]:
        if not isinstance(item.value, dict) or not item.value:
            what = "is empty" if item.value == {} else f"holds {shown(item.plain())}"
            expected = "recipe keys with values, such as {alpha: 1/2}"
            errors.append(UserError(f"{item.place}: sweep.{name}", what, expected))
            continue
        bad = [key for key in item.value if key in FIXED_KEYS]
        for key in bad:
            what = "cannot vary: the sweep names points and their directories"
            errors.append(UserError(f"{item.value[key].place}: sweep.{name}.{key}", what))
        if not bad:
            yield item.value


def _combinations(grid: Values, errors: list[UserError]) -> Iterator[Values]:
    """Every combination of a grid's values, the last key varying fastest."""
    axes: list[list[Located]] = []
    for key, node in grid.items():
        values = node.value if isinstance(node.value, list) else [node]
        if not values:
            errors.append(UserError(f"{node.place}: sweep.grid.{key}", "has no values"))
        axes.append(values)
    for combination in product(*axes):
        yield dict(zip(grid, combination, strict=True))


def _make_points(
    base: RecipeTree, asked: Sequence[Values], folder: Path
) -> tuple[list[Point], list[UserError]]:
    points: list[Point] = []
    errors: dict[str, UserError] = {}
    for number, values in enumerate(asked):
        try:
            points.append(_make_point(base, number, values, folder))
        except UserErrors as several:
            errors |= {str(error): error for error in several.errors}
        except UserError as error:
            errors[str(error)] = error
    return points, list(errors.values())


def _make_point(base: RecipeTree, number: int, values: Values, folder: Path) -> Point:
    tree = base
    for key, value in values.items():
        tree = tree.changed(key, value)
    loaded = with_dataset_there(tree.load())
    found = {key: value_at(loaded.recipe, key) for key in values}
    name = directory_name(found)
    directory = folder / name
    recipe = loaded.recipe.model_copy(
        update={"name": _run_name(loaded.recipe.name, name), "run_dir": str(directory)}
    )
    place = max((value.place for value in values.values()), key=lambda place: place.line)
    return Point(number, found, directory, replace(loaded, recipe=recipe), place)


def _run_name(sweep: str, label: str) -> str:
    return sweep + "-" + re.sub(r"[^A-Za-z0-9.-]+", "-", label)


def _without_effect(overrides: Sequence[str], asked: Sequence[Values]) -> list[UserError]:
    """Changes on the command line that every point would undo."""
    errors: list[UserError] = []
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key == "run_dir":
            what = "the sweep names the directories of its points"
            errors.append(UserError(f"{COMMAND_LINE}: {key}", what, hint="--dir says where"))
        elif asked and all(key in values for values in asked):
            what = "every point of the sweep sets it itself"
            hint = f"sweep.grid.{key}=... changes the values of a grid"
            errors.append(UserError(f"{COMMAND_LINE}: {key}", what, hint=hint))
    return errors


def _duplicates(points: Sequence[Point], asked: Sequence[Values]) -> list[UserError]:
    """Points that are the same run, whatever their grids set."""

    def written(point: Point) -> str:
        values = asked[point.number].items()
        return ", ".join(f"{key}: {in_words(value.plain())}" for key, value in values)

    first: dict[str, Point] = {}
    errors: list[UserError] = []
    for point in points:
        recipe = point.loaded.recipe.model_copy(update={"name": "x", "run_dir": None})
        same = first.setdefault(recipe.model_dump_json(), point)
        if same is not point:
            what = f"{{{written(point)}}} is the same run as {{{written(same)}}} ({same.place})"
            errors.append(UserError(f"{point.place}: sweep", what, "each point once"))
    return errors


def _unequal_budgets(points: Sequence[Point]) -> list[UserError]:
    """Repetitions are only comparable under the same budget: more of them, fewer unique tokens.

    Points that differ in nothing but repetitions, alpha, seed and their length have to offer the
    same choice of budgets at each number of repetitions.
    """
    budgets: dict[tuple[tuple[str, str], ...], dict[Fraction, set[int]]] = {}
    for point in points:
        if "repetitions" not in point.values:
            continue
        recipe = point.loaded.recipe
        length = run_length(recipe, read_corpus(recipe))
        others = tuple((k, in_words(v)) for k, v in point.values.items() if k not in _LENGTH_KEYS)
        tokens = length.steps * recipe.global_batch * recipe.sequence_length
        budgets.setdefault(others, {}).setdefault(length.repetitions, set()).add(tokens)
    for found in budgets.values():
        if any(tokens != next(iter(found.values())) for tokens in found.values()):
            each = ", ".join(
                f"{' or '.join(f'{n:,}' for n in sorted(tokens))} at {float(repetitions):g}"
                for repetitions, tokens in found.items()
            )
            return [
                UserError(
                    f"{points[0].place}: sweep",
                    f"points that differ in repetitions have different training tokens: {each}",
                    "the same budget, so that only repetition differs",
                    "set steps, not unique_tokens: the unique tokens then follow",
                )
            ]
    return []
