"""``dualtrain data convert`` against the straightforward pipeline, and its memory by corpus size.

    python tests/benchmarks/convert.py [--source FILE] [--megabytes 50] [--pairs 3]
    python tests/benchmarks/convert.py --scaling [--source FILE] [--megabytes 500] [--pairs 3]
    python tests/benchmarks/convert.py --memory 50 500 [--source FILE]

The straightforward pipeline is what one would write without dualtrain: one process that reads JSON
lines, encodes each text with ``tokenizers`` and writes its ids with ``MDSWriter``. It does less: no
hashes, no split, no shuffle, nothing read back, nothing kept for a restart.

The corpus is the text of `--source` (anything that convert reads; by default the embedded corpus),
repeated with its documents' paragraphs in another order until it has the wanted size; the tokenizer
is trained once on its beginning. Everything runs as a process of its own, from start to end; the
ratio is taken within a pair, since machines drift. Memory is the sum over the process and its
workers, looked at twenty times a second, in runs of their own. Results: RESULTS.md in this folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

VOCAB_SIZE = 16_384
TOKENIZER_BYTES = 8_000_000
INTERVAL_S = 0.05


@dataclass
class Measured:
    seconds: float
    memory_mib: float
    core_seconds: float


def texts(source: str, megabytes: float) -> Iterator[str]:
    """Documents of about so many megabytes in all."""
    from data_tools.sources import Document, open_sources

    size, turn = 0, 0
    while True:
        rng = random.Random(turn)
        for document in open_sources(source).documents():
            assert isinstance(document, Document), document
            paragraphs = document.text.split("\n\n")
            if turn:
                rng.shuffle(paragraphs)
            text = "\n\n".join(paragraphs)
            yield text
            size += len(text.encode())
            if size >= megabytes * 1e6:
                return
        turn += 1


def write_corpus(source: str, megabytes: float, file: Path) -> int:
    size = 0
    with file.open("w") as stream:
        for text in texts(source, megabytes):
            size += len(text.encode())
            stream.write(json.dumps({"text": text}) + "\n")
    return size


def write_tokenizer(source: str, file: Path) -> None:
    from data_tools.tokenizers.tokenizer import Tokenizer

    Tokenizer.train(texts(source, TOKENIZER_BYTES / 1e6), VOCAB_SIZE).save(file)


def plain_pipeline(corpus: str, tokenizer: str, out: str) -> None:
    import numpy as np
    import tokenizers

    from dualtrain.common.compat import prepare_imports

    prepare_imports()  # streaming cannot be imported everywhere without it
    from streaming import MDSWriter

    encode = tokenizers.Tokenizer.from_file(tokenizer).encode
    with MDSWriter(columns={"tokens": "ndarray:uint16"}, out=out) as writer, open(corpus) as lines:
        for line in lines:
            writer.write({"tokens": np.array(encode(json.loads(line)["text"]).ids, np.uint16)})


def measure(command: list[str], *, memory: bool = False) -> Measured:
    """Run a command; its time, the core time of it and its children, and their largest memory."""
    before, began = os.times(), time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while memory and process.poll() is None:
        most = max(most, resident(process.pid))
        time.sleep(INTERVAL_S)
    if process.wait():
        raise SystemExit(f"failed: {' '.join(command)}")
    seconds, after = time.monotonic() - began, os.times()
    core = after.children_user + after.children_system
    core -= before.children_user + before.children_system
    return Measured(seconds, most / 2**20, core)


def resident(pid: int) -> int:
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def convert(
    corpus: Path, tokenizer: Path, out: Path, workers: int, *, memory: bool = False
) -> Measured:
    command = [sys.executable, "-m", "dualtrain", "data", "convert", str(corpus)]
    options = ["--out", str(out), "--tokenizer", str(tokenizer), "--workers", str(workers)]
    return measure([*command, *options], memory=memory)


def compare(source: str, megabytes: float, pairs: int, folder: Path) -> None:
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer.json"
    size = write_corpus(source, megabytes, corpus) / 1e6
    write_tokenizer(source, tokenizer)
    print(f"{size:.1f} MB of text, vocabulary {VOCAB_SIZE:,}\n")
    print("| pair | plain | 1 worker | ratio | by core time | 2 workers | 2 against 1 |")
    print("|---|---|---|---|---|---|---|")
    ratios, scaling = [], []
    for pair in range(pairs):
        plain = measure(
            [sys.executable, __file__, "--plain", str(corpus), str(tokenizer), f"{folder}/p{pair}"]
        )
        one = convert(corpus, tokenizer, folder / f"one{pair}", 1)
        two = convert(corpus, tokenizer, folder / f"two{pair}", 2)
        ratios.append(plain.seconds / one.seconds)
        scaling.append(one.seconds / two.seconds)
        print(
            f"| {pair} | {size / plain.seconds:.2f} MB/s | {size / one.seconds:.2f} MB/s "
            f"| {ratios[-1]:.2f} | {plain.core_seconds / one.core_seconds:.2f} "
            f"| {size / two.seconds:.2f} MB/s | {scaling[-1]:.2f} |",
            flush=True,
        )
    print(f"\nmedian: {statistics.median(ratios):.2f} x plain per core, ", end="")
    print(f"{statistics.median(scaling):.2f} x from 1 to 2 workers")


def scale(source: str, megabytes: float, pairs: int, folder: Path) -> None:
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer.json"
    size = write_corpus(source, megabytes, corpus) / 1e6
    write_tokenizer(source, tokenizer)
    print("| pair | 1 worker | 2 workers | ratio | core time |")
    print("|---|---|---|---|---|")
    ratios = []
    for pair in range(pairs):
        one = convert(corpus, tokenizer, folder / f"one{pair}", 1)
        two = convert(corpus, tokenizer, folder / f"two{pair}", 2)
        ratios.append(one.seconds / two.seconds)
        print(
            f"| {pair} | {size / one.seconds:.2f} MB/s | {size / two.seconds:.2f} MB/s "
            f"| {ratios[-1]:.2f} | {one.core_seconds:.1f} and {two.core_seconds:.1f} s |",
            flush=True,
        )
    print(f"\nmedian: {statistics.median(ratios):.2f} x")


def memory(source: str, sizes: list[float], folder: Path) -> None:
    tokenizer = folder / "tokenizer.json"
    write_tokenizer(source, tokenizer)
    print("| text | workers | peak | time |")
    print("|---|---|---|---|")
    for megabytes in sizes:
        corpus = folder / "corpus.jsonl"
        size = write_corpus(source, megabytes, corpus) / 1e6
        for workers in (1, 2):
            found = convert(
                corpus, tokenizer, folder / f"{megabytes}-{workers}", workers, memory=True
            )
            print(
                f"| {size:.1f} MB | {workers} | {found.memory_mib:.0f} MiB "
                f"| {found.seconds:.1f} s |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", default="builtin:python-docs")
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--scaling", action="store_true", help="only 1 worker against 2")
    parser.add_argument("--memory", type=float, nargs="+", help="corpus sizes in megabytes")
    parser.add_argument("--plain", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        plain_pipeline(*options.plain)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.memory:
            memory(options.source, options.memory, Path(folder))
        elif options.scaling:
            scale(options.source, options.megabytes, options.pairs, Path(folder))
        else:
            compare(options.source, options.megabytes, options.pairs, Path(folder))


if __name__ == "__main__":
    main()
