"""Tests of: dualtrain.progress.trackers.

A tracker that fails or hangs, the run's id over resumes, and the real packages where they are.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pytest

from dualtrain.common.errors import UserError
from dualtrain.progress.metrics import EvalRecord, MetricsFile, read_metrics
from dualtrain.progress.plain import PlainView
from dualtrain.progress.progress import Progress
from dualtrain.progress.report import RunFacts, Sample, Summary
from dualtrain.progress.trackers import registry, writer
from dualtrain.progress.trackers.tracker import TrackedRun, Tracker
from dualtrain.progress.trackers.writer import TrackerView, run_id, send_figures
from dualtrain.recipe.load import dump_recipe, load_recipe
from dualtrain.recipe.schema import Recipe
from dualtrain.recipe.yaml_source import load

SAMPLE = Sample("AR sample", (("once", False), (" upon", True)))


def facts(run_dir: Path, first_step: int = 0) -> RunFacts:
    return RunFacts("run", str(run_dir), "CPU", 1, 10, 100, 8, 80, 10.0, 5.0, first_step=first_step)


def evaluation(step: int) -> EvalRecord:
    return EvalRecord(
        kind="eval",
        step=step,
        ar_nll=float(step),
        ar_bits_per_byte=1.5,
        diffusion_nll=2.0,
        diffusion_bits_per_byte=3.0,
        tokens=10,
        elapsed_s=1.0,
    )


class Broken(Tracker):
    """Takes its first point, and none after."""

    def start(self, run: TrackedRun) -> None:
        self.points = 0

    def log(self, values, step: int) -> None:
        self.points += 1
        if self.points > 1:
            raise ConnectionError("unreachable")

    def log_text(self, name: str, text: str, step: int) -> None: ...

    def log_figure(self, name: str, file: Path) -> None: ...

    def finish(self) -> None: ...


class Hanging(Broken):
    def log(self, values, step: int) -> None:
        time.sleep(60)


def run_with(tracker: Tracker, tmp_path: Path) -> None:
    view = TrackerView("broken", tracker, {})
    with Progress(MetricsFile(tmp_path / "m"), None, [view]) as progress:
        messages: list[str] = []
        progress.message = messages.append
        progress.start(facts(tmp_path))
        for step in range(1, 6):
            progress.record(evaluation(step))
            time.sleep(0.05)
        progress.finish(Summary(step=5, tokens=1, elapsed_s=1.0))
    assert [record["step"] for record in read_metrics(tmp_path / "m")] == [1, 2, 3, 4, 5]
    tmp_path.joinpath("said").write_text("\n".join(messages))


def test_a_failing_tracker_is_said_once(tmp_path: Path):
    run_with(Broken(), tmp_path)
    said = (tmp_path / "said").read_text()
    assert said == "warning: broken gets no more records: unreachable"


def test_a_hanging_tracker_ends_no_run(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(writer, "LONGEST_END_S", 0.2)
    start = time.monotonic()
    run_with(Hanging(), tmp_path)
    assert time.monotonic() - start < 10
    assert "broken lacks the last records: did not end within 0.2 s" in capsys.readouterr().err


def test_unknown_and_missing_trackers_are_refused_together(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        registry.check_trackers(["wanbd", "mlflow"])
    assert "no tracker 'wanbd'" in str(refused.value) and "did you mean wandb?" in str(
        refused.value
    )
    assert "pip install 'dualtrain[mlflow]'" in str(refused.value)


class Remembering(Broken):
    def start(self, run: TrackedRun) -> None:
        self.id = run.id


class Reader(Broken):
    def start(self, run: TrackedRun) -> None:
        self.texts: list[tuple[str, str, int]] = []

    def log_text(self, name: str, text: str, step: int) -> None:
        self.texts.append((name, text, step))


@pytest.mark.parametrize("end", [20, 30])
def test_samples_are_texts_and_the_last_comes_once(tmp_path: Path, end: int, capsys):
    reader = Reader()
    with Progress(None, PlainView(sys.stdout), [TrackerView("a", reader, {})]) as progress:
        progress.start(facts(tmp_path))
        progress.record(SAMPLE.record(20))
        progress.finish(Summary(step=end, tokens=1, elapsed_s=1, samples=[SAMPLE]))
    expected = [("samples/AR_sample", "once[ upon]", step) for step in sorted({20, end})]
    assert reader.texts == expected
    assert "AR sample at step 20: once[ upon]\n" in capsys.readouterr().out


def test_all_trackers_of_a_run_have_its_id_also_when_it_is_resumed(tmp_path: Path):
    found = []
    for first_step in (0, 20, 0):
        trackers = Remembering(), Remembering()
        with Progress(None, None, [TrackerView("a", tracker, {}) for tracker in trackers]) as run:
            run.start(facts(tmp_path, first_step))
        found.append({tracker.id for tracker in trackers})
    assert len(found[0]) == 1 and found[0] == found[1] != found[2]


def test_an_id_file_that_was_changed_is_made_anew(tmp_path: Path):
    tmp_path.joinpath(writer.RUN_ID).write_text("[]")
    assert run_id(tmp_path) == run_id(tmp_path)


def test_the_old_key_still_means_what_it_did():
    recipe = load_recipe("quickstart", ["progress.tensorboard=true"]).recipe
    assert recipe.progress.trackers == ["tensorboard"]
    old = load(dump_recipe(recipe))
    assert isinstance(old, dict)
    old["progress"] = {"interval_steps": 10, "tensorboard": False}
    assert Recipe.model_validate(old).progress.trackers == []


def track_twice(name: str, tmp_path: Path) -> str:
    """A run, and its resume from step 20; returns its id."""
    config = {"name": "run", "model": {"layers": 2}}
    for first_step in (0, 20):
        with Progress.open(tmp_path, view="none", trackers=[name], config=config) as progress:
            said: list[str] = []
            progress.message = said.append
            progress.start(facts(tmp_path, first_step=first_step))
            for step in (first_step + 10, first_step + 20):
                progress.record(evaluation(step))
            progress.finish(Summary(step=first_step + 20, tokens=1, elapsed_s=1, samples=[SAMPLE]))
        assert said == []
    return run_id(tmp_path)


def test_wandb_offline(tmp_path: Path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(writer, "LONGEST_END_S", 600)
    try:
        id_ = track_twice("wandb", tmp_path)
    finally:
        wandb.teardown()
    assert "lacks" not in capsys.readouterr().err
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{id_}/run-{id_}.wandb"))
    # Two processes within a second share a name.
    assert runs and b"ar_nll" in b"".join(file.read_bytes() for file in runs)


def test_wandb_without_login_is_said_once(tmp_path: Path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    view = TrackerView("wandb", registry.make_tracker("wandb"), {})
    try:
        view.start(facts(tmp_path), [])
        view.close()
    finally:
        wandb.teardown()  # or it would be online for the tests behind this one
    assert "not logged in" in (view.failure() or "")


def test_every_tracker_has_its_extra():
    project = Path(__file__).parents[2] / "pyproject.toml"
    extras = re.findall(r"^(\w+) = \[", project.read_text(), re.M)
    assert set(registry.REGISTRY) <= set(extras)


def figure(directory: Path) -> Path:
    from PIL import Image

    (directory / "fit").mkdir()
    Image.new("RGB", (3, 2)).save(directory / "dot.png")
    return directory / "dot.png"


def test_mlflow(tmp_path: Path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow")
    # Without a server; MLflow itself asks for the second.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(writer, "LONGEST_END_S", 600)  # its import alone takes a slow machine long
    id_ = track_twice("mlflow", tmp_path)
    assert "lacks" not in capsys.readouterr().err
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("dualtrain")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["dualtrain.run"] == id_ and run.info.status == "FINISHED"
    assert send_figures(["mlflow"], "fit", tmp_path / "fit", [figure(tmp_path)], {}) == []
    (other,) = client.search_runs([experiment.experiment_id], "run_name = 'fit'")
    assert [file.path for file in client.list_artifacts(other.info.run_id, "figures")] == [
        "figures/dot.png"
    ]
    points = client.get_metric_history(run.info.run_id, "eval/ar_nll")
    assert [(point.step, point.value) for point in points] == [(s, s) for s in (10, 20, 30, 40)]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == [
        "recipe.json",
        "samples",
    ]


def test_trackio(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(writer, "LONGEST_END_S", 600)
    trackio = pytest.importorskip("trackio")
    id_ = track_twice("trackio", tmp_path)
    assert "lacks" not in capsys.readouterr().err
    run = trackio.Api().runs("dualtrain")[0]
    assert run.name == f"run-{id_}"
    assert send_figures(["trackio"], "fit", tmp_path / "fit", [figure(tmp_path)], {}) == []
    assert list((tmp_path / "trackio").rglob("*.png"))
    assert os.listdir(tmp_path / "trackio")
