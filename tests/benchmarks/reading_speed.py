"""How fast training sequences are read, in the order of training and in that of the text.

    python tests/benchmarks/reading_speed.py

One line for each corpus: sequences a second, one thread, page cache warm, in both orders and their
ratio; then how long a consumer of that many tokens a second has waited for the prefetcher.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np

from data_tools.tokenizers.tokenizer import Tokenizer
from dualtrain.data import plan
from dualtrain.data.batches import TrainingData
from dualtrain.data.dataset import TokenDataset
from dualtrain.data.prefetch import Prefetcher
from dualtrain.method.mixing import Mixture, Slot

CORPORA = (
    # Documents, tokens of each on average, T, and the tokens a second that a run would ask for.
    (100, 200_000, 128, 20_000),
    (100, 200_000, 2048, 300_000),
    (20_000, 1_100, 2048, 300_000),
    (1_000_000, 20, 128, 20_000),
    (1_000_000, 20, 2048, 300_000),
)
MICRO_BATCH = 8
PACED_S = 10


def write(path: Path, documents: int, mean: int) -> TokenDataset:
    """Write a dataset of random tokens, lengths geometrically distributed."""
    from streaming import MDSWriter

    rng = np.random.default_rng(0)
    lengths = rng.geometric(1 / mean, documents).astype(np.int64)
    tokens = rng.integers(16, 30_000, int(lengths.max()) + 1_000_003, dtype=np.uint16)
    tokenizer = Tokenizer.train(["a b c"], 272)
    splits = {}
    for split, some in (("train", lengths), ("val", lengths[:1])):
        with MDSWriter(columns={"tokens": "ndarray:uint16"}, out=str(path / split)) as writer:
            for start, length in zip(rng.integers(0, 1_000_003, len(some)), some, strict=True):
                writer.write({"tokens": tokens[start : start + length]})
        np.save(path / split / "lengths.npy", some)
        splits[split] = {"documents": len(some), "tokens": int(some.sum()), "bytes": 1}
    tokenizer.save(path / "tokenizer.json")
    facts = {
        "format": 1,
        "tokenizer_file": "tokenizer.json",
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": 30_000,
        "special_tokens": tokenizer.special_tokens,
        "special_ids": tokenizer.special_ids,
        "dtype": "uint16",
        "splits": splits,
        "skipped_documents": 0,
        "sources": [],
        "arguments": {},
    }
    (path / "dataset.json").write_text(json.dumps(facts))
    return TokenDataset.open(path)


class TextOrder(plan.KeyedPermutation):
    """No permutation at all."""

    def __getitem__(self, index: int) -> int:
        return index


def slots(mixture: Mixture) -> Iterator[Slot]:
    for step in range(mixture.steps):
        yield from mixture.slots(step)


def sequences_per_second(data: TrainingData, mixture: Mixture, seconds: float = 3.0) -> float:
    source = slots(mixture)
    data.batch("ar", 0)  # the first plan is made
    data.batch("diffusion", 0)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for slot in islice(source, 8):
            data.batch(slot.stream, slot.first_sequence)
            count += MICRO_BATCH
    return count / (time.perf_counter() - began)


def waited(data: TrainingData, mixture: Mixture, tokens_per_second: int, length: int) -> float:
    """Seconds that a consumer at that pace waits within ten, after the first batch."""
    pause = MICRO_BATCH * length / tokens_per_second
    with Prefetcher(data, slots(mixture), depth=32) as batches:
        next(batches)
        before, end = batches.wait_s, time.perf_counter() + PACED_S
        while time.perf_counter() < end:
            next(batches)
            time.sleep(pause)
        return batches.wait_s - before


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    shuffled = plan.KeyedPermutation
    for documents, mean, length, pace in CORPORA:
        with tempfile.TemporaryDirectory() as folder:
            dataset = write(Path(folder), documents, mean)
            mixture = Mixture(
                alpha=Fraction(1, 4),
                steps=1_000_000,
                slots=4,
                micro_batch=MICRO_BATCH,
                rotation=True,
            )
            speeds = []
            for order in (TextOrder, shuffled, TextOrder, shuffled):
                plan.KeyedPermutation = order
                data = TrainingData(
                    dataset,
                    mixture=mixture,
                    sequence_length=length,
                    seed=0,
                    unique_tokens=None,
                    append_eos=True,
                )
                speeds.append(sequences_per_second(data, mixture))
            text, training = np.mean(speeds[::2]), np.mean(speeds[1::2])
            print(
                f"{documents:>9,} documents of {mean:>7,}, T = {length:>4}: {text:>6,.0f} "
                f"sequences/s in the order of the text, {training:>6,.0f} in that of training, "
                f"ratio {training / text:.2f}; at {pace:,} tokens/s waited "
                f"{waited(data, mixture, pace, length):.1f} s of {PACED_S}",
                flush=True,
            )


if __name__ == "__main__":
    main()
