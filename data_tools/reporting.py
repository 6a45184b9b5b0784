"""What long work tells whoever watches it: the interface; ``view`` shows it in a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class StageProgress:
    """How far a stage of the work is."""

    stage: str
    done: int
    total: int
    """In the same unit as `done`; 0 if it is not known."""
    unit: Literal["bytes", "documents", "shards"]
    documents: int = 0
    """Documents taken so far, where the stage reads text."""
    tokens: int = 0
    text_bytes: int = 0


class Report:
    """Takes progress and notices, and does nothing with them: a base for those who show them."""

    def show(self, progress: StageProgress) -> None:
        """Called now and then during a stage."""

    def wait(self) -> None:
        """Called when another process has the place."""
        self.show(StageProgress("waiting for another conversion", 0, 0, "documents"))

    def say(self, text: str) -> None:
        """Called with what the user should know though nothing is wrong."""
