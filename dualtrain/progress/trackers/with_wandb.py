"""Weights & Biases: online as ``wandb login`` says, or offline with ``WANDB_MODE=offline``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from dualtrain.progress.trackers.tracker import PROJECT, TrackedRun, Tracker

_LONGEST_S = 45.0


class WandbTracker(Tracker):
    """Log to the project of ``WANDB_PROJECT``; key and address are wandb's own business."""

    def start(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # the terminal shows the run
        import wandb

        is_online = os.environ.get("WANDB_MODE", "online") == "online"
        if is_online and not wandb.login(prompt=False):
            raise RuntimeError("not logged in: `wandb login`, or WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.name,
            dir=str(run.directory),
            config=dict(run.config),
            resume="allow",
            settings=wandb.Settings(
                console="off",
                # The process ends no sooner than wandb does, whoever waits for this thread.
                init_timeout=_LONGEST_S,
                finish_timeout=_LONGEST_S,
                finish_timeout_raises=True,
            ),
        )
        # Its own counter never goes back, as a run that was killed does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def log_text(self, name: str, text: str, step: int) -> None:
        import wandb

        table = wandb.Table(columns=["step", "text"], data=[[step, text]])
        self._run.log({name: table, "step": step})

    def log_figure(self, name: str, file: Path) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(file))})

    def finish(self) -> None:
        self._run.finish()
