"""Tests of: dualtrain.launch.stop, vote, hostfile.

Signals to real runs: under our launcher, torchrun and DeepSpeed's, to the launcher or one rank.

Every stop continues the run of the one before, so that each also proves the checkpoint before it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from experiments.two_hosts import newest_checkpoint, steps_done, write_recipe
from helpers.ranks import environment

from dualtrain.launch.world import free_port

LAYOUT = "eyJsb2NhbGhvc3QiOiBbMCwgMV19"  # {"localhost": [0, 1]}, as DeepSpeed's runner encodes it


def launcher(name: str) -> list[str]:
    """The command before ``run RECIPE``."""
    if name == "own":
        return ["-m", "dualtrain"]
    if name == "torchrun":
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        return [*run, "-m", "dualtrain"]
    launch = ["-m", "deepspeed.launcher.launch", f"--world_info={LAYOUT}"]
    return [*launch, f"--master_port={free_port()}", "--module", "dualtrain"]


class Run:
    """One launch of the run in ``folder``, which has done two steps of its own."""

    def __init__(self, recipe: Path, name: str) -> None:
        self.directory = recipe.parent / "run"
        self.first_step = newest_checkpoint(self.directory)
        self.output = recipe.parent / "output.txt"
        self.outcome = self.directory / "logs" / "exit-code"
        self.outcome.unlink(missing_ok=True)
        options = ["--ranks", "2"] if name == "own" else []
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *launcher(name), "run", str(recipe), "--plain", *options],
                env=environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.wait_for_two_steps()
        except BaseException:
            self.end()
            raise
        self.tree = psutil.Process(self.process.pid).children(recursive=True)

    def wait_for_two_steps(self) -> None:
        """Wait for the output, as the records of a killed run may be ahead of its checkpoint."""
        while self.output.read_text().count("\nstep ") < 2:
            assert self.process.poll() is None
            time.sleep(0.05)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        return next(p for p in self.tree if p.environ().get("RANK") == str(number))

    def assert_saved(self) -> None:
        """The ranks agreed on a step, saved it, and rank 0 left with 75."""
        psutil.wait_procs(self.tree, timeout=30)
        assert self.outcome.read_text() == "75\n"
        done = steps_done(self.directory)
        assert done >= self.first_step + 2
        assert newest_checkpoint(self.directory) == done
        if self.first_step:
            assert f"continues after step {self.first_step}" in self.output.read_text()

    def end(self) -> None:
        """Leave nothing running."""
        for process in [*getattr(self, "tree", []), self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@pytest.fixture
def start(tiny_dataset, tmp_path):
    """A function that launches the same run again and again."""
    recipe = write_recipe(tmp_path, tiny_dataset, steps=1000)
    runs: list[Run] = []

    def launch(name: str) -> Run:
        runs.append(Run(recipe, name))
        return runs[-1]

    yield launch
    for run in runs:
        run.end()


def test_our_launcher_passes_on_what_a_terminal_sends_and_ranks_agree_on_one_signal(start):
    run = start("own")
    os.killpg(run.process.pid, signal.SIGINT)  # as Ctrl-C does
    assert run.process.wait() == 75
    run.assert_saved()
    run = start("own")
    run.rank(1).send_signal(signal.SIGUSR1)  # rank 0 knows nothing of it
    assert run.process.wait() == 75
    run.assert_saved()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_other_launchers_pass_on_sigterm_and_hide_the_exit_code(start, name):
    run = start(name)
    # As systemd and SLURM do, which signal every process of a job: each rank hears it twice.
    run.rank(0).send_signal(signal.SIGTERM)
    run.rank(1).send_signal(signal.SIGTERM)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait() == 1
    run.assert_saved()


def test_second_signal_stops_at_once_and_saves_nothing(start):
    run = start("own")
    # OpenMP's bears the number of the process.
    shared = {
        entry.path
        for process in run.tree
        for entry in process.memory_maps()
        if entry.path.startswith("/dev/shm/") and "__KMP" not in entry.path
    }
    run.rank(0).suspend()  # so that the first signal has no effect yet
    run.process.send_signal(signal.SIGTERM)
    time.sleep(1.2)  # sooner, it would count as the same
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait() == 128 + signal.SIGTERM
    assert not run.outcome.exists()
    assert newest_checkpoint(run.directory) % 5 == 0  # those of the interval alone
    assert not [path for path in shared if Path(path).exists()]  # nor anything in the next's way


def test_run_outlives_whoever_reads_its_output(tiny_dataset, tmp_path):
    recipe = write_recipe(tmp_path, tiny_dataset, steps=3)
    command = f"{sys.executable} -m dualtrain run {recipe} --plain"
    lines = {"piped": f"{command} | head -c 1; exit ${{PIPESTATUS[0]}}", "closed": f"{command} >&-"}
    for name, line in lines.items():
        finished = subprocess.run(
            ["bash", "-c", line],
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert (finished.returncode, finished.stderr) == (0, "")
        assert newest_checkpoint(tmp_path / "run") == 3
        (tmp_path / "run").rename(tmp_path / name)
