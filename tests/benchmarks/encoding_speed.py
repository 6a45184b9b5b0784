"""Encoding speed of one core: ``Tokenizer.encode_array`` beside ``tokenizers``, in one run.

    python tests/benchmarks/encoding_speed.py corpus.jsonl.xz --vocab-size 16384 --megabytes 20

Trains a tokenizer on the documents (field ``text`` of each line), encodes the same documents in
each way, compares all ids, and prints megabytes of UTF-8 per second and the ratios.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import time
from collections.abc import Callable, Sequence

import numpy as np


def documents(path: str, megabytes: float) -> list[str]:
    """First documents of an ``.xz`` of JSON lines, up to a size in UTF-8."""
    texts, size = [], 0
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode())
            if size >= megabytes * 1e6:
                break
    return texts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--megabytes", type=float, default=20)
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = "1"  # before the library starts its threads
    import tokenizers

    from data_tools.tokenizers.tokenizer import Tokenizer

    texts = documents(options.corpus, options.megabytes)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    start = time.perf_counter()
    tokenizer = Tokenizer.train(texts, options.vocab_size)
    print(f"training   {time.perf_counter() - start:6.2f} s for {megabytes:.1f} MB")
    start = time.perf_counter()
    print(f"check      {tokenizer.backend} in ", end="")
    print(f"{time.perf_counter() - start:.2f} s")
    plain = tokenizers.Tokenizer.from_str(tokenizer.json)
    plain.encode_special_tokens = True

    def one_by_one() -> Sequence[Sequence[int]]:
        return [plain.encode(text, add_special_tokens=False).ids for text in texts]

    def batches() -> Sequence[Sequence[int]]:
        encoded = []
        for i in range(0, len(texts), 16):
            batch = plain.encode_batch_fast(texts[i : i + 16], add_special_tokens=False)
            encoded += [e.ids for e in batch]
        return encoded

    def arrays() -> Sequence[np.ndarray]:
        return [tokenizer.encode_array(text) for text in texts]

    ways: dict[str, Callable[[], Sequence]] = {
        "tokenizers.encode": one_by_one,
        "encode_batch_fast": batches,
        "encode_array": arrays,
    }
    base, expected = 0.0, None
    for name, way in ways.items():
        start = time.perf_counter()
        ids = [np.asarray(document, dtype=np.uint32) for document in way()]
        speed = megabytes / (time.perf_counter() - start)
        base, expected = base or speed, expected or ids
        same = all(np.array_equal(a, b) for a, b in zip(ids, expected, strict=True))
        print(f"{name:18} {speed:6.2f} MB/s  {speed / base:5.2f} x  same ids: {same}")


if __name__ == "__main__":
    main()
