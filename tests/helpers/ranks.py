"""Functions of test files, run as real ranks.

Every call has new processes. They are forks of servers, one for each rank, which have imported
torch, DeepSpeed and the training before: that takes 5 seconds, and the suite has 100 such calls.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from helpers import processes

from dualtrain.launch.world import free_port

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Call:
    """What one rank is to do.

    Attributes:
        file: That of the function.
        module: Its name in pytest, by which pickles know it.
        function: Its name.
        arguments: Pickled; in a file.
        result: The file for what it returns.
        output: The file for what it prints.
        environment: All of the rank's.
        directory: The current one.
    """

    file: str
    module: str
    function: str
    arguments: Path
    result: Path
    output: Path
    environment: dict[str, str]
    directory: str


def on_ranks(
    function: Callable[..., object],
    *arguments: object,
    ranks: int,
    tmp_path: Path,
) -> list:
    """Call a function in ``ranks`` new processes that share a process group's address.

    Args:
        function: Of a test file or of a helper; its file is loaded there.

    Returns:
        What it returned, by rank. A rank that fails fails the test with its output.
    """
    given = tmp_path / "arguments.pickle"
    given.write_bytes(pickle.dumps(arguments))
    port = free_port()
    calls = []
    for rank in range(ranks):
        env = environment() | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        calls.append(
            Call(
                file=str(inspect.getsourcefile(function)),
                module=function.__module__,
                function=function.__name__,
                arguments=given,
                result=tmp_path / f"result-{rank}.pickle",
                output=tmp_path / f"output-{rank}",
                environment=env,
                directory=os.getcwd(),
            )
        )
        calls[-1].result.unlink(missing_ok=True)
    codes = run_calls(calls)
    outputs = [call.output.read_text()[-3000:] for call in calls]
    assert codes == [0] * ranks, f"exit codes {codes}\n" + "\n".join(outputs)
    return [pickle.loads(call.result.read_bytes()) for call in calls]


def run_calls(calls: list[Call]) -> list[int | None]:
    """Exit codes of ranks; None of those that were ended because another one had failed."""
    servers = [server_of(rank) for rank in range(len(calls))]
    try:
        for server, call in zip(servers, calls, strict=True):
            server.start(call)
        codes = [server.poll() for server in servers]
        # A rank that failed leaves the others waiting for it, so its failure ends them.
        while None in codes and not any(codes):
            time.sleep(0.02)
            codes = [server.poll() for server in servers]
        return codes
    finally:
        for server in servers:
            server.end_call()


def environment() -> dict[str, str]:
    """That of a new process, which finds the helpers."""
    # Nothing behind a separator would mean the current directory.
    path = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


class RankServer:
    """A process that forks for every call of a rank.

    Ranks have one each, as they may differ in what a process has of its own: the order of sets.
    """

    def __init__(self) -> None:
        # CUDA may not be touched before a fork.
        env = environment() | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        starter = subprocess.Popen(
            [sys.executable, "-c", "from helpers.ranks import serve; serve()"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert starter.stdin is not None and starter.stdout is not None
        self._requests, self._replies = starter.stdin, starter.stdout
        processes.kept.add(pickle.load(self._replies))
        starter.wait()
        self._rank: int | None = None
        self._code: int | None = None

    def start(self, call: Call) -> None:
        pickle.dump(call, self._requests)
        self._requests.flush()
        self._rank, self._code = pickle.load(self._replies), None
        processes.note_start()

    def poll(self) -> int | None:
        """The exit code of the call, if it has ended."""
        if self._rank is not None and select.select([self._replies], [], [], 0)[0]:
            self._rank, self._code = None, pickle.load(self._replies)
        return self._code

    def end_call(self) -> None:
        """Wait for the call, which is killed."""
        if self._rank is not None:
            with suppress(ProcessLookupError):
                os.kill(self._rank, signal.SIGKILL)
            self._rank, self._code = None, pickle.load(self._replies)


@cache
def server_of(rank: int) -> RankServer:
    """The server of a rank; it ends with this process, whose pipe it reads."""
    del rank
    return RankServer()


def serve() -> None:
    """Be a server: import what ranks need, then fork for every call; forks return from here."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Not a child of pytest, which would look for what every test has left behind.
    if os.fork():
        return
    os.setsid()
    _reply(replies, os.getpid())
    _import_all()
    while call := _next_call(requests):
        rank = os.fork()
        if rank == 0:
            requests.close()
            replies.close()
            be_rank(call)
            return
        _reply(replies, rank)
        _reply(replies, os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]))


def _reply(replies: BinaryIO, value: int) -> None:
    pickle.dump(value, replies)
    replies.flush()


def _next_call(requests: BinaryIO) -> Call | None:
    try:
        return pickle.load(requests)
    except EOFError:
        return None


def _import_all() -> None:
    """Import what takes long, in the order in which runs do."""
    from dualtrain.engine.process import prepare_process

    prepare_process(compile_model=False)
    import deepspeed  # noqa: F401
    import pytest  # noqa: F401

    import dualtrain.training.train  # noqa: F401


def be_rank(call: Call) -> None:
    """Call a function with pickled arguments, and pickle what it returns."""
    import numpy

    with open(os.devnull) as nothing, call.output.open("w") as output:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(call.environment)
    os.chdir(call.directory)
    # Whoever draws from it where nothing may be drawn is to be found out, as in a new process.
    numpy.random.seed()
    function = getattr(load_file(Path(call.file), call.module), call.function)
    value = function(*pickle.loads(call.arguments.read_bytes()))
    call.result.write_bytes(pickle.dumps(value))


def load_file(file: Path, name: str) -> ModuleType:
    """Load a module from its file under the name it has in pytest, by which pickles know it."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    parts = name.split(".")
    # Whoever unpickles imports the packages of that name, too; pytest has them without files.
    for length in range(1, len(parts)):
        package = ".".join(parts[:length])
        sys.modules.setdefault(package, ModuleType(package))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
