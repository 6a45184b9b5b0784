"""MLflow: to the server of ``MLFLOW_TRACKING_URI``, or to its own default on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from dualtrain.progress.trackers.tracker import PROJECT, TrackedRun, Tracker

_TAG = "dualtrain.run"


class MlflowTracker(Tracker):
    """Log to the experiment of ``MLFLOW_EXPERIMENT_NAME``."""

    def start(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name)
        # MLflow chooses its ids itself: ours is a tag.
        found = self._client.search_runs([where], f"tags.`{_TAG}` = '{run.id}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, "RUNNING")
            return
        made = self._client.create_run(where, run_name=run.name, tags={_TAG: run.id})
        self._id = made.info.run_id
        self._client.log_text(self._id, json.dumps(run.config, indent=2), "recipe.json")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        self._client.log_text(self._id, text, f"{name}/step-{step}.txt")

    def log_figure(self, name: str, file: Path) -> None:
        self._client.log_artifact(self._id, str(file), "figures")

    def finish(self) -> None:
        self._client.set_terminated(self._id)
