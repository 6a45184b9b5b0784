"""Several machines named in a file, on which DeepSpeed's runner starts the ranks.

Called by ``start`` for ``dualtrain run --hostfile``. The runner logs in to the machines by ssh,
through pdsh; all of them must see the run directory.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dualtrain.common.errors import EXIT_FAILED, UserError, raise_together
from dualtrain.common.files import write_text
from dualtrain.launch.ranks import RankWatch

RUNNER_GRACE_S = 35.0
"""How long ranks on other machines may take to save after a signal.

DeepSpeed's launcher there kills them after 30 s.
"""


@dataclass(frozen=True)
class Machine:
    """A line of a hostfile.

    Attributes:
        slots: Processes to start there; on a machine with GPUs, one for each.
        line: Where it stands in the file, from 1.
    """

    name: str
    slots: int
    line: int


def read_hostfile(hostfile: Path, *, ranks: int | None = None) -> list[Machine]:
    """Read a hostfile: ``HOST slots=N`` on each line; ``#`` begins a comment.

    Args:
        ranks: Processes a machine, instead of all its slots.
    """
    where = "--hostfile"
    example = "a text file with a line `HOST slots=N` for each machine"
    try:
        lines = hostfile.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        if not hostfile.is_file():
            raise UserError(where, f"{hostfile} is not a file", example) from None
        raise UserError(where, f"cannot read {hostfile}: {error}", example) from None
    machines: dict[str, Machine] = {}
    errors: list[UserError] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        here = f"{hostfile}:{number}"
        match = re.fullmatch(r"([\w.-]+(?:@[\w.-]+)?)\s+slots=([1-9]\d*)", text)
        if match is None:
            errors.append(UserError(here, f"cannot read {text!r}", "HOST slots=N, N at least 1"))
            continue
        machine = Machine(match[1], int(match[2]), number)
        if machine.name in machines:
            first = machines[machine.name].line
            what = f"{machine.name} is in line {first} already"
            errors.append(UserError(here, what, "a line for each machine", "add up its slots"))
        elif ranks is not None and ranks > machine.slots:
            what = f"{machine.name} has {machine.slots} slots, but --ranks is {ranks}"
            errors.append(UserError(here, what, "processes on each machine, at most its slots"))
        machines.setdefault(machine.name, machine)
    if not machines and not errors:
        errors.append(UserError(where, f"{hostfile} names no machine", example))
    raise_together(errors)
    return list(machines.values())


def run_hostfile(
    arguments: Sequence[str], *, hostfile: Path, ranks: int | None, outcome: Path
) -> int:
    """Run ``dualtrain ARGUMENTS`` on the machines of a hostfile through DeepSpeed's runner.

    The runner returns 0 when its child is ended by a signal, and 1 when it is signalled itself,
    while the ranks may still be saving; so rank 0 leaves its exit code in a file, too.

    Args:
        outcome: File in the directory that all machines see, where rank 0 calls
            :func:`record_outcome`.
    """
    machines = read_hostfile(hostfile, ranks=ranks)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    # Not one number for all runs: two of them may share the first machine.
    command += ["--master_port", str(20_000 + os.getpid() % 20_000)]
    if ranks is not None:
        command += ["--num_gpus", str(ranks)]
    if len(machines) == 1 and machines[0].name in ("localhost", "127.0.0.1"):
        command += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    else:
        for program in ("ssh", "pdsh"):
            if shutil.which(program) is None:
                raise UserError(
                    "--hostfile",
                    f"{program} is not installed on this machine",
                    "ssh and pdsh, through which DeepSpeed starts the ranks",
                    "install it, or start torchrun on every machine (README, Several machines)",
                )
        # The runner would start the ranks of a single machine here, whatever its name.
        command.append("--force_multi")
    command += ["--no_local_rank", "--module", "dualtrain", *arguments]
    outcome.unlink(missing_ok=True)
    process = subprocess.Popen(command, start_new_session=True)
    watch = RankWatch([process], log_dir=None, relayed_as=signal.SIGTERM)
    code = watch.wait()
    if watch.signals.count:
        deadline = time.monotonic() + RUNNER_GRACE_S
        while not outcome.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    if outcome.exists():
        return int(outcome.read_text()) or code
    if code == 0:
        sys.stderr.write(
            "error: the launcher reports success, but rank 0 did not come to its end; "
            "start the same command again to continue from the newest checkpoint\n"
        )
    return code or EXIT_FAILED


def record_outcome(outcome: Path, code: int) -> None:
    """Leave the exit code of rank 0 where :func:`run_hostfile` looks for it."""
    outcome.parent.mkdir(exist_ok=True)
    write_text(outcome, f"{code}\n")
