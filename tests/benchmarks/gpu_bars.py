"""What one GPU reaches: the parts of a slot alone, whole runs, and the bars they are to pass.

    python tests/benchmarks/gpu_bars.py [--minutes 8] [--only NAME ...] [--tiny] [KEY=VALUE ...]

Each change for GPUs is timed alone, in turns with the way without it, and in a run of the paper's
470M model; then that model by objective and mixed, and the 34M model of ``replication/gpu``. Text
is Python's documentation unless ``data.path`` names a dataset; the number of logits is the recipe's
in any case. Runs are processes of their own, and the first half of each, in which things are
compiled, does not count. No run is begun that would likely end after the minutes. ``--tiny`` does
it all on a CPU, at sizes that tell nothing. Results: RESULTS.md in this directory.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from dualtrain.network import attention, loss, transformer
from dualtrain.network.config import DualConfig

ROOT = Path(__file__).parents[2]
BF16 = torch.bfloat16
# 470M on an H100 (measured before: 89,400 to 95,000), and the 34M model there alone.
FIRST_470M, BAR_470M, BAR_MFU, BAR_MIX, BEFORE_34M = 95_000, 150_000, 0.42, 0.98, 200_000
LONG = ["micro_batch=8", "global_batch=64", "model.vocab_size=51200"]  # 8 slots a step
SMALL = ["model.vocab_size=8192"]
RUNS = {
    # name: recipe, changes, what is switched off
    "alpha 1": ("paper/470m", [*LONG, "alpha=1"], ""),
    "alpha 0": ("paper/470m", [*LONG, "alpha=0"], ""),
    "alpha 1/4": ("paper/470m", [*LONG, "alpha=1/4"], ""),
    "34M": ("replication/gpu", [*SMALL, "alpha=1/2"], ""),
    "34M compiled": ("replication/gpu", [*SMALL, "alpha=1/2", "model.compile=true"], ""),
    "alpha 1, loss by chunks": ("paper/470m", [*LONG, "alpha=1"], "loss"),
    "alpha 1, MLP not packed": ("paper/470m", [*LONG, "alpha=1"], "mlp"),
    "alpha 1, without cuDNN": ("paper/470m", [*LONG, "alpha=1"], "cudnn"),
}
FIXED = ["repetitions=null", "unique_tokens=all", "eval.interval_steps=0", "sample.tokens=0"]
FIXED += ["checkpoint.interval_steps=0", "sample.infill=''", "progress.interval_steps=2"]
BUILD = ["data.build.source=builtin:python-docs", "data.build.vocab_size=2048"]
BUILD += ["data.build.val_tokens=20000"]
TINY = ["model.layers=1", "model.width=32", "model.heads=2", "model.mlp_width=44"]
TINY += ["sequence_length=64", "global_batch=8", "micro_batch=1", "engine.precision=fp32"]
TINY += ["model.vocab_size=2048", "model.compile=false"]


@dataclass(frozen=True)
class Size:
    """Of the parts: those of paper/470m with 8 sequences in a slot, or tiny ones."""

    device: torch.device
    rows: int = 8
    length: int = 2048
    width: int = 1024
    heads: int = 16
    mlp: int = 3554
    vocab: int = 51_200


def without(change: str) -> None:
    """Make this process do as if a change had not been made."""
    if change == "loss":
        loss.compiles_for = lambda device: False
    elif change == "mlp":
        transformer.SwiGLU.packs = lambda *_: False
    elif change == "cudnn":
        torch.backends.cuda.enable_cudnn_sdp(False)


def milliseconds(ways: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median time of each way, taken in turns, so that a drifting clock is the same for all."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    is_gpu = device.type == "cuda"
    for turn in range(13 if is_gpu else 3):
        for name, run in ways.items():
            if is_gpu:
                torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            if is_gpu:
                torch.cuda.synchronize()
            if turn > 1 or not is_gpu:  # the first ones allocate
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: median(taken) for name, taken in times.items()}


def loss_ways(size: Size, share: float) -> dict[str, Callable[[], object]]:
    """Forward and backward of the output layer, for a share of the positions."""
    layer = loss.OutputLayer(size.width, size.vocab).to(size.device, BF16)
    torch.nn.init.normal_(layer.weight, std=0.02)
    torch.nn.init.zeros_(layer.bias)
    positions = size.rows * size.length
    count = int(share * positions)
    hidden = torch.randn(count, size.width, device=size.device).to(BF16).requires_grad_()
    targets = torch.randint(size.vocab, (count,), device=size.device)
    weights = torch.ones(count, device=size.device)

    def run(in_place: bool) -> None:
        usual = loss.compiles_for
        loss.compiles_for = lambda device: in_place
        try:
            output = layer(hidden, targets, weights, positions=positions, z_loss=1e-4)
        finally:
            loss.compiles_for = usual
        output[0].backward()
        layer.zero_grad()

    return {"by chunks": lambda: run(False), "compiled, in place": lambda: run(True)}


def mlp_ways(size: Size) -> dict[str, Callable[[], object]]:
    """Forward and backward of an MLP, compiled on a GPU."""
    config = DualConfig(
        vocab_size=64,
        hidden_size=size.width,
        num_hidden_layers=1,
        num_attention_heads=size.heads,
        intermediate_size=size.mlp,
    )
    mlp = transformer.SwiGLU(config).to(size.device, BF16)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    shape = size.rows, size.length, size.width
    hidden = torch.randn(shape, device=size.device).to(BF16).requires_grad_()

    def plain(hidden: Tensor) -> Tensor:
        return mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))

    ways = {"as written": plain, "packed and padded": mlp.packed}
    if size.device.type == "cuda":
        ways = {name: torch.compile(way, dynamic=False) for name, way in ways.items()}

    def run(way: Callable[[Tensor], Tensor]) -> None:
        way(hidden).sum().backward()
        mlp.zero_grad()

    return {name: lambda way=way: run(way) for name, way in ways.items()}


def attention_ways(size: Size, kind: str) -> dict[str, Callable[[], object]]:
    """Forward and backward of attention, four documents in each row."""
    documents = (torch.arange(size.length) * 4 // size.length).int().expand(size.rows, -1)
    shape = size.rows, size.length, size.heads, size.width // size.heads
    inputs = [torch.randn(shape).to(size.device, BF16).requires_grad_() for _ in range(3)]
    upstream = torch.randn(shape).to(size.device, BF16)

    def run(backend: str, cudnn: bool = True) -> None:
        plan = attention.plan_attention(
            kind, documents.contiguous(), backend=backend, device=size.device, dtype=BF16
        )
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        plan.attend(*inputs).backward(upstream)
        torch.backends.cuda.enable_cudnn_sdp(True)

    ways: dict[str, Callable[[], object]] = {"sdpa, dense mask": lambda: run("sdpa")}
    if size.device.type == "cuda":
        ways["varlen, as torch chooses"] = lambda: run("varlen")
        ways["varlen, cuDNN not allowed"] = lambda: run("varlen", cudnn=False)
        ways["flex"] = lambda: run("flex")
    return ways


def part_lines(size: Size) -> Iterator[str]:
    """Time every part; one that fails says so and lets the others run."""
    parts = {
        "loss, all positions": lambda: loss_ways(size, 1.0),
        "loss, 9/16 of them": lambda: loss_ways(size, 9 / 16),
        "MLP of a block": lambda: mlp_ways(size),
        "attention of a block, causal": lambda: attention_ways(size, "causal"),
        "attention of a block, full": lambda: attention_ways(size, "full"),
    }
    yield "| part, forward and backward | way | ms |\n|---|---|---|"
    for part, make in parts.items():
        ways = make()
        for name, way in list(ways.items()):
            try:
                way()
            except RuntimeError as error:
                del ways[name]
                yield f"| {part} | {name} | failed: {str(error).splitlines()[0][:100]} |"
        for name, taken in milliseconds(ways, size.device).items():
            yield f"| {part} | {name} | {taken:.2f} |"


def train(recipe: str, change: str, settings: list[str]) -> None:
    """Train in this process, as rank 0 of one, without the evaluation and checkpoint at the end."""
    without(change)
    from dualtrain.recipe.load import load_recipe
    from dualtrain.training import train as loop
    from dualtrain.training.start import start

    def finish_step(run, *, stop: bool) -> None:
        step = run.state.step
        if loop.is_due(step, run.recipe.progress.interval_steps):
            loop.record(run)
        if step == run.state.steps:
            os._exit(0)

    loop.finish_step = finish_step
    sys.exit(start(load_recipe(recipe, settings), ranks=None, hostfile=None, plain=True))


def measure(name: str, settings: list[str], folder: Path) -> dict[str, float] | str:
    """Train in a process of its own; the record of the median speed, or why there is none."""
    recipe, changes, change = RUNS[name]
    run = folder / "run"
    if recipe == "replication/gpu":  # many runs, of which this is about one
        text = (ROOT / "recipes/replication/gpu.yaml").read_text()
        (folder / "one.yaml").write_text(text[: text.index("\nsweep:")])
        recipe = str(folder / "one.yaml")
    settings = [*FIXED, *changes, *settings, f"run_dir={run}"]
    command = [sys.executable, __file__, "--train", recipe, change, *settings]
    log = folder / "log"
    with log.open("w") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
    if code:
        return f"failed: {log.read_text().strip().splitlines()[-1][:200]}"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    shutil.rmtree(run)
    late = sorted(records[len(records) // 2 :], key=lambda r: r["tokens_per_second"])
    return late[len(late) // 2]


def run_lines(
    names: list[str], settings: list[str], until: float, found: dict[str, dict]
) -> Iterator[str]:
    """Make the runs, most wanted first, and remember what was found."""
    yield "| run | tokens/s | MFU | GiB | waited for data, s |\n|---|---|---|---|---|"
    longest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        data = [*BUILD, f"data.path={folder}/data"]
        for name in names:
            began = time.monotonic()
            if began + longest > until:
                yield f"| {name} | not run: no time left | | | |"
                continue
            record = measure(name, [*data, *settings], Path(folder))
            longest = max(longest, time.monotonic() - began)
            if isinstance(record, str):
                yield f"| {name} | {record} | | | |"
                continue
            found[name] = record
            mfu = "-" if record["mfu"] is None else f"{record['mfu']:.3f}"
            gib, waited = record["memory_bytes"] / 2**30, record["data_wait_s"]
            speed = f"{record['tokens_per_second']:,.0f}"
            yield f"| {name} | {speed} | {mfu} | {gib:.1f} | {waited:.1f} |"


def bar_lines(found: dict[str, dict]) -> Iterator[str]:
    """Compare what was found with the bars; those of an H100 mean little elsewhere."""
    from dualtrain.network.arithmetic import flops_per_token, model_sizes
    from dualtrain.recipe.load import load_recipe

    def line(what: str, value: float, bar: float) -> str:
        return f"| {what} | {value:,.3g} | {bar:,.3g} | {'yes' if value >= bar else 'NO'} |"

    speed = {name: record["tokens_per_second"] for name, record in found.items()}
    yield "| bar (H100) | found | at least | passed |\n|---|---|---|---|"
    if "alpha 1" in speed:
        yield line("470M, alpha 1, thousand tokens/s", speed["alpha 1"] / 1e3, BAR_470M / 1e3)
        yield line("470M, alpha 1, over what was first measured", speed["alpha 1"] / FIRST_470M, 1)
        if found["alpha 1"]["mfu"] is not None:
            yield line("470M, alpha 1, MFU", found["alpha 1"]["mfu"], BAR_MFU)
    if {"alpha 1", "alpha 1/4"} <= speed.keys():
        recipe = load_recipe("paper/470m").recipe
        sizes = model_sizes(DualConfig.of_recipe(recipe.model, 51_200))
        ar, full = (flops_per_token(sizes, recipe.sequence_length, k) for k in ("causal", "full"))
        ideal = speed["alpha 1"] * ar / (ar / 4 + full * 3 / 4)
        yield line(
            "470M, alpha 1/4, share of its ideal by FLOPs", speed["alpha 1/4"] / ideal, BAR_MIX
        )
    best = max((speed[name] for name in ("34M", "34M compiled") if name in speed), default=None)
    if best is not None:
        yield line("34M alone, over what was first measured", best / BEFORE_34M, 2)
    for name in speed:
        if name.startswith("alpha 1, ") and "alpha 1" in speed:
            yield f"| gain over {name} | {speed['alpha 1'] / speed[name]:.3f} | | |"


def header(device: torch.device) -> Iterator[str]:
    """Say where all this was measured."""
    is_gpu = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if is_gpu else "no GPU, CPU"
    cudnn = torch.backends.cudnn.version() if is_gpu else None
    versions = ", ".join(f"{name} {version(name)}" for name in ("deepspeed", "transformers"))
    python = ".".join(map(str, sys.version_info[:3]))
    yield f"{card}; Python {python}, torch {torch.__version__}, cuDNN {cudnn}, {versions}"
    yield f"    python {shlex.join(sys.argv)}"


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2], sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", nargs="*", choices=["parts", *RUNS], metavar="NAME")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("settings", nargs="*")
    given = parser.parse_intermixed_args()
    until = time.monotonic() + 60 * given.minutes
    wanted = ["parts", *RUNS] if given.only is None else given.only
    size, settings = Size(torch.device("cuda")), ["steps=16"]
    if given.tiny:
        size = Size(torch.device("cpu"), 2, 64, 32, 2, 44, 512)
        settings = [*TINY, "steps=4"]
    elif not torch.cuda.is_available():
        parser.error("there is no GPU; --tiny tries the script on a CPU")
    found: dict[str, dict] = {}
    runs = [name for name in RUNS if name in wanted]
    sections = [header(size.device), part_lines(size) if "parts" in wanted else iter(())]
    if runs:
        sections.append(run_lines(runs, [*settings, *given.settings], until, found))
        sections.append(bar_lines(found))
    for section in sections:
        for text in section:
            print(text, flush=True)
        print()


if __name__ == "__main__":
    main()
