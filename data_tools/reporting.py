"""What long work tells whoever watches it: the interface; ``view`` shows it in a terminal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


def shown(path: str | Path) -> str:
    """A path as text that any file and terminal takes: bytes that are not UTF-8 as ``\\xef``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Progress:
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

    def show(self, progress: Progress) -> None:
        """Called now and then during a stage."""

    def say(self, text: str) -> None:
        """Called with what the user should know though nothing is wrong."""
