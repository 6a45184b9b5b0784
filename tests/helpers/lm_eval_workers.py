"""A model for lm-evaluation-harness, and the harness run on it, here and on real ranks."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from dualtrain.launch.world import free_port

CONTEXT = 48


def export_noisy_model(dataset: Path, directory: Path) -> Path:
    """A tiny model whose every weight is noise, so that each token looks at what it sees."""
    from dualtrain.data.dataset import DatasetInfo
    from dualtrain.network.config import DualConfig
    from dualtrain.network.transformer import DualLM

    info = DatasetInfo.load(dataset)
    config = DualConfig(
        vocab_size=512,
        width=32,
        layers=2,
        heads=2,
        mlp_width=48,
        head="linear",
        sequence_length=CONTEXT,
        bos_token_id=info.bos_id,
        eos_token_id=info.eos_id,
        mask_token_id=info.mask_id,
    )
    model = DualLM(config, seed=0)
    noise = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(directory)
    shutil.copy(dataset / "tokenizer.json", directory)
    return directory


def harness(tasks_dir: Path, tasks: list[str], model: Path, **options: object) -> dict | None:
    """Results of lm-evaluation-harness on its own task files, one model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import dualtrain.harness.model  # noqa: F401 (registers the model type)

    return lm_eval.simple_evaluate(
        model="dualtrain",
        model_args={"path": str(model), "device": "cpu", **options},
        tasks=tasks,
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )


def on_forks(
    function: Callable[..., object], *arguments: object, ranks: int, tmp_path: Path
) -> list[object]:
    """Call a function in forks of this process that share a process group's address.

    New processes would spend seconds on importing the harness.

    Returns:
        What it returned, by rank.
    """
    port = free_port()

    def call(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        result = function(*arguments)
        (tmp_path / f"result-{rank}.pickle").write_bytes(pickle.dumps(result))

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=call, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks
    return [
        pickle.loads((tmp_path / f"result-{rank}.pickle").read_bytes()) for rank in range(ranks)
    ]
