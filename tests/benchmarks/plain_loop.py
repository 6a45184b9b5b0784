"""The quickstart through dualtrain against a hand-written PyTorch loop of the same model.

    python tests/benchmarks/plain_loop.py [--pairs 3] [--steps 60] [KEY=VALUE ...]

Each pair runs both, one after the other, as processes of their own on the same machine, and the
ratio is taken within the pair, since machines drift. The plain loop is what one would write
without dualtrain: the same transformer and batches of the same shape, whole logits through
``F.cross_entropy``, the paper's Muon and AdamW on full parameters, no checkpoints and no records.

Tokens per second leave out start-up, evaluation and saving in both. Peak memory is of the whole
process. Results: RESULTS.md in this directory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def measure_dualtrain(overrides: list[str], steps: int, folder: Path) -> dict[str, float]:
    run_dir = folder / f"run-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "dualtrain", "run", "quickstart", "--plain", "--ranks", "1"]
    settings = [f"run_dir={run_dir}", f"steps={steps}", "repetitions=null"]
    settings += ["unique_tokens=all", "sample.tokens=0", "sample.infill=''"]
    settings += ["eval.interval_steps=0", "checkpoint.interval_steps=0"]
    subprocess.run([*command, *settings, *overrides], check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"][1:]
    return {
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in train),
        "memory_mib": train[-1]["memory_bytes"] / 2**20,
        "data_wait_s": sum(r["data_wait_s"] for r in train),
    }


def measure_plain(overrides: list[str], steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--plain", "--steps", str(steps), *overrides]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def plain_loop(overrides: list[str], steps: int) -> dict[str, float]:
    """The hand-written loop, with as many diffusion batches as the recipe's alpha says."""
    sys.path.insert(0, str(HERE.parent))
    import torch
    import torch.nn.functional as F
    from helpers.paper_optimizer import PaperOptimizer

    from dualtrain.data.batches import TrainingData
    from dualtrain.data.dataset import TokenDataset
    from dualtrain.engine.parameters import muon_parameter_names
    from dualtrain.model.build import build_model
    from dualtrain.network.attention import plan_attention
    from dualtrain.recipe.load import load_recipe
    from dualtrain.training.assemble import build_mixture

    recipe = load_recipe("quickstart", overrides).recipe
    dataset = TokenDataset.open(recipe.data.path)
    mixture = build_mixture(recipe, steps)
    data = TrainingData(
        dataset,
        mixture=mixture,
        sequence_length=recipe.sequence_length,
        seed=0,
        unique_tokens=None,
        append_eos=recipe.data.append_eos,
    )
    model = build_model(recipe, dataset.info)
    parameters = dict(model.named_parameters())
    optimizer = PaperOptimizer(parameters, muon_parameter_names(model))
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        for slot in mixture.slots(step):
            batch = data.batch(slot.stream, slot.first_sequence)
            inputs, targets = batch.inputs, batch.targets
            kind = "causal"
            if slot.objective == "diffusion":
                kind = "full"
                masked = torch.rand(inputs.shape) < torch.rand(len(inputs), 1)
                inputs = inputs.masked_fill(masked, dataset.info.mask_id)
            attention = plan_attention(
                kind,
                batch.document_ids,
                backend="sdpa",
                device=torch.device("cpu"),
                dtype=torch.float32,
            )
            logits = model(inputs, attention=attention).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            (loss / mixture.slots_per_step).backward()
        optimizer.step({name: p.grad for name, p in parameters.items()}, recipe.optim.lr)
        model.zero_grad()
        seconds.append(time.perf_counter() - start)
    tokens = recipe.global_batch * recipe.sequence_length
    return {
        "tokens_per_second": tokens / statistics.median(seconds),
        "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if given.plain:
        print(json.dumps(plain_loop(given.overrides, given.steps)))
        return
    ratios, memory = [], []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(given.pairs):
            ours = measure_dualtrain(given.overrides, given.steps, Path(folder))
            plain = measure_plain(given.overrides, given.steps)
            ratios.append(ours["tokens_per_second"] / plain["tokens_per_second"])
            memory.append(ours["memory_mib"] / plain["memory_mib"])
            print(f"pair {pair}: dualtrain {ours}, plain {plain}", flush=True)
    print(f"tokens/s, dualtrain over plain: {statistics.median(ratios):.2f} (of {ratios})")
    print(f"peak memory, dualtrain over plain: {statistics.median(memory):.2f} (of {memory})")


if __name__ == "__main__":
    main()
