"""Tests of: dualtrain/README.md: the walks of a recipe and of a batch, as a real run goes them."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from helpers.ranks import on_ranks
from helpers.runs import TINY

ROOT = Path(__file__).resolve().parents[1]
DOOR = ROOT / "dualtrain" / "README.md"
NO_ROOMS = {"", "cli.py", "__main__.py", "common"}

Visits = dict[str, tuple[str, ...]]
"""For each module, in the order in which they are met: its room behind those of its callers."""


@pytest.fixture(scope="module")
def visits(tmp_path_factory) -> tuple[Visits, Visits]:
    folder = tmp_path_factory.mktemp("walk")
    (folder / "text.txt").write_text((ROOT / "LICENSE").read_text())
    source = f"source: {folder}/text.txt, separator: blank-line"
    build = f"{{{source}, vocab_size: 272, val_tokens: 500}}"
    recipe = TINY.format(data=f"{folder}/dataset, build: {build}")
    (folder / "tiny.yaml").write_text(recipe.replace("steps: 8", "steps: 1"))
    (found,) = on_ranks(watch, str(folder), ranks=1, tmp_path=folder)
    return found


def test_walk_of_a_recipe(visits):
    """The rooms whose functions are handed it, or a section of it, up to the first step."""
    rooms, again = walk(visits[0])
    assert rooms == listed("A recipe")
    assert len(rooms) <= 10
    assert again == {"data_tools"}  # asked whether it could make the dataset, then told to


def test_walk_of_a_batch(visits):
    """The rooms to which the loop gives it, from the shard to the loss."""
    rooms, again = walk(visits[1], NO_ROOMS | {"training"})
    assert rooms == listed("A batch")
    assert len(rooms) <= 4
    assert again == {"method"}  # asked which of the text is an objective's, then for the example


def listed(name: str) -> list[str]:
    """The rooms that the walk of this name lists, in its order."""
    block = re.search(rf"\*\*{name}\*\*.*?```text\n(.*?)```", DOOR.read_text(), re.DOTALL)
    assert block, name
    return re.findall(r"^(\w+)/", block[1], re.MULTILINE)


def walk(visits: Visits, passed_over: set[str] = NO_ROOMS) -> tuple[list[str], set[str]]:
    """The rooms in the order in which a reader meets them, and those that he comes back to.

    He comes back to a room if he has left it and meets something new in it. A room that has called
    the one he is in has not been left.
    """
    rooms: list[str] = []
    again: set[str] = set()
    here: tuple[str, ...] = ()
    for stack in visits.values():
        if stack[-1] in passed_over:
            continue
        if stack[-1] in rooms and stack[-1] not in here:
            again.add(stack[-1])
        here = stack
        rooms += [room for room in dict.fromkeys(here) if room not in {*rooms, *passed_over}]
    return rooms, again


def watch(folder: str) -> tuple[Visits, Visits]:
    """Run the command in this process; what of it the recipe and the first batches have visited."""
    from dualtrain import cli
    from dualtrain.launch.world import RANK_NAMES

    for name in RANK_NAMES:
        del os.environ[name]
    watcher = Watcher()
    threading.setprofile(watcher)
    sys.argv = ["dualtrain", "run", f"{folder}/tiny.yaml", "--plain", "--ranks", "1"]
    sys.argv += [f"run_dir={folder}/run"]
    sys.setprofile(watcher)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    return watcher.recipe, {**watcher.made, **(watcher.batch | watcher.made)}


class Watcher:
    """Called by Python for every call of a function, up to the end of the first step."""

    def __init__(self) -> None:
        from dualtrain.recipe.load import LoadedRecipe
        from dualtrain.recipe.schema import Section

        self.kinds = (LoadedRecipe, Section)
        self.recipe: Visits = {}
        self.made: Visits = {}
        self.batch: Visits = {}
        self.has_begun = self.is_in_slot = False
        self.maker: int | None = None
        self.rooms: dict[str, str] = {}

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event not in ("call", "return") or not self.room(frame):
            return
        name, is_call = frame.f_code.co_name, event == "call"
        if name == "_make":  # in the thread that makes batches ahead
            self.maker = threading.get_ident() if is_call else None
        elif name == "slot_loss":
            self.is_in_slot = is_call
        elif name == "train_step":
            self.has_begun = True
            if not is_call:
                sys.setprofile(None)
        if not is_call:
            return
        if threading.current_thread() is not threading.main_thread():
            if self.maker == threading.get_ident():
                self.note(self.made, frame)
        elif self.is_in_slot:
            self.note(self.batch, frame)
        elif not self.has_begun and self.is_handed_a_recipe(frame):
            self.note(self.recipe, frame)

    def is_handed_a_recipe(self, frame: FrameType) -> bool:
        """Whether a function takes a recipe, a section of one, or the file of one."""
        if self.room(frame) == "recipe":
            return True
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        return any(isinstance(frame.f_locals.get(name), self.kinds) for name in names)

    def note(self, visits: Visits, frame: FrameType) -> None:
        if frame.f_code.co_filename not in visits:
            stack = [self.room(caller) for caller in (frame, *outwards(frame))]
            visits[frame.f_code.co_filename] = tuple(reversed(stack))

    def room(self, frame: FrameType) -> str:
        """The room in which the code stands; empty for what is not ours."""
        file = frame.f_code.co_filename
        if file not in self.rooms:
            path = Path(file)
            parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else ()
            self.rooms[file] = ""
            if parts[:1] == ("dualtrain",):
                self.rooms[file] = parts[1]
            elif parts[:1] == ("data_tools",):
                self.rooms[file] = "data_tools"
        return self.rooms[file]


def outwards(frame: FrameType) -> Iterator[FrameType]:
    """The callers of a frame, the innermost first."""
    caller = frame.f_back
    while caller is not None:
        yield caller
        caller = caller.f_back
