"""Functions of test files, run as real ranks."""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from dualtrain.launch.world import free_port

TESTS = Path(__file__).parents[1]
CALL = "import sys; from helpers.ranks import call; call(*sys.argv[1:])"


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
    command = [sys.executable, "-c", CALL, str(inspect.getsourcefile(function))]
    command += [function.__module__, function.__name__, str(given)]
    processes, results = [], []
    for rank in range(ranks):
        result = tmp_path / f"result-{rank}.pickle"
        result.unlink(missing_ok=True)
        results.append(result)
        env = environment() | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes.append(
            subprocess.Popen(
                [*command, str(result)],
                env=env,
                stdout=(tmp_path / f"output-{rank}").open("w"),
                stderr=subprocess.STDOUT,
            )
        )
    # A rank that failed leaves the others waiting for it, so its failure ends them.
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        time.sleep(0.02)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    outputs = [(tmp_path / f"output-{rank}").read_text()[-3000:] for rank in range(ranks)]
    assert codes == [0] * ranks, f"exit codes {codes}\n" + "\n".join(outputs)
    return [pickle.loads(result.read_bytes()) for result in results]


def environment() -> dict[str, str]:
    """That of a new process, which finds the helpers."""
    # Nothing behind a separator would mean the current directory.
    path = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def call(file: str, module: str, function: str, arguments: str, result: str) -> None:
    """Be a rank: call a function with pickled arguments, and pickle what it returns."""
    found = getattr(load_file(Path(file), module), function)
    value = found(*pickle.loads(Path(arguments).read_bytes()))
    Path(result).write_bytes(pickle.dumps(value))


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
