"""Tests of: dualtrain.launch.hostfile, peers.

Two hosts on one machine: training together, losing one, stopping, continuing.

See ``two_hosts.py`` for what a host is here; ssh and pdsh are stand-ins that reach these hosts.
"""

from __future__ import annotations

import re
import signal
import time

import pytest
from experiments import two_hosts
from experiments.two_hosts import (
    newest_checkpoint,
    start_hostfile,
    steps_done,
    torchrun,
    wait_for_step,
)

from dualtrain.launch.world import free_port


@pytest.fixture
def hosts(tmp_path):
    with two_hosts.two_hosts(tmp_path) as pair:
        yield pair


def start_torchrun(recipe, hosts, folder):
    meeting = f"{hosts[0].address}:{free_port()}"
    return [
        host.start(torchrun(recipe, host, meeting=meeting), folder / f"{host.name}.txt")
        for host in hosts
    ]


@pytest.mark.slow
def test_lost_host_ends_the_other_which_says_so_and_the_run_continues(
    hosts, tiny_dataset, tmp_path
):
    recipe = two_hosts.write_recipe(tmp_path, tiny_dataset, steps=15)
    processes = start_torchrun(recipe, hosts, tmp_path)
    wait_for_step(tmp_path / "run", 6, *processes)
    hosts[1].send(signal.SIGKILL)
    began = time.monotonic()
    assert processes[0].wait() == 1
    # 3 s for the roll call; torchrun itself looks after its ranks every 0.1 s. Not timeout_s: 600.
    assert time.monotonic() - began < 200
    output = (tmp_path / "host-a.txt").read_text()
    assert output.count("error: lost contact with rank 1 on ") == 1
    step = newest_checkpoint(tmp_path / "run")
    assert f"start all ranks with the same command: it continues after step {step}" in output
    processes = start_torchrun(recipe, hosts, tmp_path)
    assert [process.wait() for process in processes] == [0, 0]
    assert f"continues after step {step}" in (tmp_path / "host-a.txt").read_text()
    assert newest_checkpoint(tmp_path / "run") == 15


@pytest.mark.slow
def test_hostfile_saves_after_a_signal_continues_and_survives_a_host_that_hangs(
    hosts, tiny_dataset, tmp_path
):
    recipe = two_hosts.write_recipe(tmp_path, tiny_dataset, steps=500, timeout_s=5)
    process = start_hostfile(recipe, hosts, tmp_path / "first.txt")
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 75
    step = steps_done(tmp_path / "run")
    assert 2 <= step < 500 and newest_checkpoint(tmp_path / "run") == step
    process = start_hostfile(recipe, hosts, tmp_path / "second.txt")
    wait_for_step(tmp_path / "run", step + 2, process)
    assert f"continues after step {step}" in (tmp_path / "second.txt").read_text()
    hosts[1].send(signal.SIGSTOP)
    pattern = r"host-a: error: lost contact with rank 1 on .*; waited 5 s for it"
    # pdsh itself goes on waiting for the host that hangs.
    while not re.search(pattern, (tmp_path / "second.txt").read_text()):
        assert process.poll() is None
        time.sleep(0.1)
