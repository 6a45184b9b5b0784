"""Tests of: tests/benchmarks/gpu_bars.py: on a CPU it does what it does on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import gpu_bars

TINY = gpu_bars.Size(torch.device("cpu"), 2, 64, 32, 2, 44, 512)


def test_parts_have_a_time_each():
    lines = [line.split(" | ") for line in list(gpu_bars.part_lines(TINY))[1:]]
    assert [line[0].strip("| ") for line in lines] == [
        *["loss, all positions"] * 2,
        *["loss, 9/16 of them"] * 2,
        *["MLP of a block"] * 2,
        "attention of a block, causal",
        "attention of a block, full",
    ]
    assert all(float(line[2].strip("| ")) > 0 for line in lines)


def test_bars_follow_from_what_was_found():
    def found(speed, mfu=None):
        return {"tokens_per_second": speed, "mfu": mfu}

    runs = {"alpha 1": found(160_000.0, 0.45), "alpha 1/4": found(140_000.0)}
    runs |= {"34M": found(250_000.0), "34M compiled": found(500_000.0)}
    runs["alpha 1, loss by chunks"] = found(80_000.0)
    lines = "\n".join(gpu_bars.bar_lines(runs))
    assert "| 470M, alpha 1, thousand tokens/s | 160 | 150 | yes |" in lines
    assert "| 470M, alpha 1, MFU | 0.45 | 0.42 | yes |" in lines
    # 2,799 and 2,941 MFLOP a token: the ideal is 154,100.
    assert "| 470M, alpha 1/4, share of its ideal by FLOPs | 0.908 | 0.98 | NO |" in lines
    assert "| 34M alone, over what was first measured | 2.5 | 2 | yes |" in lines
    assert "| gain over alpha 1, loss by chunks | 2.000 | | |" in lines


@pytest.mark.slow
def test_the_command_ends_with_a_table_of_every_run():
    runs = ["alpha 1, MLP not packed", "34M"]
    command = [sys.executable, gpu_bars.__file__, "--tiny", "--only", *runs]
    root = Path(gpu_bars.__file__).parents[2]
    output = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in runs:
        (line,) = (line for line in output.splitlines() if line.startswith(f"| {name} |"))
        assert float(line.split(" | ")[1].replace(",", "")) > 0, line
    late = subprocess.run(
        [*command[:3], "--minutes", "0", *command[3:]], cwd=root, check=True, capture_output=True
    ).stdout
    assert late.count(b"not run: no time left") == len(runs)
