"""Tests of: dualtrain.recipe.schema, recipe.checks, derived: legal types, absurd numbers."""

from __future__ import annotations

import time

import pytest

from dualtrain.common.errors import UserError
from dualtrain.data.corpus import CorpusFacts
from dualtrain.derived.derive import derive
from dualtrain.derived.dry_run import print_dry_run
from dualtrain.derived.memory import memory_shortage
from dualtrain.recipe.describe import fields
from dualtrain.recipe.load import load_recipe

RECIPE = """
name: absurd
alpha: 1/4
steps: 10
unique_tokens: 1000
sequence_length: 32
global_batch: 8
micro_batch: 1
data: {path: nowhere, build: {source: "builtin:python-docs", vocab_size: 512}}
model: {layers: 1, width: 32, heads: 2, mlp_width: 64}
"""
NUMBERS = ["0", "-1", "1e-320", "1e39", ".nan", ".inf", "99999999", "1" + "0" * 30]
LENGTHS = [[], ["steps=null", "repetitions=3"], ["unique_tokens=null", "repetitions=3"]]
CORPUS = CorpusFacts(tokens=10**6, documents=1000, vocab_size=512)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "absurd.yaml").write_text(RECIPE)
    return "absurd.yaml"


def go_through(*overrides: str) -> None:
    """All that a dry run and the beginning of a run do with a recipe's numbers."""
    loaded = load_recipe("absurd.yaml", overrides)
    derived = derive(loaded.recipe, corpus=CORPUS)
    print_dry_run(loaded, derived)
    if shortage := memory_shortage(derived, ranks=1):
        raise shortage


NUMERIC = [field.path for field in fields() if "number" in field.type or "integer" in field.type]


@pytest.mark.parametrize("path", NUMERIC)
def test_absurd_numbers_are_refused_in_a_sentence_or_derived(recipe, path, capsys):
    change = path.replace("[]", ".0")
    kind = ["objective.corruption.name=span"] if path.startswith("objective.corruption") else []
    decides_length = path in ("steps", "unique_tokens", "repetitions", "global_batch")
    for number in NUMBERS:
        for length in LENGTHS if decides_length else LENGTHS[:1]:
            began = time.monotonic()
            try:
                go_through(*kind, *length, f"{change}={number}")
            except UserError as error:
                assert len(str(error).splitlines()) <= 2 and len(str(error)) < 500, error
            assert time.monotonic() - began < 20, number
