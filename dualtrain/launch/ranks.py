"""Ranks: which one this process is, and starting them.

Three ways to run, one entry point (``cli.run``):

* under an existing launcher (torchrun, deepspeed, srun) this process already is a rank:
  :func:`current_world` reads it from the environment;
* alone on one machine: :func:`run_ranks` starts N processes of the same command and watches them;
* on many machines: ``hostfile.run_hostfile`` hands over to DeepSpeed's runner.

Our own parent exists because the exit code of a rank matters to the caller (2, 3 and 75 mean
different things) and the stock launchers turn all of them into 1.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dualtrain.common.errors import UserError

GRACE_AFTER_FAILURE_S = 2.0
"""How long the other ranks may take to leave by themselves once one has failed.

Short, because a rank whose peer is gone can save nothing: it waits in a collective. Long enough for
ranks that failed for the same reason to say so.
"""

LOG_TAIL_LINES = 40

LOOPBACK_S = 5.0
"""Longest wait for a connection within this machine."""

_MAIN = """
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
sys.path.append({packages!r})
from dualtrain.cli import main
main()
"""
"""Leaves the current directory out, where a random.py is not what libraries mean: Python puts it in
front, and can be told not to only since 3.11."""

MOST_RANKS = 2**20
LONGEST_NUMBER = 20
_BY_LAUNCHER = (
    "launchers set it: torchrun, deepspeed, srun; unset RANK and WORLD_SIZE to do without"
)

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch and DeepSpeed read of the environment."""

SAME_SIGNAL_S = 1.0
"""Within this time of the first stop signal, another one is the same.

What stops a job often signals all of its processes, so that a rank is reached both directly and by
its launcher, which passes on what reached it.
"""


@dataclass(frozen=True)
class World:
    """This process among all ranks.

    Attributes:
        rank: 0 .. world_size - 1 over all machines.
        local_rank: Index on this machine; also the index of its GPU.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


ALONE = World(rank=0, local_rank=0, world_size=1, local_world_size=1)
"""The only rank."""


def current_world(environment: MutableMapping[str, str] | None = None) -> World | None:
    """Find out whether a launcher has made this process a rank.

    Completes the environment to what torch and DeepSpeed expect (``RANK``, ``WORLD_SIZE``,
    ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``).

    Returns:
        The world, or None when no launcher is at work.

    Raises:
        UserError: when a launcher set only a part of what is needed.
    """
    env = os.environ if environment is None else environment
    # A step of one task is no launcher: there, too, `--ranks` and the number of GPUs count.
    if "RANK" not in env and _is_srun_step(env) and _srun_tasks(env) > 1:
        _adopt_slurm(env)
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None
    # The deepspeed launcher says LOCAL_SIZE where everybody else says LOCAL_WORLD_SIZE.
    if "LOCAL_WORLD_SIZE" not in env and "LOCAL_SIZE" in env:
        env["LOCAL_WORLD_SIZE"] = env["LOCAL_SIZE"]
    missing = [name for name in RANK_NAMES if not env.get(name)]
    if missing:
        raise UserError(
            "environment",
            f"{', '.join(missing)} not set although {'RANK' if 'RANK' in env else 'WORLD_SIZE'} is",
            "all of " + ", ".join(RANK_NAMES),
            "start the ranks with torchrun, deepspeed or srun, or unset RANK and WORLD_SIZE",
        )
    world_size = _number(env, "WORLD_SIZE", 1, MOST_RANKS)
    local_size = _number(env, "LOCAL_WORLD_SIZE", 1, world_size)
    _number(env, "MASTER_PORT", 1, 65535)
    return World(
        rank=_number(env, "RANK", 0, world_size - 1),
        local_rank=_number(env, "LOCAL_RANK", 0, local_size - 1),
        world_size=world_size,
        local_world_size=local_size,
    )


def _number(env: Mapping[str, str], name: str, lowest: int, highest: int) -> int:
    """A number that a launcher has set.

    Raises:
        UserError: It is none, or one with which ranks would wait for each other for ever.
    """
    text = env.get(name, "")
    if text.isascii() and text.isdigit() and lowest <= int(text[:LONGEST_NUMBER]) <= highest:
        return int(text)
    expected = f"a number from {lowest} to {highest}"
    raise UserError(name, f"{text!r}" if text else "is not set", expected, _BY_LAUNCHER)


def single_world() -> World:
    """Make this process the only rank."""
    _set_rank_environment(os.environ, rank=0, ranks=1, port=free_port())
    return ALONE


def show_cursor() -> None:
    """Give a terminal its cursor back, which a live view that is killed has hidden."""
    if os.isatty(1):
        os.write(1, b"\x1b[?25h")


def free_port() -> int:
    """Return a TCP port that nobody listens on now.

    Raises:
        UserError: Processes of this machine cannot reach each other.
    """
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            # Where the interface is down, this alone fails, and ranks would try for minutes.
            socket.create_connection(listener.getsockname(), timeout=LOOPBACK_S).close()
        except OSError as error:
            raise _no_loopback(error) from None
        return listener.getsockname()[1]


def _no_loopback(error: OSError) -> UserError:
    what = f"127.0.0.1, through which the ranks of a machine meet, cannot be used: {error.strerror}"
    return UserError("network", what, "a loopback interface", "such as by `ip link set lo up`")


def default_ranks() -> int:
    """One rank for each GPU, or one on a machine without."""
    import torch

    return max(1, torch.cuda.device_count())


def spare_shared_cores() -> None:
    """Let OpenMP threads that wait for each other soon give up their core.

    By default they spin, which on a machine that does anything else made a training step 14 times
    slower; with this bound it keeps its speed alone and two fifths of it beside a busy process. To
    be called before torch is imported; what the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def own_command(arguments: Sequence[str]) -> list[str]:
    """The command of another process of dualtrain, which runs in the same directory."""
    packages = Path(__file__).resolve().parents[2]  # where this one is found without installation
    return [sys.executable, "-c", _MAIN.format(packages=str(packages)), *arguments]


def keep_current_directory_out() -> None:
    """Let no Python that this one starts find modules in the current directory (since 3.11)."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")


def run_ranks(command: Sequence[str], *, ranks: int, log_dir: Path) -> int:
    """Run a command as ``ranks`` processes on this machine and wait for all of them.

    Rank 0 keeps this terminal; the others write to ``log_dir/rank-00001.log`` and so on. A signal
    to this process goes to every rank once; a second one kills them. When a rank fails, the others
    are ended and, unless rank 0 has shown an error itself, the end of the failing rank's log is.

    Returns:
        The exit code of the rank that failed first; 0 when none did. A rank that died by signal n
        counts as 128 + n.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        _start_rank(command, rank=rank, ranks=ranks, port=port, log_dir=log_dir)
        for rank in range(ranks)
    ]
    return Watch(processes, log_dir).wait()


def launched_ranks(env: Mapping[str, str]) -> int:
    """How many processes a launcher, or srun, has started as ranks beside this one, and with it."""
    if "WORLD_SIZE" not in env and _is_srun_step(env):
        return _srun_tasks(env)
    return _number(env, "WORLD_SIZE", 1, MOST_RANKS) if "WORLD_SIZE" in env else 1


def _is_srun_step(env: Mapping[str, str]) -> bool:
    # A batch script itself also has SLURM_PROCID, but no step; only srun's tasks are ranks.
    return "SLURM_PROCID" in env and env.get("SLURM_STEP_ID", "batch").isdigit()


def _srun_tasks(env: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    return _number(env, name, 1, MOST_RANKS)


def _adopt_slurm(env: MutableMapping[str, str]) -> None:
    tasks = _srun_tasks(env)
    env["WORLD_SIZE"] = str(tasks)
    env["RANK"] = str(_number(env, "SLURM_PROCID", 0, tasks - 1))
    env["LOCAL_RANK"] = str(_number(env, "SLURM_LOCALID", 0, tasks - 1))
    on_nodes = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "1"
    node = _number({"SLURM_NODEID": "0", **env}, "SLURM_NODEID", 0, MOST_RANKS)
    env["LOCAL_WORLD_SIZE"] = str(_tasks_on_node(on_nodes, node))
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    env.setdefault("MASTER_ADDR", _first_host(nodes))
    # Every task of a step computes the same port; steps of one job get different ones.
    job = _number({"SLURM_JOB_ID": "0", **env}, "SLURM_JOB_ID", 0, 2**63)
    identity = job * 101 + int(env["SLURM_STEP_ID"])
    env.setdefault("MASTER_PORT", str(20_000 + identity % 20_000))


def _tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Read SLURM's run-length notation: ``2(x3),1`` is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError("SLURM_TASKS_PER_NODE", f"cannot read {tasks_per_node!r}", "2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        what = f"{tasks_per_node!r} says nothing of node {node} (SLURM_NODEID)"
        raise UserError("SLURM_TASKS_PER_NODE", what, "tasks on each node", _BY_LAUNCHER)
    return counts[node]


def _first_host(nodes: str) -> str:
    """First name of SLURM's compressed list: ``gpu[07-09,12],login`` gives ``gpu07``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise UserError("SLURM_JOB_NODELIST", f"cannot read {nodes!r}", "gpu[07-09,12],login")
    return match[1] + (match[2] or "") + (match[3] or "")


def _set_rank_environment(
    env: MutableMapping[str, str], *, rank: int, ranks: int, port: int
) -> None:
    env.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _start_rank(
    command: Sequence[str], *, rank: int, ranks: int, port: int, log_dir: Path
) -> subprocess.Popen:
    env = dict(os.environ)
    _set_rank_environment(env, rank=rank, ranks=ranks, port=port)
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    output = None if rank == 0 else log_path(log_dir, rank).open("wb")
    try:
        # A session of its own: the terminal's Ctrl-C reaches only the parent, which passes it on
        # exactly once.
        return subprocess.Popen(
            command,
            env=env,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    finally:
        if output is not None:
            output.close()


def log_path(log_dir: Path, rank: int) -> Path:
    """Where a rank other than 0 writes what it prints."""
    return log_dir / f"rank-{rank:05d}.log"


def die_with_parent() -> None:
    """Ask Linux to kill this rank when the parent is killed, so that no process stays behind."""
    pr_set_pdeathsig = 1
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class Watch:
    """Waits for the ranks, passes signals on, and cleans up after a failure.

    Args:
        processes: Each the leader of a process group of its own.
        log_dir: Where ranks other than 0 write; None when they write elsewhere.
        relayed_as: For a launcher in place of the ranks: the signal it is sent, whichever came.
    """

    def __init__(
        self,
        processes: list[subprocess.Popen],
        log_dir: Path | None,
        *,
        relayed_as: signal.Signals | None = None,
    ) -> None:
        self.processes = processes
        self.log_dir = log_dir
        self.relayed_as = relayed_as
        self.signals = 0
        self.signalled_at, self.last_signal = 0.0, 0
        self.first_failure: tuple[int, int] | None = None
        self.rank_0_has_spoken = False

    def wait(self) -> int:
        stops = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
        # What is ignored already stays so, here and in the ranks: nohup asks for it.
        watched = [number for number in stops if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._pass_on) for number in watched}
        try:
            while any(process.poll() is None for process in self.processes):
                self._note_failure()
                if self.first_failure is not None and self.signals == 0:
                    break
                time.sleep(0.05)
            self._note_failure()
            if self.first_failure is None:
                return 0
            self._end_others()
            return self._report()
        finally:
            self._kill_all()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.signals and now - self.signalled_at < SAME_SIGNAL_S:
            return
        self.signals += 1
        self.signalled_at, self.last_signal = now, number
        if self.relayed_as is not None and self.signals <= 2:
            # To the launcher alone: it has its own way to reach the ranks on other machines, which
            # needs its helpers alive, and would die of SIGUSR1 and leave the ranks behind.
            for process in self.processes:
                process.send_signal(self.relayed_as)
            return
        self._send(number if self.signals == 1 else signal.SIGKILL)
        if self.signals > 1:
            show_cursor()

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    continue

    def _note_failure(self) -> None:
        if self.first_failure is not None:
            return
        for rank, process in enumerate(self.processes):
            code = process.poll()
            if code:
                self.first_failure = (rank, code if code > 0 else 128 - code)
                return

    def _end_others(self) -> None:
        if self.signals == 0:
            self._wait_for_all(GRACE_AFTER_FAILURE_S)
        code = self.processes[0].poll()
        self.rank_0_has_spoken = code is not None and code > 0
        self._kill_all()

    def _wait_for_all(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(p.poll() is None for p in self.processes):
            time.sleep(0.05)

    def _kill_all(self) -> None:
        self._send(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def _report(self) -> int:
        assert self.first_failure is not None
        with suppress(OSError):  # nobody may be there to read it any more
            self._explain()
        # After a second signal the ranks were killed; it is the signal that ended the run.
        return 128 + self.last_signal if self.signals > 1 else self.first_failure[1]

    def _explain(self) -> None:
        assert self.first_failure is not None
        rank, code = self.first_failure
        if self.signals or self.rank_0_has_spoken:
            return
        if code > 128:
            who = f"rank {rank}" if self.relayed_as is None else "the launcher"
            sys.stderr.write(f"{who} was killed by signal {code - 128}\n")
        if rank > 0 and self.log_dir is not None:
            path = log_path(self.log_dir, rank)
            lines = path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            sys.stderr.write(f"rank {rank} failed (exit {code}); the end of {path}:\n")
            sys.stderr.writelines(f"  {line}\n" for line in lines)
