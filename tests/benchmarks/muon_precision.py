"""How far Muon's update is from exact arithmetic, by Newton-Schulz kernel and precision.

    python tests/benchmarks/muon_precision.py 1,10,60 [KEY=VALUE ...]

Trains the quickstart, with changes, in this process. Of the very matrices (gradients with Nesterov
momentum) that DeepSpeed orthogonalises in those updates, every kernel's result is compared with the
same five iterations in fp64: |difference| / |result| in Frobenius norms, which is that of a
parameter's movement. For each shape the median and the largest; matrices of zeros are left out.
"""

import sys
import tempfile
from itertools import count
from math import ceil
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: F401  before torch: its settings
import torch
from deepspeed.runtime.zero.muon import original_muon as kernels
from helpers.paper_optimizer import newton_schulz

from dualtrain.derived.cost import optimizer_groups
from dualtrain.network.arithmetic import model_sizes
from dualtrain.network.config import DualConfig
from dualtrain.recipe.load import load_recipe
from dualtrain.training.start import start

standard, gram = kernels.zeropower_via_newtonschulz5, kernels.zeropower_via_gram_newtonschulz


def fused(matrix: torch.Tensor) -> torch.Tensor:
    """The iteration with each product and the sum it goes into rounded once, not twice."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def columns(matrix: torch.Tensor) -> list[float]:
    exact, plain = newton_schulz(matrix.double()), newton_schulz(matrix.bfloat16())
    tall = matrix.shape[0] > matrix.shape[1]
    other = fused(matrix.bfloat16().T).T if tall else fused(matrix.bfloat16())
    usual = standard(matrix, 5)
    pairs = [(newton_schulz(matrix), exact), (gram(matrix, 5), exact), (usual, exact)]
    pairs += [(other, exact), (plain, usual), (other, usual)]
    return [float((mine.double() - its).norm() / its.double().norm()) for mine, its in pairs]


def main() -> None:
    marks = [int(update) for update in sys.argv[1].split(",")]
    seen: list[torch.Tensor] = []
    calls = count(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run_dir={folder}", f"steps={max(marks)}", "eval.interval_steps=0"]
        loaded = load_recipe("quickstart", [*settings, "sample.infill=''", *sys.argv[2:]])
        groups = optimizer_groups(
            loaded.recipe, model_sizes(DualConfig.of_recipe(loaded.recipe.model, 2048))
        )
        in_update = sum(len(group.names) for group in groups if group.uses_muon)

        def record(matrix: torch.Tensor, steps: int) -> torch.Tensor:
            if ceil(next(calls) / in_update) in marks:
                seen.append(matrix.float().clone())
            return standard(matrix, steps)

        kernels.zeropower_via_newtonschulz5 = record
        start(loaded, ranks=1, hostfile=None, plain=True)
    print(f"gram runs in {kernels.ns_compute_dtype('gram')}")
    print("| update | matrices | plain fp32 | gram | standard | fused bf16 ", end="")
    print(f"| plain bf16 to standard | fused bf16 to standard |\n|{'---|' * 8}")
    for place, update in enumerate(marks):
        some = [m for m in seen[place * in_update : (place + 1) * in_update] if m.any()]
        for shape in dict.fromkeys(m.shape for m in some):
            found = torch.tensor([columns(m) for m in some if m.shape == shape])
            pairs = zip(found.median(0).values, found.amax(0), strict=True)
            cells = " | ".join(f"{middle:.1g}, {most:.1g}" for middle, most in pairs)
            print(f"| {update} | {len(found)} of {shape[0]}x{shape[1]} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
