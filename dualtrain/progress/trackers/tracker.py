"""What a tracker has to do; each has a module of its own beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROJECT = "dualtrain"
"""Of runs whose tracker is told no other project by its own environment variable."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of the run.

    Attributes:
        id: The same each time the run is resumed.
        first_step: What it has of later steps was written by a process that was killed.
        config: The resolved recipe, as plain data.
    """

    id: str
    name: str
    directory: Path
    first_step: int
    config: Mapping[str, object]


class Tracker(ABC):
    """Is called from one thread of its own: it may wait, and whatever it raises ends it alone."""

    @abstractmethod
    def start(self, run: TrackedRun) -> None:
        """Begin a run, or go on with it. The package is imported here, not before."""

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each of some curves."""

    @abstractmethod
    def log_text(self, name: str, text: str, step: int) -> None:
        """Keep a text."""

    @abstractmethod
    def log_figure(self, name: str, file: Path) -> None:
        """Keep a figure, a PNG file, that belongs to no step."""

    @abstractmethod
    def finish(self) -> None:
        """Send what is not sent yet, and end."""
