"""Items a second of tasks in lm-evaluation-harness: our model type beside its own ``hf``.

    python tests/benchmarks/evaluation_speed.py TASKS_DIR --tasks arc_easy,hellaswag --items 200

The same weights, as a model of ours and exported as a Llama, the same task files, one process,
float32 on the CPU. ``hf`` runs with each of the batch sizes, and the best of them counts. Weights
are random: the time does not depend on them, and the scores of both have to agree. Needs the extra
``eval`` and what ``hf`` needs, ``pip install 'lm-eval[hf]'``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import yaml

SHAPES = {
    "small": (8192, 192, 6, 6, 512),
    "470m": (51_200, 1024, 24, 16, 3554),
}
VOCABULARY = 8192
"""Of the tokenizer, for both: ids above it are never read, but cost the head as much."""


@dataclass
class Timed:
    """A run of the harness.

    Attributes:
        items_per_s: Of the whole evaluation, without loading the model.
        requests_s: Time inside the model type: encoding and scoring.
        processor_s: Of that, time of this process on any core; others on the machine do not count.
        answers: Log-likelihoods of all answers, by task and item.
        correct: What acc is, by task and item.
    """

    items_per_s: float
    requests_s: float
    processor_s: float
    answers: list[float]
    correct: list[float]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks_dir", help="Directory of the tasks' data, as of `dualtrain eval`.")
    parser.add_argument("--tasks", default="arc_easy,hellaswag,social_iqa")
    parser.add_argument("--items", type=int, default=200, help="Of each task.")
    parser.add_argument("--shapes", default="small", help=", ".join(SHAPES))
    parser.add_argument("--batch-sizes", default="1,4,16,64", help="Of hf.")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="The fastest counts.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        texts = write_tasks(options, place / "tasks")
        for shape in options.shapes.split(","):
            make_model(place / shape, shape, texts, options.context)
            compare(options, place, shape)


def write_tasks(options: argparse.Namespace, folder: Path) -> list[str]:
    """Write the questions as tasks of the harness; return all their texts."""
    from dualtrain.evaluate.tasks import load_tasks

    folder.mkdir()
    texts = []
    for task in load_tasks(options.tasks.split(","), options.tasks_dir):
        items = task.items(options.items)
        data = folder / f"{task.name}.jsonl"
        with data.open("w") as lines:
            for item in items:
                values = {"prompt": item.prompt, "choices": item.choices, "gold": item.gold}
                lines.write(json.dumps(values) + "\n")
                texts += [item.prompt + choice for choice in item.choices]
        file = {
            "task": task.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(file))
    return texts


def make_model(folder: Path, shape: str, texts: list[str], context: int) -> None:
    """Write a model with random weights as ours and as a Llama, with one tokenizer."""
    from helpers.models import save_model, to_llama

    from data_tools.tokenizers.tokenizer import Tokenizer
    from dualtrain.model.exported_tokenizer import write_tokenizer
    from dualtrain.network.config import DualConfig
    from dualtrain.network.transformer import DualLM

    tokenizer = Tokenizer.train(texts, VOCABULARY)
    model = DualLM(
        DualConfig(*SHAPES[shape], head="linear", max_position_embeddings=context), seed=0
    )
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Some are zero at first, and a Llama of zeros would agree with anything.
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=noise)
    save_model(model, folder / "ours")
    tokenizer.save(folder / "ours" / "tokenizer.json")
    to_llama(model).save_pretrained(folder / "llama")
    write_tokenizer(
        folder / "ours" / "tokenizer.json",
        folder / "llama",
        special_tokens={"<s>": 1},
        context=context,
    )


def compare(options: argparse.Namespace, place: Path, shape: str) -> None:
    """Time both on one model, and print the figures."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from dualtrain.harness.model import DualtrainLM

    tasks = options.tasks.split(",")
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    theirs = HFLM(
        pretrained=str(place / shape / "llama"),
        device="cpu",
        dtype="float32",
        add_bos_token=True,
        batch_size=sizes[0],
    )
    ours = DualtrainLM(str(place / shape / "ours"), device="cpu")
    best: dict[str, Timed] = {}

    def run(name: str, lm: object) -> None:
        timed = evaluate(lm, tasks, place / "tasks")
        if name not in best or timed.items_per_s > best[name].items_per_s:
            best[name] = timed

    # The first to come would read the data.
    TaskManager(include_path=str(place / "tasks"), include_defaults=False).load(tasks)
    for _ in range(options.repeats):
        run("dualtrain", ours)
        for size in sizes:
            theirs.batch_size_per_gpu = size
            run(f"hf, batch size {size}", theirs)
    report(options, shape, best)


def evaluate(lm: object, tasks: list[str], folder: Path) -> Timed:
    """Run the harness on a model that is loaded."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    inside = watch(lm)
    begin = time.perf_counter()
    results = lm_eval.simple_evaluate(
        model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    seconds = time.perf_counter() - begin
    del lm.loglikelihood
    samples = [sample for task in tasks for sample in results["samples"][task]]
    return Timed(
        len(samples) / seconds,
        *inside,
        [answer[0] for sample in samples for answer in sample["filtered_resps"]],
        [sample["acc"] for sample in samples],
    )


def watch(lm: object) -> list[float]:
    """Add up the time that a model type takes for requests: by the clock, and of the process."""
    seconds, inner = [0.0, 0.0], lm.loglikelihood

    def timed(requests: list, **options: object) -> list:
        begin, processor = time.perf_counter(), time.process_time()
        answers = inner(requests, **options)
        seconds[0] += time.perf_counter() - begin
        seconds[1] += time.process_time() - processor
        return answers

    lm.loglikelihood = timed
    return seconds


def report(options: argparse.Namespace, shape: str, best: dict[str, Timed]) -> None:
    """Print a line for each, and how much faster ours is than the fastest of the others."""
    ours = best.pop("dualtrain")
    fastest = max(best.values(), key=lambda timed: timed.items_per_s)
    count = len(ours.correct)
    print(f"\n{shape}, {options.tasks}, {count} items, {options.threads} thread(s)")
    print(f"{'':24}{'items/s':>9}{'in the model type, s':>22}{'processor, s':>14}")
    for name, timed in {**best, "dualtrain": ours}.items():
        figures = f"{timed.items_per_s:9.2f}{timed.requests_s:22.1f}{timed.processor_s:14.1f}"
        print(f"{name:24}{figures}")
    processor = min(timed.processor_s for timed in best.values())
    print(
        f"ratio to the fastest of hf: {ours.items_per_s / fastest.items_per_s:.2f}"
        f" whole evaluation, {fastest.requests_s / ours.requests_s:.2f} in the model type,"
        f" {processor / ours.processor_s:.2f} of the processor's time there"
    )
    differences = (
        abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours.answers, fastest.answers, strict=True)
    )
    agreeing = sum(a == b for a, b in zip(ours.correct, fastest.correct, strict=True))
    print(
        f"scores: largest relative difference {max(differences):.1e} of {len(ours.answers)}"
        f" answers, the same choice in {agreeing} of {count} items"
    )


if __name__ == "__main__":
    main()
