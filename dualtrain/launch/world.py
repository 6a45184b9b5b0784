"""This process among all ranks, as a launcher's environment says it.

Under torchrun, DeepSpeed's launcher or srun a process of ``dualtrain run`` is a rank already;
:func:`current_world` finds that out. Otherwise it is the only rank (:func:`single_world`), or
starts the ranks (``ranks``, ``hostfile``).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from dualtrain.common.errors import UserError

LOOPBACK_S = 5.0
"""Longest wait for a connection within this machine."""

MOST_RANKS = 2**20
LONGEST_NUMBER = 20
_BY_LAUNCHER = (
    "launchers set it: torchrun, deepspeed, srun; unset RANK and WORLD_SIZE to do without"
)

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch and DeepSpeed read of the environment."""


@dataclass(frozen=True)
class World:
    """This process among all ranks.

    Attributes:
        local_rank: Index on this machine; also the index of its GPU.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


ALONE = World(rank=0, local_rank=0, world_size=1, local_world_size=1)
"""The only rank."""


def current_world(env: MutableMapping[str, str] = os.environ) -> World | None:
    """Find out whether a launcher has made this process a rank; None when none is at work.

    Completes the environment to :data:`RANK_NAMES`.

    Raises:
        UserError: A launcher set only a part of what is needed.
    """
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


def launched_ranks(env: Mapping[str, str]) -> int:
    """How many processes a launcher, or srun, has started as ranks beside this one, and with it."""
    if "WORLD_SIZE" not in env and _is_srun_step(env):
        return _srun_tasks(env)
    return _number(env, "WORLD_SIZE", 1, MOST_RANKS) if "WORLD_SIZE" in env else 1


def single_world() -> World:
    """Make this process the only rank."""
    os.environ.update(rank_environment(0, ranks=1, port=free_port()))
    return ALONE


def rank_environment(rank: int, *, ranks: int, port: int) -> dict[str, str]:
    """What :data:`RANK_NAMES` are for a rank of this machine alone."""
    values = (rank, ranks, rank, ranks, "127.0.0.1", port)
    return {name: str(value) for name, value in zip(RANK_NAMES, values, strict=True)}


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
            raise UserError(
                "network",
                "127.0.0.1, through which the ranks of a machine meet, cannot be used: "
                f"{error.strerror}",
                "a loopback interface",
                "such as by `ip link set lo up`",
            ) from None
        return listener.getsockname()[1]


def default_ranks() -> int:
    """One rank for each GPU, or one on a machine without."""
    import torch

    return max(1, torch.cuda.device_count())


def prepare_environment() -> None:
    """Set what torch and the Pythons started from here read; to be called before torch is imported.

    OpenMP threads that wait for each other give up their core soon. By default they spin, which on
    a machine that does anything else made a training step 14 times slower; with this bound it keeps
    its speed alone and two fifths of it beside a busy process. What the user has set stays.

    No Python that this one starts finds modules in the current directory (since 3.11).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("PYTHONSAFEPATH", "1")


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
