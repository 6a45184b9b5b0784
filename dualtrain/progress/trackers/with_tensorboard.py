"""TensorBoard: events in ``tensorboard/`` of the run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dualtrain.progress.trackers.tracker import TrackedRun, Tracker


class TensorBoardTracker(Tracker):
    """Write what ``tensorboard --logdir`` reads."""

    def start(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed process wrote beyond the checkpoint is hidden, as metrics.jsonl drops it.
        self._writer = SummaryWriter(
            str(run.directory / "tensorboard"), purge_step=run.first_step + 1
        )
        config = json.dumps(run.config, indent=2)
        self._writer.add_text("recipe", f"```\n{config}\n```", run.first_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def log_figure(self, name: str, file: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels, dataformats="HWC")

    def finish(self) -> None:
        self._writer.close()
