"""Tests of: dualtrain.generate.autoregressive, .rows.

Text from left to right is that of passes over whole rows, and of transformers' ``generate``.
"""

import copy
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.models import to_llama
from helpers.texts import (
    CONTEXT,
    SPECIAL,
    WORDS,
    allowed,
    generators,
    logits_of,
    random_model,
    with_ids,
)

from dualtrain.common.errors import UserError
from dualtrain.common.vocabulary import Vocabulary
from dualtrain.generate.autoregressive import continue_prompts
from dualtrain.generate.settings import Settings
from dualtrain.model.handle import ModelHandle

PROMPTS = [[1, 7, 12], [1], [1, 20, 21, 22, 9, 8, 7, 6], [1, 7, 12], [1, 29]]


def greedy(tokens, **settings):
    return Settings(temperature=0, tokens=tokens, **settings)


def ids_of(continuations) -> list[list[int]]:
    return [list(continuation.ids) for continuation in continuations]


@pytest.fixture(scope="module")
def endless(model):
    return with_ids(model, stop_ids=())


@pytest.mark.parametrize("mode", ["ar", "prefix"])
def test_greedy_is_that_of_whole_rows(network, endless, mode):
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(12):
            kind = ("prefix", len(prompt)) if mode == "prefix" else ("causal",)
            last = allowed(logits_of(network, ids, *kind)[-1], may_stop=False)
            ids.append(int(last.argmax()))
        expected.append(ids[len(prompt) :])
    found = continue_prompts(endless, PROMPTS, greedy(12, mode=mode), generators=generators(5))
    assert ids_of(found) == expected
    assert len({token for ids in expected for token in ids}) > 8
    assert {continuation.stop for continuation in found} == {"tokens"}


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_is_that_of_transformers(penalty):
    """Each prompt by itself, all at once, and with tokens that end the text."""
    network = random_model(head="linear")
    llama = to_llama(network)
    model = _plain(network)
    asked = {
        "max_new_tokens": 20,
        "do_sample": False,
        "repetition_penalty": penalty,
        "pad_token_id": 0,
    }
    expected = []
    for prompt in PROMPTS:
        ids = llama.generate(torch.tensor([prompt]), eos_token_id=None, **asked)
        expected.append(ids[0, len(prompt) :].tolist())
    assert len({token for ids in expected for token in ids}) > 8
    settings = greedy(20, repetition_penalty=penalty)
    together = continue_prompts(model, PROMPTS, settings, generators=generators(5))
    assert ids_of(together) == expected
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        alone = continue_prompts(model, [prompt], settings, generators=generators(1))
        assert ids_of(alone) == [ids]
    # The same with an end that some reach and some do not.
    end = expected[0][4]
    stopping = with_ids(model, stop_ids=(end,))
    found = continue_prompts(stopping, PROMPTS, settings, generators=generators(5))
    for continuation, prompt in zip(found, PROMPTS, strict=True):
        ids = llama.generate(torch.tensor([prompt]), eos_token_id=end, **asked)[0, len(prompt) :]
        ended = end in ids.tolist()
        assert list(continuation.ids) == ids.tolist()[: -1 if ended else None]
        assert continuation.stop == ("end" if ended else "tokens")
    assert found[0].stop == "end"


def _plain(network):
    """As transformers sees it: no token is special."""
    vocabulary = Vocabulary(size=WORDS, special_ids=(), bos_id=1, eos_id=2, mask=None)
    return ModelHandle(model=network, vocabulary=vocabulary, context=CONTEXT)


def test_sampling_with_a_batch_of_transformers(model, network):
    """Penalty, temperature, top-k and top-p together leave the same tokens with the same shares."""
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    prompt = [1, 9, 9, 14]
    warpers = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.5),
            TemperatureLogitsWarper(2.0),
            TopKLogitsWarper(8),
            TopPLogitsWarper(0.9),
        ]
    )
    logits = allowed(logits_of(network, prompt)[-1:], may_stop=True)
    expected = warpers(torch.tensor([prompt]), logits).softmax(-1)[0]
    draws = 1000
    found = continue_prompts(
        model,
        [prompt] * draws,
        Settings(tokens=1, temperature=2.0, top_k=8, top_p=0.9, repetition_penalty=1.5),
        generators=generators(draws),
    )
    counts = Counter(ids[0] if ids else 1 for ids in ids_of(found))
    shares = torch.tensor([counts[token] for token in range(WORDS)]) / draws
    assert 3 <= int((expected > 0).sum()) <= 8
    assert not set(counts) - set((expected > 0).nonzero()[:, 0].tolist())
    # Half the sum of differences: about 0.03 for 1000 draws of at most 8 tokens.
    assert float((shares - expected).abs().sum() / 2) < 0.08


def test_a_text_does_not_depend_on_what_else_is_in_the_batch(endless):
    settings = Settings(tokens=15, temperature=1.3, top_k=12, repetition_penalty=1.2)
    together = ids_of(continue_prompts(endless, PROMPTS, settings, generators=generators(5)))
    alone = [
        ids_of(continue_prompts(endless, [prompt], settings, generators=[own]))[0]
        for prompt, own in zip(PROMPTS, generators(5), strict=True)
    ]
    assert together == alone
    backwards = continue_prompts(endless, PROMPTS[::-1], settings, generators=generators(5)[::-1])
    assert ids_of(backwards)[::-1] == together
    assert together[0] != together[3]  # one prompt, two samples


def test_the_seed_decides(endless):
    def sample(seed: int) -> list[list[int]]:
        settings = Settings(tokens=15, temperature=1)
        return ids_of(continue_prompts(endless, [[1, 7]], settings, generators=generators(1, seed)))

    first = sample(3)
    torch.manual_seed(99)
    np.random.seed(99)
    assert sample(3) == first
    assert sample(4) != first
    assert not set(first[0]) & set(SPECIAL)


def test_rows_that_end_leave_the_batch(network, model):
    shapes = []

    def watched(input_ids, **options):
        shapes.append(tuple(input_ids.shape))
        return network(input_ids, **options)

    free = continue_prompts(
        with_ids(model, stop_ids=()), PROMPTS, greedy(8), generators=generators(5)
    )
    end = free[2].ids[2]
    stopping = replace(with_ids(model, stop_ids=(end,)), model=watched)
    found = continue_prompts(stopping, PROMPTS, greedy(8), generators=generators(5))
    for before, after in zip(free, found, strict=True):
        cut = before.ids.index(end) if end in before.ids else len(before.ids)
        assert after.ids == before.ids[:cut]
    # Equal prompts are read once; afterwards each row has its token.
    assert shapes[0] == (4, 8)
    assert [rows for rows, _ in shapes[1:]] == sorted((r for r, _ in shapes[1:]), reverse=True)
    assert shapes[1] == (5, 1) and shapes[-1][0] < 5


@pytest.mark.parametrize(("length", "new"), [(CONTEXT, 1), (CONTEXT - 3, 4), (1, CONTEXT)])
def test_it_stops_where_the_context_is_full(network, endless, length, new):
    prompt = [1, *range(5, 5 + 24), *range(5, 12)][:length]
    (found,) = continue_prompts(endless, [prompt], greedy(99), generators=generators(1))
    assert (len(found.ids), found.stop) == (new, "context")
    # The last one is predicted from a full row.
    row = [*prompt, *found.ids[:-1]]
    assert len(row) == CONTEXT
    last = allowed(logits_of(network, row)[-1], may_stop=False)
    assert found.ids[-1] == int(last.argmax())


def test_a_full_row_does_not_stop_the_others(endless):
    long, short = [1, *range(5, 29)], [1, 7]
    both = continue_prompts(endless, [long, short], greedy(20), generators=generators(2))
    (alone,) = continue_prompts(endless, [short], greedy(20), generators=generators(1))
    assert [c.stop for c in both] == ["context", "tokens"]
    assert both[1] == alone


def test_tokens_are_told_as_they_come(model):
    heard = []
    found = continue_prompts(
        model,
        PROMPTS,
        Settings(tokens=6, temperature=1),
        generators=generators(5),
        on_token=lambda row, token: heard.append((row, token)),
    )
    for row, continuation in enumerate(found):
        told = [token for number, token in heard if number == row]
        assert told == [*continuation.ids, None]


def test_no_token_beyond_the_vocabulary(endless):
    few = with_ids(endless, size=8)
    found = continue_prompts(
        few, [[1]], Settings(tokens=30, temperature=5.0), generators=generators(1)
    )
    assert set(found[0].ids) == {5, 6, 7}


def test_every_rank_makes_all_passes(model):
    passes = []

    def eager(input_ids, *, attention, selection, positions=None):
        passes.append(1)
        key = torch.zeros(*input_ids.shape, 1, 4)
        attention.attend(key, key, key)
        logits = torch.zeros(len(selection), WORDS)
        logits[:, 7 + len(passes)] = 5.0
        return SimpleNamespace(logits=logits)

    ended = replace(with_ids(model, stop_ids=(9,)), model=eager, world_size=2)
    (found,) = continue_prompts(ended, [[1]], greedy(5), generators=generators(1))
    assert (found.ids, found.stop) == ((8,), "end")
    assert len(passes) == 5


@pytest.mark.parametrize("prompt", [[], [5] * (CONTEXT + 1)])
def test_a_prompt_that_does_not_fit_is_refused(model, prompt):
    with pytest.raises(UserError, match="prompt: (0|33) tokens — expected 1 to 32"):
        continue_prompts(model, [[1], prompt], Settings(tokens=1), generators=generators(2))


def test_the_model_goes_back_to_training(network, model):
    trained = copy.deepcopy(network).train()
    continue_prompts(
        replace(model, model=trained), [[1]], Settings(tokens=1), generators=generators(1)
    )
    assert trained.training and torch.is_grad_enabled()


def test_a_compiled_model_is_not_compiled_for_each_length(network, endless, monkeypatch):
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def run(forward):
        model = replace(endless, model=forward)
        return continue_prompts(model, PROMPTS, greedy(5), generators=generators(5))

    mine = copy.deepcopy(network)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with torch._dynamo.config.patch(disable=False):
        for block in mine.model.layers:
            block.compile(dynamic=False, backend=count)
        found = run(mine)
        assert not compiled
        with torch.no_grad():
            mine(torch.tensor([[1, 7]]))
        assert compiled
    assert found == run(network)


def test_a_caller_may_have_enough(endless):
    """Told each row's tokens so far; the others go on."""
    asked = []

    def is_enough(row, ids):
        asked.append((row, len(ids)))
        return row == 2 and len(ids) == 3

    whole = continue_prompts(endless, PROMPTS, greedy(6), generators=generators(5))
    found = continue_prompts(
        endless, PROMPTS, greedy(6), generators=generators(5), is_enough=is_enough
    )
    assert (found[2].ids, found[2].stop) == (whole[2].ids[:3], "asked")
    assert found[:2] + found[3:] == whole[:2] + whole[3:]
    assert asked[:5] == [(row, 1) for row in range(5)]
