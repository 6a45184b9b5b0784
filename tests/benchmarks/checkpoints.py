"""Seconds and bytes of a checkpoint, against torch.save of as many bytes.

    python tests/benchmarks/checkpoints.py [--pairs 5] [RECIPE] [key=value ...]

Trains a few steps of the recipe (quickstart unless named) on one rank, then saves a checkpoint and,
in turn, as many bytes of tensors with torch.save; both wait for the disk. Prints medians and their
ratio, the bytes by file, and how long a resume takes to verify and load.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from dualtrain.checkpoint import store as checkpoint
from dualtrain.checkpoint.files import find_defects
from dualtrain.launch.world import single_world
from dualtrain.recipe.load import load_recipe
from dualtrain.training import train
from dualtrain.training.assemble import assemble


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def plain_save(tensors: list[torch.Tensor], file: Path) -> None:
    torch.save(tensors, file)
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    single_world()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        fixed = [f"run_dir={folder}/run", "checkpoint.resume=auto"]
        recipe = load_recipe(given.recipe, [*given.overrides, *fixed]).recipe
        run = assemble(recipe, view="none")
        for _ in range(2):
            train.train_step(run)
        path = train.write_checkpoint(run)
        sizes = {str(f.relative_to(path)): f.stat().st_size for f in path.rglob("*") if f.is_file()}
        total = sum(sizes.values())
        tensors = [torch.randn(1 << 20) for _ in range(max(1, total >> 22))]
        ours, plain = [], []
        file = Path(folder) / "plain.pt"
        for _ in range(given.pairs):
            # Neither is to wait for what was written before, nor for its removal.
            shutil.rmtree(path)
            os.sync()
            ours.append(timed(lambda: train.write_checkpoint(run)))
            file.unlink(missing_ok=True)
            os.sync()
            plain.append(timed(lambda: plain_save(tensors, file)))
        verify = timed(lambda: find_defects(path, share=(0, 1)))
        states = checkpoint.load_rank_states(path, run.world)
        load = timed(lambda: checkpoint.load(path, run.engine, run.world, states))
        parameters = sum(p.numel() for p in run.state.model.parameters())
        run.close()
        shutil.rmtree(path)
    for name, size in sorted(sizes.items()):
        print(f"{size:>14,}  {name}")
    print(f"{total:>14,}  bytes in all, {total / parameters:.1f} for each of {parameters:,}")
    print(f"save {statistics.median(ours):.3f} s, torch.save {statistics.median(plain):.3f} s")
    ratios = [o / p for o, p in zip(ours, plain, strict=True)]
    print(f"ratio {statistics.median(ratios):.2f} (of {[round(ratio, 2) for ratio in ratios]})")
    print(f"verify {verify:.3f} s, load {load:.3f} s")
    # The engine goes with the process; there is one rank.
    os._exit(0)


if __name__ == "__main__":
    main()
