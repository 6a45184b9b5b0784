"""Tests of: dualtrain.data.dataset, prefetch: a shard that goes missing is named.

Plain ``StreamingDataset`` iteration ends normally, as if the epoch were over, when a local shard is
missing and there are no loader workers, and hangs when there are some.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from helpers.datasets import distinct_documents, write_dataset
from helpers.ranks import on_ranks
from helpers.runs import train_all
from torch.utils.data import DataLoader, Dataset

from dualtrain.common.errors import UserError
from dualtrain.data.batches import TrainingData
from dualtrain.data.dataset import TokenDataset
from dualtrain.data.prefetch import Prefetcher
from dualtrain.method.mixing import Mixture, Slot
from dualtrain.recipe.load import load_recipe

RECIPE = """
name: missing
alpha: 1/2
steps: 100
repetitions: null
unique_tokens: all
sequence_length: 32
global_batch: 4
micro_batch: 1
run_dir: {folder}/run
data: {{path: {data}, prefetch_steps: 1}}
model: {{layers: 1, width: 16, heads: 2, mlp_width: 16}}
engine: {{deepspeed: zero1, precision: fp32, timeout_s: 600}}
sample: {{tokens: 0, infill: ''}}
algorithms: [{{use: "helpers.algorithms:ShardRemover", args: {{shard: {shard}}}}}]
"""


class Batches(Dataset):
    """The training data as a torch dataset, for loaders with processes of their own."""

    def __init__(self, path: Path) -> None:
        dataset = TokenDataset.open(path)
        self._data = TrainingData(
            dataset,
            mixture=Mixture(alpha=Fraction(1, 2), steps=60, slots=1, micro_batch=1, rotation=False),
            sequence_length=32,
            seed=0,
            unique_tokens=None,
            append_eos=True,
        )
        dataset.close()  # a shard that is open is read on, wherever its name has gone

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int):
        return self._data.batch("all", index).targets


@pytest.fixture
def path(tmp_path: Path) -> Path:
    documents = distinct_documents([40] * 40)
    return write_dataset(tmp_path / "data", documents, vocab_size=5000, shard_bytes=1000)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_stops_with_the_name(path: Path, workers: int) -> None:
    batches = Batches(path)
    whole = [tokens.tolist() for tokens in DataLoader(batches, None, num_workers=workers)]
    assert len(whole) == 60
    shard = path / "train" / "shard.00002.mds"
    batches = Batches(path)
    shard.unlink()
    # A worker's exception reaches the loop as one of torch's, with ours in its text.
    with pytest.raises(Exception, match="shard.00002.mds: shard is missing"):
        list(DataLoader(batches, None, num_workers=workers, timeout=600 if workers else 0))


def test_prefetcher_stops_with_the_name(path: Path) -> None:
    data = Batches(path)._data
    (path / "train" / "shard.00002.mds").unlink()
    slots = (Slot(i, "ar", "all", i, 1.0) for i in range(60))
    with (
        Prefetcher(data, slots, depth=2) as batches,
        pytest.raises(UserError, match="shard.00002.mds: shard is missing"),
    ):
        for _ in batches:
            pass


def test_run_stops_with_the_name(tmp_path: Path) -> None:
    documents = distinct_documents([40] * 150)
    data = write_dataset(
        tmp_path / "data", documents, documents[:4], vocab_size=7000, shard_bytes=1000
    )
    shard = data / "train" / "shard.00007.mds"
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(folder=tmp_path, data=data, shard=shard))
    texts = [load_recipe(str(file)).text]
    (outcome,) = on_ranks(train_all, texts, ranks=1, tmp_path=tmp_path)[0]
    assert str(outcome).startswith(f"{shard}: document ")
    assert "cannot be read: the shard ends before it" in str(outcome)
