"""Two machines on one: train together, lose a host, end in bounded time, continue.

``PYTHONPATH=tests python tests/experiments/two_hosts.py`` runs the whole demonstration and prints
what happens, in about two minutes; ``test_hosts.py`` has its parts as tests. Where the kernel
permits it (``unshare``), each host is a network namespace of its own with its own host name, joined
to the other by a virtual cable that can be cut; elsewhere the hosts are the addresses 127.0.0.1 and
127.0.0.2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from helpers.ranks import environment
from helpers.runs import tiny_loader

TESTS = Path(__file__).parents[1]
CABLE = "cable"
LOCALHOST = ("localhost", "127.0.0.1")
SETTINGS = (
    "checkpoint.interval_steps=5",
    "eval.sequences=4",
    "sample={tokens: 0, infill: ''}",
    "algorithms=[{use: helpers.algorithms:Slow, args: {seconds: 0.1}}]",
)


@dataclass
class Host:
    """A machine, as far as processes can tell.

    Attributes:
        name: Its host name, where it has one of its own.
        address: Where the other reaches it.
        enter: Command prefix that runs a command there.
        environment: What processes there need to find the cable.
        started: Processes started there.
        log: File with a line for the number of every process that the stand-in of ssh started.
    """

    name: str
    address: str
    enter: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen] = field(default_factory=list)
    log: Path | None = None

    def start(self, command: list[str], output: Path, **variables: str) -> subprocess.Popen:
        """Start a command on this host; what it prints goes to a file."""
        with output.open("w") as file:
            process = subprocess.Popen(
                [*self.enter, *command],
                env={**environment(), **self.environment, **variables},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def send(self, number: int) -> None:
        """Send a signal to every process of this host, launchers first, at (almost) one moment."""
        numbers = [process.pid for process in self.started]
        if self.log is not None and self.log.exists():
            numbers += [int(line) for line in self.log.read_text().splitlines()]
        trees = []
        for number_of_root in numbers:
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(number_of_root)
                trees += [root, *root.children(recursive=True)]
        for process in trees:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def end(self) -> None:
        """Leave nothing running."""
        self.send(signal.SIGKILL)
        for process in self.started:
            process.wait()


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Make two hosts with files in ``folder``, and end all their processes afterwards."""
    holders: list[subprocess.Popen] = []
    hosts = (Host("host-a", "127.0.0.1"), Host("host-b", "127.0.0.2"))
    try:
        if namespaces_permitted():
            hosts = _namespaces(holders, folder)
        yield hosts
    finally:
        for host in hosts:
            host.end()
        for holder in holders:
            holder.kill()
            holder.wait()


def namespaces_permitted() -> bool:
    """Whether this process may make network namespaces and join them."""
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip")):
        return False
    probe = ["unshare", "-n", "-u", "-m", "ip", "link", "add", "probe", "type", "veth"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def _namespaces(holders: list[subprocess.Popen], folder: Path) -> tuple[Host, Host]:
    hosts = []
    addresses = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
    names = folder / "hosts"
    names.write_text("".join(f"{a} {n}\n" for n, a in [LOCALHOST, *addresses.items()]))
    for name, address in addresses.items():
        holder = subprocess.Popen(["unshare", "-n", "-u", "-m", "sleep", "infinity"])
        holders.append(holder)
        enter = ("nsenter", "-t", str(holder.pid), "-n", "-u", "-m", f"--wd={os.getcwd()}")
        _wait_for_namespace(holder.pid)
        hosts.append(Host(name, address, enter, {"GLOO_SOCKET_IFNAME": CABLE}))
        subprocess.run([*enter, "hostname", name], check=True)
        subprocess.run([*enter, "ip", "link", "set", "lo", "up"], check=True)
        subprocess.run([*enter, "mount", "--bind", str(names), "/etc/hosts"], check=True)
    first, second = hosts
    peer = ["peer", "name", CABLE, "netns", str(holders[1].pid)]
    subprocess.run([*first.enter, "ip", "link", "add", CABLE, "type", "veth", *peer], check=True)
    for host in hosts:
        address = ["ip", "addr", "add", f"{host.address}/24", "dev", CABLE]
        subprocess.run([*host.enter, *address], check=True)
        subprocess.run([*host.enter, "ip", "link", "set", CABLE, "up"], check=True)
    return first, second


def _wait_for_namespace(pid: int) -> None:
    here = os.readlink("/proc/self/ns/net")
    deadline = time.monotonic() + 10
    while os.readlink(f"/proc/{pid}/ns/net") == here:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def cut_cable(host: Host) -> None:
    """Cut the connection as a dead switch does: nothing is closed, nothing arrives any more."""
    subprocess.run([*host.enter, "ip", "link", "set", CABLE, "down"], check=True)


def write_recipe(folder: Path, data: Path, *, steps: int = 40, timeout_s: float = 600) -> Path:
    """Write the recipe of a small, slow run in ``folder``/run."""
    file = folder / "recipe.yaml"
    length = (f"steps={steps}", f"engine.timeout_s={timeout_s}")
    file.write_text(tiny_loader(data, folder)(*SETTINGS, *length, name="run").text)
    return file


def torchrun(recipe: Path, host: Host, *, meeting: str) -> list[str]:
    """The command that a user types on each of two machines."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}"),
        *("--rdzv-id=two-hosts", f"--local-addr={host.address}"),
        *("-m", "dualtrain", "run", str(recipe), "--plain"),
    ]


def install_stand_ins(folder: Path, hosts: tuple[Host, ...]) -> Path:
    """Make a directory for PATH in which ssh and pdsh lead to ``hosts``."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    facts = {}
    for host in hosts:
        host.log = folder / f"started-{host.name}"
        host.log.unlink(missing_ok=True)
        facts[host.name] = {
            "address": host.address,
            "enter": host.enter,
            "environment": host.environment,
            "started": str(host.log),
        }
    (tools / "hosts.json").write_text(json.dumps(facts))
    for name in ("ssh", "pdsh"):
        text = (TESTS / "helpers" / "stand_in_pdsh.py").read_text()
        (tools / name).write_text(f"#!{sys.executable}\n{text}")
        (tools / name).chmod(0o755)
    return tools


def start_hostfile(recipe: Path, hosts: tuple[Host, ...], output: Path) -> subprocess.Popen:
    """Start ``dualtrain run --hostfile`` on the first host, for all of them."""
    folder = recipe.parent
    tools = install_stand_ins(folder, hosts)
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    command = [sys.executable, "-m", "dualtrain", "run", str(recipe), "--plain"]
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return hosts[0].start([*command, "--hostfile", str(hostfile)], output, PATH=path)


def steps_done(run_dir: Path) -> int:
    """The last step in the run's records."""
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return max((r["step"] for r in whole if r["kind"] == "train"), default=0)


def newest_checkpoint(run_dir: Path) -> int:
    """The step of the newest whole checkpoint; 0 without one."""
    return max((int(p.parent.name[5:]) for p in run_dir.glob("step-*/complete.json")), default=0)


def wait_for_step(run_dir: Path, step: int, *processes: subprocess.Popen) -> None:
    """Wait until the run has done ``step`` steps."""
    while steps_done(run_dir) < step or newest_checkpoint(run_dir) < step // 5 * 5:
        assert all(process.poll() is None for process in processes), "a launcher has ended"
        time.sleep(0.05)


class Demonstration:
    """The script's run: each part starts both hosts, and prints what happened to them."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.recipe = write_recipe(folder, data, timeout_s=10)
        self.run_dir = folder / "run"
        self.port = 29_600

    def start(self, hosts: tuple[Host, Host]) -> list[subprocess.Popen]:
        """Start the same command on both hosts."""
        self.port += 1
        meeting = f"{hosts[0].address}:{self.port}"
        commands = [torchrun(self.recipe, host, meeting=meeting) for host in hosts]
        print("  $", " ".join(commands[1][1:]), flush=True)
        return [
            host.start(command, self.folder / f"{host.name}.txt")
            for host, command in zip(hosts, commands, strict=True)
        ]

    def lose(self, how: str, *, survivor: int) -> None:
        """Train together, lose a host, and wait for the end of the run on the other."""
        print(f"\n{how}", flush=True)
        with two_hosts(self.folder) as hosts:
            processes = self.start(hosts)
            wait_for_step(self.run_dir, newest_checkpoint(self.run_dir) + 7, *processes)
            lost = hosts[1 - survivor]
            print(f"  step {steps_done(self.run_dir)}: {lost.name} goes", flush=True)
            began = time.monotonic()
            if "cable" in how:
                cut_cable(lost)
            else:
                lost.send(signal.SIGSTOP if "stops" in how else signal.SIGKILL)
            code = processes[survivor].wait(120)
            waited = time.monotonic() - began
            self.show(hosts[survivor], ("error: lost", "  the run", "  to go on", "  cause"))
            print(f"  {hosts[survivor].name} has ended after {waited:.1f} s, exit code {code}")

    def finish(self) -> None:
        """Start the same commands again, and train to the end."""
        print("\nthe same command again", flush=True)
        with two_hosts(self.folder) as hosts:
            codes = [process.wait(180) for process in self.start(hosts)]
            self.show(hosts[0], ("two-hosts:", "continues", "done:"))
            print(f"  exit codes {codes}; checkpoint at step {newest_checkpoint(self.run_dir)}")

    def show(self, host: Host, beginnings: tuple[str, ...]) -> None:
        """Print the lines of a host's output that tell the story."""
        for line in (self.folder / f"{host.name}.txt").read_text().splitlines():
            if any(beginning in line for beginning in beginnings):
                print(f"  {host.name} | {line}", flush=True)


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="keep the directory of the run")
    keep = parser.parse_args().keep
    if os.geteuid() != 0 and subprocess.run(["unshare", "-r", "true"]).returncode == 0:
        os.execvp("unshare", ["unshare", "-r", sys.executable, *sys.argv])
    folder = Path(tempfile.mkdtemp(prefix="two-hosts-"))
    try:
        from conftest import build_tiny_dataset

        demonstration = Demonstration(folder, build_tiny_dataset(folder))
        own = namespaces_permitted()
        print("two hosts:", "network namespaces" if own else "127.0.0.1 and 127.0.0.2")
        demonstration.lose("all processes of the second host are killed", survivor=0)
        demonstration.lose("all processes of the first host are killed", survivor=1)
        demonstration.lose("the second host stops, without a word", survivor=0)
        if own:
            demonstration.lose("the cable of the second host is cut", survivor=0)
        demonstration.finish()
    finally:
        if not keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
