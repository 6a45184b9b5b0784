"""Tests of: dualtrain.data.corpus, remote: recipes whose dataset is in an object store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.object_store import LENGTHS, hashed_dataset, new_bucket, s3_server
from helpers.ranks import on_ranks
from helpers.runs import train_all

from data_tools.remote import upload_dataset
from dualtrain.common.errors import UserError
from dualtrain.data.corpus import read_corpus
from dualtrain.recipe.load import load_recipe

RECIPE = """
name: remote
seed: 3
alpha: 3/8
steps: 3
unique_tokens: 1500
sequence_length: 32
global_batch: 8
micro_batch: 1
data: {{path: {path}}}
model: {{layers: 1, width: 16, heads: 2, mlp_width: 16}}
engine: {{deepspeed: zero1, precision: fp32, timeout_s: 600}}
eval: {{sequences: 10}}
progress: {{interval_steps: 1}}
sample: {{tokens: 1}}
"""


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


def test_a_run_reads_a_remote_dataset(tiny_dataset: Path, tmp_path: Path) -> None:
    """The same losses as from the disk; a mistake is the user's, and named."""
    url, file = new_bucket(), tmp_path / "recipe.yaml"
    upload_dataset(tiny_dataset, url)
    file.write_text(RECIPE.format(path=tiny_dataset))
    copy = tmp_path / "copy"
    changes = {
        "local": [],
        "remote": [f"data.remote={url}", f"data.path={copy}"],
        "wrong": [f"data.remote={url}/wrong", f"data.path={tmp_path / 'wrong'}"],
    }
    recipes = [
        load_recipe(str(file), [f"run_dir={tmp_path / 'runs' / name}", *overrides])
        for name, overrides in changes.items()
    ]
    outcomes = on_ranks(train_all, [r.text for r in recipes], ranks=1, tmp_path=tmp_path)[0]
    assert outcomes[:2] == [0, 0]
    assert outcomes[2].startswith(f"{url}/wrong/dataset.json: is not there")
    local, remote = (losses(tmp_path / "runs" / name) for name in ("local", "remote"))
    assert local == remote and len(local) >= 4
    assert list(copy.glob("train/*.mds"))


def losses(run_dir: Path) -> list[tuple]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    names = ("kind", "step", "loss", "ar_nll", "diffusion_nll")
    return [
        tuple(str(record.get(name)) for name in names)
        for record in records
        if record["kind"] in ("train", "eval")
    ]


def test_recipes_that_contradict_themselves(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(path="data"))
    with pytest.raises(UserError, match=r"data.remote: 's3://a/b' is to be read, but data.build"):
        load_recipe(str(file), ["data.remote=s3://a/b", "data.build={source: x}"])
    with pytest.raises(UserError, match="data.cache_limit_gib: is no setting any more.*remove it"):
        load_recipe(str(file), ["data.cache_limit_gib=2"])
    # As a run of an earlier version wrote it.
    load_recipe(str(file), ["data.cache_limit_gib=null"])
    for source in ("-", "[a.txt, -]"):
        with pytest.raises(UserError, match="data.build.source: standard input belongs to no run"):
            load_recipe(str(file), [f"data.build={{source: {source}}}"])


def test_a_dry_run_looks_at_the_remote_and_keeps_nothing(tmp_path: Path) -> None:
    url = new_bucket()
    upload_dataset(hashed_dataset(tmp_path / "data"), url)
    file, copy = tmp_path / "recipe.yaml", tmp_path / "copy"
    file.write_text(RECIPE.format(path=copy))
    recipe = load_recipe(str(file), [f"data.remote={url}"]).recipe
    corpus = read_corpus(recipe)
    assert corpus is not None and corpus.tokens == sum(LENGTHS)
    assert not copy.exists()
    nowhere = load_recipe(str(file), [f"data.remote={url}/nowhere"]).recipe
    with pytest.raises(UserError, match="data.remote: there is no dataset at s3://.*/nowhere"):
        read_corpus(nowhere)
