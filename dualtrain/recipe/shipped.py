"""Recipes and DeepSpeed configurations that come with dualtrain, by name.

In a checkout they are the directories ``recipes`` and ``ds_configs`` beside the package, in an
installed wheel they lie in ``dualtrain/_shipped``.
"""

from __future__ import annotations

from pathlib import Path

from dualtrain.common.errors import UserError, nearest
from dualtrain.common.files import LONGEST_SHOWN, file_problem, user_path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped_directory(kind: str) -> Path:
    """The directory of the shipped ``recipes`` or ``ds_configs``."""
    installed = PACKAGE / "_shipped" / kind
    return installed if installed.is_dir() else PACKAGE.parent / kind


def recipe_names() -> list[str]:
    """Names of all shipped recipes, such as ``paper/470m``; those at the top first."""
    return _names("recipes", ".yaml")


def ds_config_names() -> list[str]:
    """Names of all shipped DeepSpeed configurations, such as ``zero1``."""
    return _names("ds_configs", ".json")


def shipped_recipes() -> list[tuple[str, str]]:
    """Name and summary of every shipped recipe; the summary is its first line, a comment."""
    directory = shipped_directory("recipes")
    summaries = []
    for name in recipe_names():
        first = (directory / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        summaries.append((name, first.lstrip("# ").strip()))
    return summaries


def find_recipe(path_or_name: str, *, beside: Path | None = None) -> Path:
    """Find a recipe file.

    Args:
        path_or_name: A path, or the name of a shipped recipe, with or without ``.yaml``.
        beside: The directory that relative paths start from; None is the current one.

    Raises:
        UserError: There is none; names the nearest and lists all shipped ones.
    """
    path = (beside or Path()) / user_path(path_or_name)
    if _is_file(path, path_or_name):
        return path
    name = _shipped_name(path_or_name)
    if name in recipe_names():
        return shipped_directory("recipes") / f"{name}.yaml"
    what = "is a directory" if path.is_dir() else "no such file, and no shipped recipe of that name"
    raise _unknown(path_or_name, name, what, "a recipe file", recipe_names())


def find_ds_config(path_or_name: str, *, where: str) -> Path:
    """Find a DeepSpeed configuration, by path or by the name of a shipped one.

    Args:
        where: What to call the place of the name in errors.

    Raises:
        UserError: There is none; names the nearest and lists all shipped ones.
    """
    names = ds_config_names()
    if path_or_name in names:
        return shipped_directory("ds_configs") / f"{path_or_name}.json"
    path = user_path(path_or_name)
    if _is_file(path, where):
        return path
    what = f"{path_or_name!r}: no such file, and no shipped ds_config of that name"
    raise _unknown(where, path.stem, what, "a JSON file", names)


def _is_file(path: Path, where: str) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # too long, or behind a directory that is locked
        raise file_problem(error, where[:LONGEST_SHOWN]) or error from None


def _names(kind: str, suffix: str) -> list[str]:
    directory = shipped_directory(kind)
    files = directory.rglob(f"*{suffix}")
    names = [path.relative_to(directory).with_suffix("").as_posix() for path in files]
    return sorted(names, key=lambda name: (name.count("/"), name))


def _shipped_name(path_or_name: str) -> str:
    """The name that a path in a checkout, such as ``recipes/quickstart.yaml``, would have."""
    name = path_or_name.removesuffix(".yaml").removesuffix(".yml")
    return name.removeprefix("./").removeprefix("recipes/")


def _unknown(where: str, name: str, what: str, kind: str, names: list[str]) -> UserError:
    # The last part alone, too: `470m` is near `paper/470m`.
    last = [other for other in names if other.rpartition("/")[2] == name.rpartition("/")[2]]
    hint = f"did you mean {last[0]}?" if last else nearest(name, names)
    return UserError(where, what, f"{kind} or one of {', '.join(names)}", hint)
