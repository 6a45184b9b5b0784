"""Conversions to be watched, interrupted and compared."""

from __future__ import annotations

import json
from pathlib import Path

from data_tools.reporting import Report, StageProgress


class StopAt(Report):
    """Interrupts when a stage is reached, as Ctrl-C does."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def show(self, progress: StageProgress) -> None:
        if progress.stage == self.stage:
            raise KeyboardInterrupt


class Said(Report):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stages: list[str] = []

    def show(self, progress: StageProgress) -> None:
        self.stages.append(progress.stage)

    def say(self, text: str) -> None:
        self.lines.append(text)


def write_jsonl(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def files_of(path: Path) -> dict[str, bytes]:
    """Every file of a dataset by its name."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
