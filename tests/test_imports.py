"""Tests of: dualtrain.cli and what each command imports, which is most of its time to start."""

import subprocess
import sys

from helpers.ranks import environment
from helpers.runs import command

HEAVY = ("torch", "deepspeed", "transformers", "torch._dynamo", "torch._inductor.compile_fx")
HEAVY += ("streaming", "datasets", "pyarrow", "pandas", "lm_eval", "huggingface_hub")
LIST = f"""
import sys
from dualtrain.cli import main
try:
    main()
finally:
    print("imported:", *[name for name in {HEAVY} if name in sys.modules])
"""


def imported(*arguments: str) -> set[str]:
    """The heavy modules in a process that ran a command on a machine without a GPU."""
    # What tests set, and users do not.
    users = {k: v for k, v in environment().items() if k != "TORCHDYNAMO_DISABLE"}
    finished = subprocess.run(
        [sys.executable, "-c", LIST, *arguments],
        env=users,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return set(finished.stdout.splitlines()[-1].split()[1:])


def test_commands_import_no_more_than_they_need(tiny, tiny_dataset):
    loaded = tiny("steps=1", "eval.sequences=1", "sample.tokens=0", "sample.infill=''")
    run, directory = command(loaded)[2:], str(loaded.recipe.directory)
    assert imported("--help") == set()
    assert imported("data", "inspect", str(tiny_dataset)) == set()
    assert imported(*run, "--dry-run") == set()
    # torch's optimizers import its front end; the compiler itself is not needed.
    assert imported(*run, "--ranks", "1") <= {"torch", "deepspeed", "torch._dynamo"}
    assert imported("generate", directory, "The", "--tokens", "1") == {"torch"}
    assert imported("eval", directory) == {"torch"}
