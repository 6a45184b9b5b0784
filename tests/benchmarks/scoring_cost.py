"""What scoring costs: tokens computed beside those that the definitions ask for, and time.

    python tests/benchmarks/scoring_cost.py runs/NAME TASKS_DIR --tasks arc_easy,blimp --items 100

Plain forward passes over full rows without padding, of as many tokens, with the same kind of
attention and as many positions read, are run in turn with the scoring; the best time of each
counts. ``asked`` is the number of tokens by definition: for ar and prefix a row for every request,
Σ (p + L - 1) for p tokens of prompt and L of continuation; for pll and chain a row for every token,
Σ L·(p + L); for elbo a row for each sample. Equal requests count once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from dualtrain.checkpoint.trained import TrainedModel, open_trained
from dualtrain.evaluate.scoring import MODES, Mode, Request, Scorer, encode_pair
from dualtrain.evaluate.tasks import load_tasks
from dualtrain.network.attention import plan_attention
from dualtrain.network.output import DualOutput


class Counter:
    """A model that counts.

    Attributes:
        tokens: Computed, padding included.
        reads: Positions that the output layer was run for.
        calls: Forward passes.
    """

    def __init__(self, model: Callable[..., DualOutput]) -> None:
        self.module = model
        self.tokens = self.reads = self.calls = 0

    def __call__(self, ids: torch.Tensor, *, targets: torch.Tensor, **options) -> DualOutput:
        self.tokens += ids.numel()
        self.reads += len(targets)
        self.calls += 1
        return self.module(ids, targets=targets, **options)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="A run, a checkpoint or an exported model.")
    parser.add_argument("tasks_dir", help="Directory of the tasks' data.")
    parser.add_argument("--tasks", default="arc_easy,hellaswag,blimp")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--items", type=int, default=50, help="Of each task.")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens-per-batch", type=int)
    parser.add_argument("--elbo-samples", type=int, default=8)
    options = parser.parse_args()
    trained = open_trained(options.model)
    print(f"{trained.source.name} on {trained.device}, {torch.get_num_threads()} threads")
    print(
        f"{'task':12} {'mode':7} {'asked':>9} {'computed':>9} {'ratio':>6} {'passes':>6} "
        f"{'seconds':>8} {'plain':>8} {'ratio':>6} {'asked/s':>9}"
    )
    for task in load_tasks(options.tasks.split(","), options.tasks_dir):
        requests = [
            encode_pair(trained.tokenizer, item.prompt, choice, bos_id=trained.vocabulary.bos_id)
            for item in task.items(options.items)
            for choice in item.choices
        ]
        for mode in options.modes.split(","):
            print(f"{task.name:12} {mode:7} {measure(trained, requests, mode, options)}")


def measure(
    trained: TrainedModel, requests: Sequence[Request], mode: Mode, options: argparse.Namespace
) -> str:
    """Score, and say what it cost."""

    def score() -> Counter:
        counter = Counter(trained.model)
        scorer = Scorer(
            replace(trained, model=counter),
            tokens_per_batch=options.tokens_per_batch,
            elbo_samples=options.elbo_samples,
        )
        scorer.score(requests, mode)
        return counter

    counter = score()
    kind = "causal" if mode in ("ar", "prefix") else "full"
    seconds, plain = best_times(
        [score, lambda: plain_passes(trained, counter.tokens, counter.reads, kind)],
        options.repeat,
    )
    asked = asked_tokens(trained, requests, mode, options.elbo_samples)
    return (
        f"{asked:9,} {counter.tokens:9,} {counter.tokens / asked:6.3f} {counter.calls:6} "
        f"{seconds:8.2f} {plain:8.2f} {seconds / plain:6.3f} {asked / seconds:9,.0f}"
    )


def asked_tokens(
    trained: TrainedModel, requests: Sequence[Request], mode: Mode, samples: int
) -> int:
    """Tokens by the mode's definition; prompts as far as they fit."""
    total = 0
    for request in set(requests):
        last = 1 if mode in ("ar", "prefix") else 0
        size = min(len(request.context) + len(request.continuation) - last, trained.context)
        ordinary = sum(t not in trained.vocabulary.special_ids for t in request.continuation)
        rows = {"pll": ordinary, "chain": ordinary, "elbo": min(samples, 2**ordinary - 1)}
        total += size * rows.get(mode, 1)
    return total


def plain_passes(trained: TrainedModel, tokens: int, reads: int, kind: str) -> None:
    """Compute as many tokens and readings in full rows."""
    width = trained.context
    rows = max(1, 2048 // width) if trained.device.type == "cpu" else max(1, 32768 // width)
    documents = torch.zeros(rows, width, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(16, trained.vocabulary.size, (rows, width), generator=generator)
    ids = ids.to(trained.device)
    with trained.inference():
        for begin in range(0, tokens, rows * width):
            count = -(-min(rows * width, tokens - begin) // width)
            plan = plan_attention(
                kind,
                documents[:count],
                backend=trained.backend,
                device=trained.device,
                dtype=trained.dtype,
            )
            share = round(reads * count * width / tokens)
            place = torch.arange(share, device=trained.device) % (count * width)
            nll = trained(
                ids[:count], attention=plan, selection=place, targets=ids.flatten()[place]
            ).nll
    nll.cpu()


def best_times(works: Sequence[Callable[[], object]], repeat: int) -> list[float]:
    """Run each in turn, several times, and return the shortest time of each in seconds."""
    best = [float("inf")] * len(works)
    for _ in range(repeat):
        for number, work in enumerate(works):
            start = time.perf_counter()
            work()
            best[number] = min(best[number], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
