"""Tests of: dualtrain.checkpoint.store, engine.optimizer_state, training.origin.

What each of several ranks reads of a checkpoint.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.ranks import on_ranks
from helpers.runs import records, results, rewind, train_all, train_on

from dualtrain.recipe.load import LoadedRecipe

COMMON = ("steps=4", "checkpoint.interval_steps=2", "eval.interval_steps=0", "sample={tokens: 0}")


def train_and_count(texts: list[str]) -> list[Counter[str]]:
    """Train recipes one after another; how often this rank opened which file of a checkpoint."""
    opened: list[Counter[str]] = [Counter() for _ in texts]
    names = [f"/{text.split('run_dir: ')[1].splitlines()[0].rpartition('/')[2]}/" for text in texts]

    def note(event: str, arguments: tuple) -> None:
        if event != "open" or "r" not in (arguments[1] or ""):
            return
        path = str(arguments[0])
        for number, name in enumerate(names):
            if name in path and "/step-" in path:
                opened[number][Path(path).name] += 1

    sys.addaudithook(note)
    assert train_all(texts) == [0] * len(texts)
    return opened


def resume_and_count(ranks: int, tmp_path: Path, *recipes: LoadedRecipe) -> list[list[Counter]]:
    """Counts by recipe and rank."""
    for recipe in recipes:
        rewind(recipe, 2)
    texts = [recipe.text for recipe in recipes]
    counts = on_ranks(train_and_count, texts, ranks=ranks, tmp_path=tmp_path)
    return [list(of_ranks) for of_ranks in zip(*counts, strict=True)]


def states_of(counts: Counter[str]) -> Counter[str]:
    """Of the files that hold a rank's state and its part of the optimizer's."""
    return Counter({name: n for name, n in counts.items() if name.endswith(".pt")})


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_do_not_read_each_others_files(tiny, tmp_path, ranks):
    """Once to compare hashes, by one of them, and once to load, by one; not by every rank."""
    same = [tiny(*COMMON, f"engine.deepspeed=zero{n}", name=f"zero{n}") for n in (1, 3)]
    more = tiny(*COMMON, name="more")
    assert train_on(ranks, tmp_path, *same) == [0, 0]
    assert train_on(6 - ranks, tmp_path, more) == [0]
    whole = [results(recipe) for recipe in same]
    counted = resume_and_count(ranks, tmp_path, *same, more)
    for recipe, before, of_ranks in zip(same, whole, counted[:-1], strict=True):
        assert sorted(results(recipe)) == sorted(before)
        total = sum(map(states_of, of_ranks), Counter())
        assert {f"rank-{rank:05d}.pt" for rank in range(ranks)} < total.keys()
        assert max(total.values()) == 2, (recipe.recipe.name, total)
    said = [r["message"] for r in records(more, "event") if r["event"] == "resume"]
    assert f"by {6 - ranks} ranks at ZeRO stage 1, now {ranks}" in said[0]
    total = sum(map(states_of, counted[-1]), Counter())
    for name, times in total.items():
        # A part of the optimizer's state is opened by those that go on with something of it.
        assert times == 2 if name.startswith("rank-") else times <= 1 + ranks // 2 + 1, total
