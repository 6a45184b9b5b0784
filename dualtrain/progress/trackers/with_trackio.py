"""Trackio: on this machine, or in the Space that ``TRACKIO_SPACE_ID`` names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from dualtrain.progress.trackers.tracker import PROJECT, TrackedRun, Tracker


class TrackioTracker(Tracker):
    """Log to the project of ``TRACKIO_PROJECT``."""

    def start(self, run: TrackedRun) -> None:
        import trackio

        # Trackio knows runs by their names.
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.name}-{run.id}",
            config=dict(run.config),
            resume="allow",
            embed=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: text}, step=step)

    def log_figure(self, name: str, file: Path) -> None:
        import trackio

        self._run.log({name: trackio.Image(str(file))})

    def finish(self) -> None:
        self._run.finish()
