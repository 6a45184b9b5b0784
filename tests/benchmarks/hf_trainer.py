"""The quickstart's model, purely autoregressive under AdamW, beside the Hugging Face Trainer.

    pip install accelerate
    python tests/benchmarks/hf_trainer.py [--pairs 3] [--steps 60] [KEY=VALUE ...]

Each pair runs both, one after the other, as processes of their own of one thread, and the ratio is
taken within the pair, since machines drift. The Trainer gets an equal Llama (the same shapes, the
linear head), the same sequences in the same order, as many accumulated micro-batches a step, AdamW
and clipping; evaluation and saving are off in both. It alone attends across documents,
which costs nothing more. Tokens per second leave out start-up; peak memory is of the process.
Results: RESULTS.md in this directory.
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
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

EQUAL = ["alpha=1", "model.head=linear", "optim.name=adamw", "optim.lr=1e-3"]
"""What makes dualtrain do what the Trainer does."""


def measure_dualtrain(overrides: list[str], steps: int, run_dir: Path) -> dict[str, float]:
    """The median of the records, each of ten steps, but the first."""
    settings = [*EQUAL, f"run_dir={run_dir}", f"steps={steps}", "repetitions=null"]
    settings += ["unique_tokens=all", "sample.tokens=0", "sample.infill=''"]
    settings += ["eval.interval_steps=0", "checkpoint.interval_steps=0"]
    command = [sys.executable, "-m", "dualtrain", "run", "quickstart", "--plain", *settings]
    subprocess.run([*command, *overrides], check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    return {
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in train[1:]),
        "memory_mib": train[-1]["memory_bytes"] / 2**20,
        "loss": train[-1]["ar_loss"],
    }


def measure_trainer(overrides: list[str], steps: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--trainer", str(folder), "--steps", str(steps)]
    output = subprocess.run([*command, *overrides], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def run_trainer(overrides: list[str], steps: int, folder: str) -> dict[str, float]:
    """Train the Llama on the sequences that dualtrain would train on."""
    from dualtrain.common.compat import prepare_imports

    prepare_imports()  # a broken torchvision breaks transformers without it

    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from dualtrain.data.batches import TrainingData
    from dualtrain.data.dataset import TokenDataset
    from dualtrain.model.build import build_model
    from dualtrain.recipe.load import load_recipe
    from dualtrain.training.assemble import build_mixture

    recipe = load_recipe("quickstart", [*EQUAL, *overrides]).recipe
    dataset = TokenDataset.open(recipe.data.path)
    mixture = build_mixture(recipe, steps)
    data = TrainingData(
        dataset,
        mixture=mixture,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
        unique_tokens=None,
        append_eos=recipe.data.append_eos,
    )

    class Sequences(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for step in range(steps):
                for slot in mixture.slots(step):
                    batch = data.batch(slot.stream, slot.first_sequence)
                    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
                        yield {"input_ids": inputs, "labels": targets, "shift_labels": targets}

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    section = recipe.model
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=dataset.info.vocab_size,
            hidden_size=section.width,
            intermediate_size=section.mlp_width,
            num_hidden_layers=section.layers,
            num_attention_heads=section.heads,
            max_position_embeddings=recipe.sequence_length,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    ours = build_model(recipe, dataset.info)
    assert model.num_parameters() == sum(p.numel() for p in ours.parameters())
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=mixture.slots_per_step,
        learning_rate=recipe.optim.lr,
        weight_decay=recipe.optim.weight_decay,
        max_grad_norm=recipe.optim.clip_norm or 0.0,
        lr_scheduler_type="constant",
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )
    trainer = Trainer(model, settings, train_dataset=Sequences(), callbacks=[Clock()])
    trainer.train()
    seconds = [end - start for start, end in pairwise(ends)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = recipe.global_batch * recipe.sequence_length
    return {
        "tokens_per_second": tokens / statistics.median(seconds),
        "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss": losses[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--trainer", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if given.trainer:
        print(json.dumps(run_trainer(given.overrides, given.steps, given.trainer)))
        return
    ratios, memory = [], []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(given.pairs):
            ours = measure_dualtrain(given.overrides, given.steps, Path(folder, f"run-{pair}"))
            theirs = measure_trainer(given.overrides, given.steps, Path(folder, f"hf-{pair}"))
            ratios.append(ours["tokens_per_second"] / theirs["tokens_per_second"])
            memory.append(ours["memory_mib"] / theirs["memory_mib"])
            print(f"pair {pair}: dualtrain {ours}, Trainer {theirs}", flush=True)
    print(f"tokens/s, dualtrain over Trainer: {statistics.median(ratios):.2f} (of {ratios})")
    print(f"peak memory, dualtrain over Trainer: {statistics.median(memory):.2f} (of {memory})")


if __name__ == "__main__":
    main()
