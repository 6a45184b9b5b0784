"""A sweep on disk: a directory a point, and what became of each.

``DIR/sweep.json`` lists the keys and the points; ``DIR/POINT/`` is an ordinary run, with the recipe
that it was asked for in ``point.yaml`` and, once it has ended by itself, its ``outcome.json``. A
point without an outcome is still to be run, or to be continued. Everything is written beside and
renamed, so that a sweep which is killed at any moment goes on where it was.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dualtrain.disk import sync
from dualtrain.errors import UserError
from dualtrain.recipe.yaml_source import shown
from dualtrain.sweep.definition import Point, Sweep

SWEEP = "sweep.json"
POINT = "point.yaml"
OUTCOME = "outcome.json"
LOG = Path("logs", "output.log")

State = Literal["finished", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a point ended.

    Attributes:
        state: finished, or failed.
        exit_code: Of its run.
        reason: The end of what a failed run printed.
    """

    state: State
    exit_code: int
    reason: str = ""


def prepare(sweep: Sweep) -> None:
    """Make the sweep's directory, or check that what is there belongs to it, and list its points.

    Points of an earlier form of the same sweep stay listed.

    Raises:
        UserError: The directory cannot be made, is not a sweep's, or its points were made with
            another recipe.
    """
    try:
        sweep.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot be made: {error.strerror}"
        raise UserError(str(sweep.directory), what, hint="choose another with --dir") from None
    path = sweep.directory / SWEEP
    before = read_listing(sweep.directory) if path.is_file() else {"keys": [], "points": []}
    if not path.is_file() and any(sweep.directory.iterdir()):
        raise UserError(
            str(sweep.directory),
            f"is not empty and has no {SWEEP}",
            "a new directory, or a sweep's",
            "choose another with --dir",
        )
    keys = list(dict.fromkeys([*before["keys"], *sweep.keys]))
    _check_same_recipe(sweep, before["points"], keys)
    points = list(dict.fromkeys([*before["points"], *(point.label for point in sweep.points)]))
    write_json(path, {"version": 1, "source": sweep.source, "keys": keys, "points": points})


def read_listing(directory: Path) -> dict[str, Any]:
    """Read ``sweep.json``.

    Raises:
        UserError: It cannot be read.
    """
    path = directory / SWEEP
    try:
        listing = json.loads(path.read_text())
        return {"keys": list(listing["keys"]), "points": list(listing["points"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(str(path), f"cannot be read: {error}", "a sweep's list of points") from None


def read_outcome(directory: Path) -> Outcome | None:
    """How the point in a directory ended; None where it has not, or where that is unreadable."""
    try:
        return Outcome(**json.loads((directory / OUTCOME).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_outcome(directory: Path, outcome: Outcome) -> None:
    """Record how a point ended."""
    write_json(directory / OUTCOME, asdict(outcome))


def write_recipe(point: Point) -> Path:
    """Write a point's recipe, which its run is started with; returns the file."""
    (point.directory / LOG).parent.mkdir(parents=True, exist_ok=True)
    path = point.directory / POINT
    write_text(path, point.loaded.text)
    return path


def is_busy(directory: Path) -> bool:
    """Whether another process is running the point."""
    try:
        with (directory / ".lock").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def write_json(path: Path, value: object) -> None:
    """Write JSON beside a file and give it its name."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text beside a file and give it its name.

    Raises:
        UserError: It cannot be written.
    """
    # Several jobs of an array may write the same file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(str(path), f"cannot be written: {error.strerror}") from None


def leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    """Every value of a recipe with its dotted key; a list counts as one value."""
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from leaves(child, (*path, str(key)))
    else:
        yield ".".join(path), value


def is_under(key: str, keys: list[str]) -> bool:
    """Whether a dotted key is one of some, lies inside one, or holds one."""
    return any(f"{key}.".startswith(f"{k}.") or f"{k}.".startswith(f"{key}.") for k in keys)


def _check_same_recipe(sweep: Sweep, labels: list[str], keys: list[str]) -> None:
    """Compare with the recipes of points that are there: where it is the same point, in all."""
    asked = {point.label: point for point in sweep.points}
    for label in labels:
        path = sweep.directory / label / POINT
        if not path.is_file():
            continue
        point = asked.get(label, sweep.points[0])
        free = ["name", "run_dir", *([] if label in asked else keys)]
        now = dict(leaves(yaml.safe_load(point.loaded.text)))
        then = dict(leaves(yaml.safe_load(path.read_text(encoding="utf-8"))))
        changed = [
            f"{key} {shown(then.get(key))} then, {shown(now.get(key))} now"
            for key in {**then, **now}
            if then.get(key) != now.get(key) and not is_under(key, free)
        ]
        if changed:
            raise UserError(
                str(sweep.directory),
                f"holds points of another recipe: {'; '.join(changed[:6])}",
                "the recipe that the sweep was begun with",
                "undo the change, or choose another directory with --dir",
            )
