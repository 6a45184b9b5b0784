"""Settings that must be in place before torch is imported, and fixtures of several files."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# With AMX, how a bf16 product on a CPU is rounded depends on the shapes beside it, and Muon's bf16
# iteration no longer equals the references to the last bits.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# The processes that compile would be taken for those that a test left behind.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.processes import (
    HangWatcher,
    ending_processes,
    hear_signals,
    mark_children,
    restoring_environment,
)

hear_signals()
mark_children()


@pytest.fixture(scope="session")
def hang_watcher() -> HangWatcher:
    watcher = HangWatcher()
    watcher.start()
    return watcher


@pytest.fixture(autouse=True, scope="module")
def module_leaves_nothing_behind(hang_watcher: HangWatcher) -> Iterator[None]:
    with ending_processes(hang_watcher), restoring_environment():
        yield


@pytest.fixture(autouse=True)
def test_leaves_nothing_behind(hang_watcher: HangWatcher) -> Iterator[None]:
    with ending_processes(hang_watcher), restoring_environment():
        yield


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    return build_tiny_dataset(tmp_path_factory.mktemp("tiny"))


def build_tiny_dataset(folder: Path) -> Path:
    """The tests' documents as a dataset with 512 tokens."""
    from helpers.documents import documents

    from data_tools.convert import build_dataset
    from dualtrain.recipe.schema import BuildSection

    for number, text in enumerate(documents()):
        (folder / f"{number:04}.txt").write_text(text)
    build = BuildSection(source=f"{folder}/*.txt", vocab_size=512, val_fraction=0.1)
    build_dataset(build, folder / "dataset")
    return folder / "dataset"


@pytest.fixture
def tiny(tiny_dataset, tmp_path):
    """A function from overrides to a loaded recipe of a very small run."""
    from helpers.runs import tiny_loader

    return tiny_loader(tiny_dataset, tmp_path)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Directory and stock model of a small GPT-2, and the tests' documents in its own tokens."""
    from helpers.documents import documents
    from helpers.imported import convert, publish

    folder = tmp_path_factory.mktemp("published")
    texts = documents()
    stock = publish(folder / "gpt2", "gpt2", texts)
    return folder / "gpt2", stock, convert(folder / "text", texts, folder / "gpt2")


@pytest.fixture
def compiler(monkeypatch) -> Iterator[None]:
    """Compilation, which the test session turns off: the variable alone would do that."""
    import torch

    from dualtrain.network import attention, loss

    monkeypatch.delenv("TORCHDYNAMO_DISABLE")

    def forget() -> None:
        attention._compiled_flex.cache_clear()
        loss._compiled_turn.cache_clear()
        torch._dynamo.reset()

    with torch._dynamo.config.patch(disable=False):
        forget()
        yield
        forget()
