"""Tests of: dualtrain.derived.words: at which steps how many words are seen."""

from dataclasses import replace

import pytest

from dualtrain.common.errors import UserError
from dualtrain.data.corpus import CorpusFacts
from dualtrain.derived.derive import derive
from dualtrain.derived.words import word_milestones
from dualtrain.recipe.load import load_recipe

CORPUS = CorpusFacts(tokens=13_400_000, documents=100_000, vocab_size=4090, words=10_000_000)


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "name: x\nalpha: 1/2\nunique_tokens: all\nrepetitions: 10\nsequence_length: 500\n"
        "global_batch: 54\nmicro_batch: 1\ndata: {path: x}\nmodel: {layers: 1, width: 8, heads: 1,"
        " mlp_width: 8}\n"
    )

    def load(*overrides):
        return load_recipe(str(file), overrides).recipe

    return load


def test_steps_of_a_list_and_of_the_challenge(recipe):
    """A step has 27,000 tokens of 13.5 M, so 20,000 words of 10 M; the run has 5,000 steps."""
    found = derive(recipe("checkpoint.at.words=[1000000,30000,30500]"), corpus=CORPUS)
    assert found.steps == 5000
    assert found.words == {2: (30_000, 30_500), 50: (1_000_000,)}
    small = word_milestones(recipe("checkpoint.at.words=strict-small"), 5000, CORPUS)
    assert list(small) == [50 * n for n in (*range(1, 11), *range(20, 101, 10))]
    large = word_milestones(recipe("checkpoint.at.words=strict"), 50_000, CORPUS)
    assert len(large) == 28 and [*large.items()][-1] == (50_000, (10**9,))
    assert word_milestones(recipe(), 5000, CORPUS) == {}
    assert word_milestones(recipe("checkpoint.at.words=strict"), 5, None) == {}


def test_words_before_the_first_step_and_just_behind_the_last(recipe):
    assert word_milestones(recipe("checkpoint.at.words=[1]"), 5000, CORPUS) == {1: (1,)}
    held_out = replace(CORPUS, words=9_950_000)  # the rest is not trained on
    assert max(word_milestones(recipe("checkpoint.at.words=strict-small"), 5000, held_out)) == 5000


def test_words_that_cannot_be(recipe):
    with pytest.raises(UserError) as beyond:
        derive(recipe("checkpoint.at.words=strict"), corpus=CORPUS)
    assert str(beyond.value).startswith(
        "checkpoint.at.words: 200,000,000 words are beyond the run, which sees 100,000,000"
    )
    with pytest.raises(UserError, match="not say how many words it has .*make it again with"):
        derive(recipe("checkpoint.at.words=[5]"), corpus=replace(CORPUS, words=None))
    for value in ("strickt", "[0]", "[]", "[1.5]", "5"):
        with pytest.raises(UserError, match=r"checkpoint\.at\.words"):
            recipe(f"checkpoint.at.words={value}")
