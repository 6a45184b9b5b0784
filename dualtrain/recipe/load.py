"""Read a recipe: its file, what it extends, the command line's changes; checked as a whole.

``cli`` calls :func:`load_recipe` once; what :func:`dump_recipe` writes travels to every rank and
into every checkpoint, and loads back to an equal recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dualtrain.common.errors import UserError, UserErrors, raise_together
from dualtrain.recipe.problems import validate
from dualtrain.recipe.schema import Recipe
from dualtrain.recipe.shipped import find_recipe
from dualtrain.recipe.yaml_source import Located, dotted, dump, is_unicode, parse, shown
from dualtrain.recipe.yaml_source import Path as KeyPath

COMMAND_LINE = "command line"

KINDS: frozenset[KeyPath] = frozenset(
    {("alpha",), ("objective", "corruption"), ("optim", "schedule")}
)
"""Sections that are one of several kinds, told apart by ``name``: another name starts afresh."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with its origin.

    Attributes:
        source: The file, as the user may open it.
        origins: For each dotted key that a file or the command line gives, where; others are
            defaults.
    """

    recipe: Recipe
    source: str
    origins: Mapping[str, str]

    @cached_property
    def text(self) -> str:
        """The resolved recipe as YAML."""
        return dump_recipe(self.recipe)


@dataclass(frozen=True)
class RecipeTree:
    """A recipe's values with their places, merged but not checked yet."""

    file: Path
    tree: Located
    errors: tuple[UserError, ...] = ()

    @property
    def source(self) -> str:
        """The file, as the user may open it."""
        return _shown_path(self.file)

    def without(self, key: str) -> RecipeTree:
        """The same without one of its top-level keys."""
        if not isinstance(self.tree.value, dict):
            return self
        rest = {name: child for name, child in self.tree.value.items() if name != key}
        return replace(self, tree=replace(self.tree, value=rest))

    def changed(self, key: str, value: Located) -> RecipeTree:
        """The same with a value at a dotted key.

        Raises:
            UserError: The key leads through a list to an item that is not there.
        """
        return replace(self, tree=_assign(self.tree, key.split("."), value, ()))

    def load(self) -> LoadedRecipe:
        """Check the values.

        Raises:
            UserError: Something is wrong with them, or was before; everything at once.
        """
        recipe, mistakes = validate(self.tree)
        # What could not be read stands there as null, of which nothing more is to be said.
        places = {error.where for error in self.errors}
        raise_together([*self.errors, *(e for e in mistakes if e.where not in places)])
        assert recipe is not None  # or there are mistakes
        origins = {dotted(path): str(place) for path, place in self.tree.leaves()}
        return LoadedRecipe(recipe, self.source, origins)


def load_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, merge and check a recipe.

    Args:
        path_or_name: A file, or the name of a shipped recipe such as ``paper/470m``.
        overrides: ``key=value`` with a dotted key, which may index lists, and a YAML value; later
            ones win.

    Raises:
        UserError: There is no such recipe, or something is wrong with it; all problems at once,
            each with the file and line where it stands.
    """
    return read_recipe(path_or_name, overrides).load()


def read_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> RecipeTree:
    """Read and merge a recipe without checking its values: the first half of :func:`load_recipe`.

    Raises:
        UserError: There is no such recipe.
    """
    file = find_recipe(path_or_name)
    tree, errors = _read_chain(file, ())
    # A list or a text has no keys to change; that it is no recipe is said when it is checked.
    for override in overrides if tree.value is None or isinstance(tree.value, dict) else ():
        try:
            tree = _override(tree, override)
        except UserError as error:
            errors.append(error)
    return RecipeTree(file, tree, tuple(errors))


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML with every field, that loads back to an equal recipe."""
    return dump(recipe.model_dump(mode="json"))


def merge(base: Located | None, over: Located, path: KeyPath = ()) -> Located:
    """Lay one section over another: keys of `over` win, sections merge, all else is replaced.

    A null replaces, and so does a section that is of another kind.
    """
    if base is None or not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    names = base.child("name"), over.child("name")
    if path in KINDS and names[0] and names[1] and names[0].value != names[1].value:
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(base.value.get(key), child, (*path, key))
    return replace(over, value=merged)


def _read_chain(file: Path, below: tuple[Path, ...]) -> tuple[Located, list[UserError]]:
    """Read a file over what it extends.

    Args:
        below: The files that led here, the user's first.

    Returns:
        The merged values, and what is wrong with the YAML.
    """
    tree, errors = parse(_read(file), _shown_path(file))
    if not isinstance(tree.value, dict) or "extends" not in tree.value:
        return tree, errors
    own = {key: child for key, child in tree.value.items() if key != "extends"}
    try:
        parent = _parent(file, tree.value["extends"], below)
        base, more = _read_chain(parent, (*below, file))
        if base.value is not None and not isinstance(base.value, dict):
            raise UserError(str(base.place), f"holds {shown(base.plain())}", "a recipe")
    except UserError as error:
        # Without the base, whatever it provides would be reported as missing.
        raise UserErrors([*errors, error]) if errors else error from None
    return merge(base, replace(tree, value=own)), [*more, *errors]


def _parent(file: Path, extends: Located, below: tuple[Path, ...]) -> Path:
    where = f"{extends.place}: extends"
    if not isinstance(extends.value, str):
        raise UserError(
            where, f"is {shown(extends.plain())}", "the path or the name of another recipe"
        )
    try:
        parent = find_recipe(extends.value, beside=file.parent)
    except UserError as error:
        raise UserError(
            where, f"{extends.value!r}: {error.what}", error.expected, error.hint
        ) from None
    chain = [*below, file]
    resolved = [link.resolve() for link in chain]
    if parent.resolve() in resolved:
        circle = [*chain[resolved.index(parent.resolve()) :], parent]
        what = "goes in a circle: " + " -> ".join(_shown_path(link) for link in circle)
        raise UserError(where, what, "a recipe that does not lead back here")
    return parent


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(_shown_path(file), "is not UTF-8 text", "a recipe in YAML") from None
    except OSError as error:
        raise UserError(_shown_path(file), f"cannot be read: {error.strerror}") from None


def _override(tree: Located, override: str) -> Located:
    """Apply one ``key=value``."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        hint = "there are no spaces around =" if not equals else ""
        raise UserError(COMMAND_LINE, f"{override!r} is no override", "key=value", hint)
    if not is_unicode(key):
        raise UserError(COMMAND_LINE, f"the key {key!r} has half of a character", "a setting's key")
    if parts == ["extends"]:
        what = "belongs into a file, where it names what the file changes"
        raise UserError(f"{COMMAND_LINE}: extends", what, "the key of a setting")
    try:
        value, errors = parse(text, COMMAND_LINE, line=0, path=tuple(parts))
    except UserError as error:
        raise UserError(f"{COMMAND_LINE}: {key}", error.what, hint=error.hint) from None
    if errors:
        raise errors[0]
    return _assign(tree, parts, value, ())


def _assign(node: Located | None, keys: Sequence[str], value: Located, path: KeyPath) -> Located:
    if not keys:
        return merge(node, value, path)
    key, rest = keys[0], keys[1:]
    if node is not None and isinstance(node.value, list):
        items = list(node.value)
        if not key.isdecimal() or int(key) >= len(items):
            expected = f"an index from 0 to {len(items) - 1}" if items else "the whole list"
            raise UserError(
                f"{COMMAND_LINE}: {dotted((*path, key))}", f"no item {key!r} in the list", expected
            )
        items[int(key)] = _assign(items[int(key)], rest, value, (*path, int(key)))
        return replace(node, value=items)
    if node is None or not isinstance(node.value, dict):
        return Located({key: _assign(None, rest, value, (*path, key))}, value.place)
    child = _assign(node.value.get(key), rest, value, (*path, key))
    merged = merge(node, Located({key: child}, value.place), path)
    return replace(merged, place=node.place)


def _shown_path(file: Path) -> str:
    """The path as short as it can be: relative below the current directory."""
    resolved = file.resolve()
    try:
        return str(resolved.relative_to(Path.cwd()))
    except ValueError:
        return str(resolved)
