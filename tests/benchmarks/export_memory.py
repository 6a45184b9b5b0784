"""Peak memory of exporting a checkpoint, against the size of its weights in fp32.

    python tests/benchmarks/export_memory.py [RECIPE] [key=value ...]

Trains one step of the recipe (quickstart unless named) on one rank, for a real checkpoint. Then
exports it in a process of its own for each precision and size of the files of weights, and prints
what the process held at most beyond what it held after its imports, over the bytes of
``weights.safetensors``, and the seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

# In the new process: imports, then the measured export.
EXPORT = """
import sys, time
from pathlib import Path
from dualtrain.export.command import ExportOptions
from dualtrain.export.export import export_checkpoint
import safetensors.torch
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
before, began = peak(), time.perf_counter()
source, to, precision, size = sys.argv[1:]
source, to = Path(source), Path(to)
export_checkpoint(ExportOptions(path=source, to=to, dtype=precision, max_shard_size=size))
print(peak() - before, time.perf_counter() - began)
"""


def main() -> None:
    recipe, *overrides = sys.argv[1:] or ["quickstart"]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        fixed = [f"run_dir={folder}/run", "repetitions=null", "unique_tokens=all", "steps=1"]
        fixed += ["eval.sequences=1", "sample.tokens=0", "sample.infill=''"]
        train = [sys.executable, "-m", "dualtrain", "run", recipe, *overrides, *fixed, "--plain"]
        subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
        weights = Path(folder, "run", "step-00000001", "weights.safetensors").stat().st_size
        print(f"weights in fp32: {weights / 1e6:,.0f} MB")
        for size in ("5GB", "500MB"):
            for precision in ("fp32", "bf16"):
                to = f"{folder}/{precision}-{size}"
                command = [sys.executable, "-c", EXPORT, f"{folder}/run", to, precision, size]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                peak, seconds = map(float, done.stdout.split())
                print(f"{precision}, files of up to {size}: {peak / weights:.2f}, {seconds:.1f} s")


if __name__ == "__main__":
    main()
