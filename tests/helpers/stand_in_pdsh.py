"""A stand-in for ssh and pdsh, which reach the hosts of two_hosts.py instead of other machines.

``two_hosts.install_stand_ins`` puts it on PATH under both names. It knows what DeepSpeed's runner
says to them: ``ssh HOST COMMAND``, ``pdsh -S -f N -w HOSTS COMMAND`` with ``%n`` for the number of
the host, and ``pdsh … pkill -f PATTERN``, which here reaches only what it started itself. As with
the real ones, a command gets a fresh environment, and goes on when the connection is cut.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil

HOSTS = Path(__file__).parent / "hosts.json"
LAUNCHER = "deepspeed.launcher.launch"


def ssh(arguments: list[str]) -> int:
    """Run a command on a host and return its exit code."""
    while arguments[0].startswith("-"):
        del arguments[:2]
    host, *words = arguments
    facts = json.loads(HOSTS.read_text())[host]
    if words == ["hostname", "-I"]:
        print(facts["address"])
        return 0
    return start(facts, " ".join(words)).wait()


def pdsh(arguments: list[str]) -> int:
    """Run a command on several hosts at once; the highest exit code is the result."""
    names = arguments[arguments.index("-w") + 1].split(",")
    words = arguments[arguments.index("-w") + 2 :]
    facts = json.loads(HOSTS.read_text())
    if words[0].startswith("pkill"):
        for name in names:
            terminate(facts[name])
        return 0
    threads, codes = [], []
    for number, name in enumerate(names):
        process = start(facts[name], " ".join(words).replace("%n", str(number)), piped=True)
        with Path(facts[name]["started"]).open("a") as file:
            file.write(f"{process.pid}\n")
        thread = threading.Thread(target=relay, args=(name, process, codes), daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    return max(codes)


def start(facts: dict, command: str, *, piped: bool = False) -> subprocess.Popen:
    """Start a shell command as sshd would: in a session and an environment of its own."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.Popen(
        [*facts["enter"], "sh", "-c", command],
        env=environment | facts["environment"],
        stdout=subprocess.PIPE if piped else None,
        stderr=subprocess.STDOUT if piped else None,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )


def relay(name: str, process: subprocess.Popen, codes: list[int]) -> None:
    """Print what a host prints, and keep its exit code."""
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{name}: {line}", end="", flush=True)
    code = process.wait()
    codes.append(code if code >= 0 else 128 - code)


def terminate(facts: dict) -> None:
    """End the launchers that were started on a host, as pkill would."""
    for line in Path(facts["started"]).read_text().splitlines():
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(int(line)).children(recursive=True):
                if process.cmdline()[2:4] == ["-m", LAUNCHER]:
                    process.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    tool = {"ssh": ssh, "pdsh": pdsh}[Path(sys.argv[0]).name]
    sys.exit(tool(sys.argv[1:]))
