"""Tests of: dualtrain.evaluate.scoring, packing: batches, memory and ranks change nothing."""

import gc
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import on_ranks
from helpers.scoring import (
    CONTEXT,
    OPEN_VOCABULARY,
    VOCABULARY,
    Recorder,
    make_model,
    make_scorer,
    some_requests,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dualtrain.common.errors import UserError
from dualtrain.engine.process import init_distributed, prepare_process
from dualtrain.evaluate.masks import Masking
from dualtrain.evaluate.packing import Row, make_batches
from dualtrain.evaluate.request import Passage
from dualtrain.evaluate.scoring import MODES, Request, Score, encode_pair
from dualtrain.model.memory import is_out_of_memory
from dualtrain.network.output import DualOutput


@pytest.fixture(scope="module")
def model():
    return make_model(torch.float32)


def scorer_of(forward, **options):
    return make_scorer(forward, torch.float32, **options)


def likelihoods(scores):
    return torch.tensor([score.log_likelihood for score in scores], dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
def test_batches_do_not_change_a_score(model, mode):
    requests = some_requests()
    expected = likelihoods(scorer_of(model).score(requests, mode))
    for tokens in (1, 50, 333):
        scores = scorer_of(model, tokens_per_batch=tokens).score(requests, mode)
        torch.testing.assert_close(likelihoods(scores), expected, rtol=1e-6, atol=1e-6)
    alone = [scorer_of(model).score([request], mode)[0] for request in requests[::5]]
    torch.testing.assert_close(likelihoods(alone), expected[::5], rtol=1e-6, atol=1e-6)
    backwards = scorer_of(model).score(requests[::-1], mode)[::-1]
    torch.testing.assert_close(likelihoods(backwards), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_equal_requests_are_computed_once(model, mode):
    once, often = Recorder(model), Recorder(model)
    requests = some_requests()[:11]
    first = scorer_of(once).score(requests, mode)
    assert scorer_of(often).score(requests * 3, mode) == first * 3
    assert often.tokens == once.tokens


def test_what_is_computed(model):
    """The prompt once, no last tokens of continuations, and no reading twice."""
    context = tuple([1, *range(5, 20)])
    requests = [Request(context, (5, 6, tail)) for tail in (7, 8, 9)]
    requests.append(Request(context, (20,)))
    recorder = Recorder(model)
    scorer_of(recorder).score(requests, "ar")
    assert [tuple(ids.shape) for ids in recorder.inputs] == [(1, len(context) + 2)]
    assert len(recorder.outputs[0].nll) == 1 + 1 + 3 + 1
    # In prefix mode contexts of their own are never shared, however alike.
    recorder = Recorder(model)
    scorer_of(recorder).score([*requests, Request(context[:-1], (5, 6))], "prefix")
    assert [tuple(ids.shape) for ids in recorder.inputs] == [(2, len(context) + 2)]
    # Every token's copy; two tokens of padding are cheaper than a batch for the shorter one.
    recorder = Recorder(model)
    scorer_of(recorder).score(requests, "pll")
    assert [tuple(ids.shape) for ids in recorder.inputs] == [(10, 19)]


def test_rows_are_divided_where_sharing_no_longer_pays(model):
    """Very many continuations of a short prompt do not make one endless row."""
    requests = [Request((1, 7), (a, b)) for a in range(24) for b in range(24)]
    recorder = Recorder(model)
    scorer_of(recorder, vocabulary=OPEN_VOCABULARY, tokens_per_batch=16).score(requests, "ar")
    assert all(ids.numel() <= 16 for ids in recorder.inputs)
    # Nothing but <s> in common: sharing saves a token each, and long rows cost more.
    pairs = [(a, b) for a in range(5, 24) for b in range(5, 24)]
    few = [Request((1, *pair), (pair[0],) * 8) for pair in pairs[::18]]
    recorder = Recorder(model)
    scorer_of(recorder, tokens_per_batch=4096).score(few, "ar")
    assert max(ids.shape[1] for ids in recorder.inputs) < 60


def rows_of(*lengths):
    empty = torch.empty(0).numpy()
    return [Row(torch.zeros(n).numpy(), empty, empty, empty, empty, 1) for n in lengths]


def test_batches_are_of_similar_lengths():
    def shapes(tokens, overhead, *lengths):
        batches = make_batches(rows_of(*lengths), tokens, overhead_tokens=overhead)
        return [[len(row) for row in batch.rows] for batch in batches]

    assert shapes(30, 100, 5, 10, 4, 10, 9) == [[10, 10, 9], [5, 4]]
    # Four rows of 10 would be filled by one of 9 and two of 1: 19 tokens of padding at least.
    assert shapes(40, 10, 10, 9, 1, 1) == [[10, 9], [1, 1]]
    assert shapes(40, 20, 10, 9, 1, 1) == [[10, 9, 1, 1]]
    assert shapes(8, 0, 20, 3) == [[20], [3]]
    # Rows that need a mask are not with those that need none.
    rows = rows_of(5, 5, 5)
    rows[1] = replace(rows[1], parts=2)
    batches = make_batches(rows, 100, overhead_tokens=100)
    assert [[row.parts for row in batch.rows] for batch in batches] == [[2], [1, 1]]


def test_old_tokens_of_long_contexts_are_dropped(model):
    context, continuation = (1, *[5 + i % 19 for i in range(40)]), (6, 7, 8)
    for mode in MODES:
        scorer = scorer_of(model)
        # The last token of a continuation is no input where nothing is predicted from it.
        kept = CONTEXT - 3 + (mode in ("ar", "prefix"))
        cut = (1, *context[-(kept - 1) :])
        long, short = scorer.score(
            [Request(context, continuation), Request(cut, continuation)], mode
        )
        assert (long.dropped, short.dropped) == (41 - kept, 0)
        assert long.log_likelihood == short.log_likelihood
        assert scorer.longest(mode) == kept + 3


@pytest.mark.parametrize("mode", ["ar", "pll"])
def test_a_continuation_that_cannot_fit_is_refused(model, mode):
    scorer = scorer_of(model)
    longest = scorer.longest(mode) - 1
    fits = Request((1, 7), (6,) * longest)
    assert scorer.score([fits], mode)[0].dropped == 1
    with pytest.raises(UserError, match=f"request 2 of 2.*{longest + 1} tokens.*most {longest},"):
        scorer.score([fits, Request((1,), (6,) * (longest + 1))], mode)


def test_modes_that_mask_need_a_mask_token(model):
    scorer = scorer_of(model, vocabulary=replace(VOCABULARY, mask=None, special_ids=(0, 1, 2, 3)))
    request = [Request((1, 7), (6, 8))]
    assert scorer.score(request, "prefix")[0].log_likelihood < 0
    for mode in ("pll", "chain", "elbo"):
        with pytest.raises(UserError, match=f"mode {mode}.*no mask token.*ar or prefix"):
            scorer.score(request, mode)


def test_what_cannot_be_scored_is_refused(model):
    scorer = scorer_of(model)
    end = [Request((1, 7), (6, 8)), Request((1, 7), (2,))]
    assert scorer.score(end, "ar")[1].log_likelihood < 0
    with pytest.raises(UserError, match=r"request 2 of 2.*\[2\] has special tokens only.*pll"):
        scorer.score(end, "pll")
    with pytest.raises(ValueError, match="'mlm' is none of ar, prefix"):
        scorer.score(end, "mlm")
    with pytest.raises(ValueError, match="request 0 has no continuation"):
        scorer.score([Request((1,), ())], "ar")
    with pytest.raises(ValueError, match="request 0 has no context"):
        scorer.score([Request((), (5,))], "ar")
    assert scorer.score([], "ar") == scorer.score([], "elbo") == []


@pytest.mark.parametrize("mode", MODES)
def test_a_scorer_of_lengths_gives_ties(mode):
    """A model without knowledge: no mode prefers one of two equally long continuations."""

    def forward(input_ids, *, targets, **_):
        return DualOutput(nll=torch.full(targets.shape, 2.5), is_top=targets > 0)

    requests = [Request((1, 7), (6, 8, 9)), Request((1, 7), (10, 11, 12)), Request((1,), (5,))]
    scores = scorer_of(forward, elbo_samples=4).score(requests, mode)
    assert scores[0] == scores[1]
    assert scores[0].log_likelihood == pytest.approx(-7.5, abs=1e-12)
    assert scores[2].log_likelihood == -2.5


def test_masks_belong_to_the_request_and_the_seed(model):
    requests = [
        Request((1, 7, 9), (5, 6, 8, 10, 11, 12)),
        Request((1, 7, 9), (5, 6, 8, 10, 11, 13)),
    ]

    def score(chosen, **options):
        return likelihoods(scorer_of(model, elbo_samples=8, **options).score(chosen, "elbo"))

    together = score(requests)
    torch.testing.assert_close(score(requests[1:]), together[1:], rtol=1e-6, atol=0)
    assert (score(requests, seed=1) - together).abs().min() > 1e-3
    masking = Masking("elbo", OPEN_VOCABULARY, samples=8)
    places = []
    for request in requests:
        documents, _ = masking.documents(Passage(request.context + request.continuation, 3))
        places.append([tuple((document.tokens == 4).nonzero()[0]) for document in documents])
    assert places[0] != places[1]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("mode", ["ar", "prefix", "elbo"])
def test_batches_are_halved_when_memory_runs_out(model, mode, error):
    def fail(input_ids):
        if input_ids.numel() > 60:
            raise error

    notes, progress = [], []
    requests = some_requests()
    recorder = Recorder(model, fail=fail)
    scorer = scorer_of(recorder, tokens_per_batch=400, on_note=notes.append)
    scores = scorer.score(requests, mode, on_progress=progress.append)
    expected = likelihoods(scorer_of(model).score(requests, mode))
    torch.testing.assert_close(likelihoods(scores), expected, rtol=1e-6, atol=1e-6)
    assert all(ids.numel() <= 60 for ids in recorder.inputs)
    assert re.match("memory ran out: batches of .* tokens from here on, not 400", notes[0])
    assert progress == sorted(progress) and progress[-1] == len(requests)
    # It stays so for what comes later.
    assert len(notes) == len(set(notes)) <= 5
    scorer.score(requests[:5], "pll")
    assert len(notes) <= 5


@pytest.mark.parametrize("mode", ["ar", "pll"])
def test_a_single_row_without_memory_is_the_end(model, mode):
    def fail(input_ids):
        if input_ids.shape[1] > 6:
            raise OUT_OF_MEMORY[0]

    scorer = scorer_of(Recorder(model, fail=fail))
    assert len(scorer.score([Request((1, 7), (6, 8, a)) for a in range(5, 20)], mode)) == 15
    notes = []
    with pytest.raises(UserError, match="memory: ran out in a row of (9|10) tokens by itself"):
        alone = [Request((1, *(6,) * 8), (7,))]
        scorer_of(scorer.model.model, on_note=notes.append).score(alone, mode)
    assert notes == []  # it is not tried again
    with pytest.raises(UserError, match="memory: ran out in a row of (8|9) tokens by itself"):
        scorer.score([Request((1, 7), (6, 8, a, 9, 10, 11, 12)) for a in range(5, 20)], mode)


def test_other_failures_are_not_taken_for_memory(model):
    def fail(_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        scorer_of(Recorder(model, fail=fail)).score(some_requests(), "ar")
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 52)
    assert is_out_of_memory(caught.value)


def score_on_ranks(modes: list[str], limit: int) -> tuple[list[list[Score]], list[str]]:
    """Score on all ranks, with memory on rank 1 for ``limit`` tokens only, then with ZeRO-3."""
    prepare_process(compile_model=False)
    init_distributed(timeout_s=600)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks = {"rank": rank, "world_size": world_size}
    notes: list[str] = []

    def fail(input_ids):
        if rank == 1 and input_ids.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    small = Recorder(make_model(), fail=fail)
    scorer = make_scorer(small, tokens_per_batch=4 * limit, on_note=notes.append, **ranks)
    results = [scorer.score(some_requests(), mode) for mode in modes]
    engine = sharded_engine()
    scorer = make_scorer(engine, dtype=torch.float32, tokens_per_batch=limit, **ranks)
    results += [scorer.score(some_requests()[:15], mode) for mode in modes]
    engine.destroy()
    del engine, scorer
    # In this order, or the interpreter may abort when it exits.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    return results, notes


def sharded_engine():
    """A ZeRO-3 engine around the model, in which nothing is small enough to stay whole."""
    import deepspeed

    model = make_model(torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config=config,
        dist_init_required=False,
    )
    return engine


def test_ranks_share_the_work(tmp_path):
    """Two ranks get the scores of one, also if one of them runs out of memory; and with ZeRO-3."""
    modes = ["ar", "pll"]
    (first, notes), (second, other_notes) = on_ranks(
        score_on_ranks, modes, 150, ranks=2, tmp_path=tmp_path
    )
    assert first == second
    assert notes == other_notes and "not 600" in notes[0]
    expected = [make_scorer().score(some_requests(), mode) for mode in modes]
    for mode, scores, sharded, one in zip(modes, first[:2], first[2:], expected, strict=True):
        torch.testing.assert_close(likelihoods(scores), likelihoods(one), rtol=0, atol=1e-10)
        assert [s.is_greedy for s in scores] == [s.is_greedy for s in one], mode
        # Weights of float32, and some of the requests only.
        some = likelihoods(one[: len(sharded)])
        torch.testing.assert_close(likelihoods(sharded), some, rtol=1e-5, atol=1e-5)


def make_tokenizer(*merges, **options):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | options))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def encode(tokenizer, context, continuation):
    """The texts of context and continuation as divided between them, without ``<s>``."""
    request = encode_pair(tokenizer, context, continuation, bos_id=999)
    assert request.context[0] == 999
    whole = tokenizer.encode(context + continuation, add_special_tokens=False).ids
    assert list(request.context[1:] + request.continuation) == whole
    names = [tokenizer.id_to_token(i) for i in whole]
    cut = len(request.context) - 1
    return names[:cut], names[cut:]


def test_pairs_are_divided_by_characters():
    tokenizer = make_tokenizer(("a", "b"), ("Ġ", "a"))
    assert encode(tokenizer, "b", " a") == (["b"], ["Ġa"])
    # A token across the boundary belongs to the continuation, also with the whole context in it.
    assert encode(tokenizer, "b ", "ac") == (["b"], ["Ġa", "c"])
    assert encode(tokenizer, "a", "bc") == ([], ["ab", "c"])
    assert encode(tokenizer, "", "ab") == ([], ["ab"])
    # Characters of several bytes, each of them a token.
    assert encode(tokenizer, "é", "è") == (["Ã", "©"], ["Ã", "¨"])
    assert encode(tokenizer, "日", " 本")[0] == list("æĹ¥")
    # A token of the last byte of one and the first byte of the other.
    across = make_tokenizer(("©", "Ã"))
    assert encode(across, "é", "è") == (["Ã"], ["©Ã", "¨"])
    with pytest.raises(UserError, match="'' has no tokens"):
        encode_pair(tokenizer, "ab", "", bos_id=1)


@pytest.mark.parametrize("trim", [True, False])
def test_pairs_are_divided_alike_with_trimmed_offsets(trim):
    """GPT-2's post-processor takes spaces off the offsets of tokens."""
    tokenizer = make_tokenizer(("Ġ", "a"), ("Ġ", "Ġ"))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    assert encode(tokenizer, "b", " a") == (["b"], ["Ġa"])
    assert encode(tokenizer, "b", "   a") == (["b"], ["ĠĠ", "Ġa"])
    assert encode(tokenizer, "b ", " a") == (["b", "Ġ"], ["Ġa"])
    assert encode(tokenizer, "b  ", "a") == (["b", "Ġ"], ["Ġa"])
    assert encode(tokenizer, "b\n", "a") == (["b", "Ċ"], ["a"])


def test_pairs_of_tokenizers_that_change_the_text():
    prefixed = make_tokenizer(("Ġ", "a"), add_prefix_space=True)
    assert encode(prefixed, "a", " a") == (["Ġa"], ["Ġa"])
    assert encode(prefixed, "", "a") == ([], ["Ġa"])
    prefixed.post_processor = processors.ByteLevel(trim_offsets=True)
    assert encode(prefixed, "", "b") == ([], ["Ġ", "b"])
    shorter = make_tokenizer(("a", "b"))
    shorter.normalizer = normalizers.Replace("--", "")
    assert encode(shorter, "--a--", "b") == ([], ["ab"])
    assert encode(shorter, "--c--", "--b") == (["c"], ["b"])
