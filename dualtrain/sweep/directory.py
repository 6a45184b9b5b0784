"""A sweep on disk: a directory a point, and what became of each.

``DIR/sweep.json`` lists the keys and the points; ``DIR/POINT/`` is an ordinary run, with the recipe
that it was asked for in ``point.yaml`` and, once it has ended by itself, its ``outcome.json``. A
point without an outcome is still to be run, or to be continued. Everything is written beside and
renamed, so that a sweep which is killed at any moment goes on where it was.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError

from dualtrain.common.errors import UserError
from dualtrain.common.files import write_json, write_text
from dualtrain.common.locks import acquire, is_held, locked
from dualtrain.data.plan import DATA_ORDER
from dualtrain.recipe.differences import recipe_differences
from dualtrain.recipe.yaml_source import load, shown
from dualtrain.sweep.definition import Point, Sweep
from dualtrain.training.prepare import PROBE, RUN_LOCK, why_unwritable

SWEEP = "sweep.json"
POINT = "point.yaml"
OUTCOME = "outcome.json"
LOG = Path("logs", "output.log")
_LOCK = ".sweep.lock"
"""In a sweep's directory: held while its list is written. In a point's: by the sweep it runs in."""

State = Literal["finished", "failed"]
PlainName = Annotated[str, StringConstraints(pattern=r"^[^/\x00]*[^/\x00.][^/\x00]*$")]
"""Of a directory inside the sweep's: not a path, and not ``..``."""


def _each_once(values: list[str]) -> list[str]:
    if len(set(values)) < len(values):
        raise ValueError("an entry is there twice")
    return values


@dataclass(frozen=True)
class Outcome:
    """How a point ended.

    Attributes:
        reason: The end of what a failed run printed.
    """

    state: State
    exit_code: int
    reason: str = ""


class Listing(BaseModel):
    """What ``sweep.json`` holds."""

    model_config = ConfigDict(strict=True, extra="forbid")

    version: Literal[1] = 1
    data_order: int = 1
    source: str = ""
    keys: Annotated[list[str], AfterValidator(_each_once)] = []
    points: Annotated[list[PlainName], AfterValidator(_each_once)] = []


def check(sweep: Sweep) -> Listing:
    """Check that the sweep's directory, if it is there, belongs to it; changes nothing.

    Returns:
        What it lists so far.

    Raises:
        UserError: The directory is not a sweep's, or its points were made with another recipe.
    """
    directory = sweep.directory
    if why := why_unwritable(directory):
        hint = "choose another with --dir"
        raise UserError(str(directory), f"cannot be written to: {why}", "a directory", hint)
    if (directory / SWEEP).is_file():
        before = read_listing(directory)
    else:
        points = [p.label for p in sweep.points if (p.directory / POINT).is_file()]
        before = Listing(points=points, data_order=DATA_ORDER)
        # Of a list that another job of an array is writing, or was killed while it did.
        names = [path.name for path in (directory.iterdir() if directory.exists() else ())]
        if not before.points and any(not name.startswith((SWEEP, _LOCK, PROBE)) for name in names):
            raise UserError(
                str(directory),
                f"is not empty and has no {SWEEP}",
                "a new directory, or a sweep's",
                "choose another with --dir",
            )
    if before.points and before.data_order != DATA_ORDER:
        raise UserError(
            str(directory),
            "has points that an earlier version trained, which read the text in another order and "
            "scored it otherwise: new ones would not compare",
            "a new directory",
            "choose another with --dir",
        )
    _check_same_recipe(sweep, before.points, _all_keys(before, sweep))
    return before


def prepare(sweep: Sweep) -> None:
    """Make the sweep's directory, or check that what is there belongs to it, and list its points.

    Points of an earlier form of the same sweep stay listed.

    Raises:
        UserError: As :func:`check`, or the directory cannot be made.
    """
    before = check(sweep)
    path = sweep.directory / SWEEP
    try:
        sweep.directory.mkdir(parents=True, exist_ok=True)
        # Jobs of an array begin at once, perhaps with different forms of the sweep.
        with locked(sweep.directory / _LOCK):
            before = read_listing(sweep.directory) if path.is_file() else before
            points = list(dict.fromkeys([*before.points, *(p.label for p in sweep.points)]))
            now = Listing(
                data_order=DATA_ORDER,
                source=sweep.source,
                keys=_all_keys(before, sweep),
                points=points,
            )
            write_json(path, now.model_dump())
    except OSError as error:
        what = f"cannot be made: {error.strerror}"
        raise UserError(str(sweep.directory), what, hint="choose another with --dir") from None


def is_sweep(directory: Path) -> bool:
    """Whether a directory holds points: a sweep's, or models named by alpha and repetitions."""
    return (directory / SWEEP).is_file() or any(directory.glob("alpha_*_n-reps=*/config.json"))


def read_listing(directory: Path) -> Listing:
    """Read ``sweep.json``.

    Raises:
        UserError: It cannot be read, or is damaged.
    """
    path = directory / SWEEP
    try:
        return Listing.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            str(path),
            f"is damaged: {f'{place}: ' * bool(place)}{first['msg']}",
            "a sweep's list of points",
            "remove the file: `dualtrain sweep` with the same recipe writes it again",
        ) from None


def read_outcome(directory: Path) -> Outcome | None:
    """How the point in a directory ended; None where it has not, or where that is unreadable."""
    try:
        outcome = Outcome(**json.loads((directory / OUTCOME).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return outcome if outcome.state in get_args(State) else None


def write_outcome(directory: Path, outcome: Outcome) -> None:
    """Record how a point ended."""
    write_json(directory / OUTCOME, asdict(outcome))


def write_recipe(point: Point) -> Path:
    """Write a point's recipe, which its run is started with; returns the file."""
    (point.directory / LOG).parent.mkdir(parents=True, exist_ok=True)
    path = point.directory / POINT
    write_text(path, point.loaded.text)
    return path


def claim(directory: Path) -> IO[bytes] | None:
    """Take a point for this process, until what is returned is closed; None if another has it.

    Raises:
        UserError: The directory cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = acquire(directory / _LOCK, wait=False)
    except BlockingIOError:
        return None
    except OSError as error:
        raise UserError(str(directory), f"cannot be written to: {error.strerror}") from None
    # Its run may outlive a sweep that was killed, or be somebody's `dualtrain run`.
    if is_held(directory / RUN_LOCK):
        lock.close()
        return None
    return lock


def is_busy(directory: Path) -> bool:
    """Whether a process is running the point; leaves nothing behind."""
    return is_held(directory / _LOCK) or is_held(directory / RUN_LOCK)


def _check_same_recipe(sweep: Sweep, labels: list[str], keys: list[str]) -> None:
    """Compare with the recipes of points that are there: where it is the same point, in all."""
    asked = {point.label: point for point in sweep.points}
    for label in labels:
        path = sweep.directory / label / POINT
        if not path.is_file():
            continue
        point = asked.get(label, sweep.points[0])
        free = ["name", "run_dir", *([] if label in asked else keys)]
        now = point.loaded.recipe.model_dump(mode="json")
        changed = recipe_differences(_read_recipe(path), now, free)
        if changed:
            each = (f"{key} {shown(old)} then, {shown(new)} now" for key, old, new in changed[:6])
            raise UserError(
                str(sweep.directory),
                f"holds points of another recipe: {'; '.join(each)}",
                "the recipe that the sweep was begun with",
                "undo the change, or choose another directory with --dir",
            )


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        recipe = None
    if not isinstance(recipe, dict):
        hint = "remove the file: it is written again"
        raise UserError(str(path), "is damaged", "the recipe of a point", hint)
    return recipe


def _all_keys(before: Listing, sweep: Sweep) -> list[str]:
    return list(dict.fromkeys([*before.keys, *sweep.keys]))
