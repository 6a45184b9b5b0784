"""What bf16 costs a CPU that emulates it, and what compiling gains on one.

    python tests/benchmarks/cpu_precision.py [STEPS]

Trains the quickstart, 40 steps by default, in a process for each way, twice over. oneDNN is told to
leave bf16 instructions alone (ONEDNN_MAX_CPU_ISA), as on a CPU that has none.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
WITHOUT = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}
WAYS = {
    "emulated, Newton-Schulz in bf16": (True, [], WITHOUT),
    "emulated, Newton-Schulz in fp32": (False, [], WITHOUT),
    "emulated, engine.precision=bf16": (False, ["engine.precision=bf16"], WITHOUT),
    "this CPU": (True, [], {}),
    "this CPU, model.compile=true": (True, ["model.compile=true"], {}),
}
RUN = """
import sys
import dualtrain.engine.build as build
from dualtrain.recipe.load import load_recipe
from dualtrain.training.start import start
build.has_bfloat16 = lambda: sys.argv[1] == "True"
loaded = load_recipe("quickstart", sys.argv[2:])
sys.exit(start(loaded, ranks=None, hostfile=None, plain=True))
"""


def tokens_per_second(way: str, steps: int, folder: Path) -> float:
    """Median over the records of a run but the first, in which things are compiled."""
    has_bfloat16, changes, environment = WAYS[way]
    run = folder / "run"
    fixed = ["eval.interval_steps=0", "checkpoint.interval_steps=0", "sample.tokens=0"]
    tokens = ["unique_tokens=40960", f"steps={steps}", "repetitions=null"]
    given = [*fixed, *tokens, f"run_dir={run}", f"data.path={folder}/data"]
    command = [sys.executable, "-c", RUN, str(has_bfloat16), *given, *changes]
    subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL
    )
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    run.rename(folder / f"run-{len(list(folder.iterdir()))}")
    return median(record["tokens_per_second"] for record in records[1:])


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            for way in WAYS:
                print(
                    f"{way:34} {tokens_per_second(way, steps, Path(folder)):8,.0f} tokens/s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
