"""Sampling and infilling against brute force; gaps in texts."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from dualtrain.errors import UserError
from dualtrain.generate import (
    encode_prompt,
    infill,
    infilled_pieces,
    parse_gaps,
    sample_autoregressive,
)
from dualtrain.model import DualConfig, DualLM, plan_attention

VOCABULARY, MASK, SPECIAL = 30, 4, (0, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def model() -> DualLM:
    model = DualLM(DualConfig(VOCABULARY, width=16, layers=2, heads=2, mlp_width=24))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as made, the blocks add nothing: the context would not matter
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def logits_of(model: DualLM, ids: list[int], kind: str) -> Tensor:
    """The logits of a row, (T, V), by one plain pass over it, special tokens ruled out."""
    documents = torch.zeros(1, len(ids), dtype=torch.int32)
    plan = plan_attention(kind, documents, backend="sdpa", device="cpu")
    with torch.no_grad():
        logits = model(torch.tensor([ids]), attention=plan).logits[0]
    logits[:, list(SPECIAL)] = -torch.inf
    return logits


OPTIONS = {"seed": 0, "context": 32, "forbidden_ids": SPECIAL}


class TestAutoregressive:
    def test_greedy_is_the_argmax_loop(self, model: DualLM):
        prompt = [1, 7, 12]
        ids = list(prompt)
        for _ in range(10):
            ids.append(int(logits_of(model, ids, "causal")[-1].argmax()))
        assert len(set(ids[3:])) > 2
        assert sample_autoregressive(model, prompt, tokens=10, temperature=0, **OPTIONS) == ids

    def test_past_the_context_the_oldest_tokens_leave(self, model: DualLM):
        options = {**OPTIONS, "context": 6}
        ids = [1, 7, 12]
        for _ in range(10):
            ids.append(int(logits_of(model, ids[-6:], "causal")[-1].argmax()))
        found = sample_autoregressive(model, [1, 7, 12], tokens=10, temperature=0, **options)
        assert found == ids

    def test_all_rows_have_one_length(self, model: DualLM):
        shapes = []

        def watched(input_ids: Tensor, **options: object):
            shapes.append(tuple(input_ids.shape))
            return model(input_ids, **options)

        sample_autoregressive(watched, [1, 7], tokens=5, **OPTIONS)
        assert shapes == [(1, 7)] * 5
        shapes.clear()
        sample_autoregressive(watched, [1, 7], tokens=5, **{**OPTIONS, "context": 4})
        assert shapes == [(1, 4)] * 5

    def test_the_seed_decides(self, model: DualLM):
        def sample(seed: int) -> list[int]:
            return sample_autoregressive(model, [1], tokens=20, **{**OPTIONS, "seed": seed})

        first = sample(3)
        torch.manual_seed(99)
        assert sample(3) == first
        assert sample(4) != first
        assert not set(first[1:]) & set(SPECIAL)

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_draws_follow_the_probabilities(self, model: DualLM, temperature: float):
        draws = 400
        found = Counter(
            sample_autoregressive(
                model, [1, 9], tokens=1, temperature=temperature, **{**OPTIONS, "seed": seed}
            )[-1]
            for seed in range(draws)
        )
        expected = (logits_of(model, [1, 9], "causal")[-1] / temperature).softmax(-1)
        counts = torch.tensor([found[token] for token in range(VOCABULARY)]) / draws
        # Half the sum of differences: about 0.06 for 400 draws of some ten likely tokens.
        assert float((counts - expected).abs().sum() / 2) < 0.12
        uniform = torch.full((VOCABULARY,), 1 / VOCABULARY)
        assert float((expected - uniform).abs().sum() / 2) > 0.2

    def drawn(self, model: DualLM, **options: object) -> set[int]:
        return {
            sample_autoregressive(
                model, [1, 9], tokens=1, temperature=2.0, **{**OPTIONS, "seed": seed}, **options
            )[-1]
            for seed in range(150)
        }

    def test_top_k_draws_from_the_k_likeliest(self, model: DualLM):
        likeliest = logits_of(model, [1, 9], "causal")[-1].topk(3).indices.tolist()
        assert self.drawn(model, top_k=3) == set(likeliest)
        assert self.drawn(model, top_k=1) == {likeliest[0]}

    def test_top_p_draws_from_the_smallest_set_that_reaches_p(self, model: DualLM):
        probabilities = (logits_of(model, [1, 9], "causal")[-1] / 2.0).softmax(-1)
        order = probabilities.argsort(descending=True).tolist()
        share, kept = 0.0, set()
        for token in order:
            if share >= 0.5:
                break
            kept.add(token)
            share += float(probabilities[token])
        assert 2 <= len(kept) <= 12
        assert self.drawn(model, top_p=0.5) == kept
        assert self.drawn(model, top_p=1e-9) == {order[0]}

    def test_no_token_beyond_the_vocabulary(self, model: DualLM):
        found = sample_autoregressive(
            model, [1], tokens=30, temperature=5.0, vocab_size=8, **OPTIONS
        )
        assert set(found[1:]) == {5, 6, 7}

    def test_it_stops_at_a_stop_token_and_leaves_it_out(self, model: DualLM):
        free = sample_autoregressive(model, [1, 7], tokens=12, temperature=0, **OPTIONS)
        stop = free[6]
        stopped = sample_autoregressive(
            model, [1, 7], tokens=12, temperature=0, stop_ids=(stop,), **OPTIONS
        )
        assert stopped == free[: free.index(stop, 2)]

    def test_a_stop_token_may_be_special(self, model: DualLM):
        def eager(input_ids: Tensor, *, attention: object, selection: Tensor):
            logits = torch.zeros(len(selection), VOCABULARY)
            logits[:, 1] = 5.0
            return SimpleNamespace(logits=logits)

        options = {**OPTIONS, "temperature": 0, "tokens": 5}
        assert sample_autoregressive(eager, [1, 7], stop_ids=(1,), **options) == [1, 7]
        assert sample_autoregressive(eager, [1, 7], **options) == [1, 7, *[5] * 5]

    def test_every_rank_makes_all_passes(self, model: DualLM, monkeypatch):
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
        passes = []

        def eager(input_ids: Tensor, *, attention: object, selection: Tensor):
            passes.append(1)
            return SimpleNamespace(logits=torch.eye(VOCABULARY)[[7 + len(passes)]])

        options = {**OPTIONS, "temperature": 0, "tokens": 5}
        assert sample_autoregressive(eager, [1], stop_ids=(9,), **options) == [1, 8]
        assert len(passes) == 5

    @pytest.mark.parametrize("prompt", [[], [5] * 33])
    def test_a_prompt_that_does_not_fit_is_refused(self, model: DualLM, prompt: list[int]):
        with pytest.raises(UserError, match="prompt: (0|33) tokens — expected 1 to 32"):
            sample_autoregressive(model, prompt, tokens=1, **OPTIONS)

    def test_the_model_goes_back_to_training(self, model: DualLM):
        model.train()
        sample_autoregressive(model, [1], tokens=1, **OPTIONS)
        assert model.training and torch.is_grad_enabled()
        model.eval()


ROW = [1, 8, MASK, MASK, 11, MASK, 9, MASK, MASK, MASK, 13, MASK]
MASKED = [position for position, token in enumerate(ROW) if token == MASK]
INFILL = {**OPTIONS, "mask_id": MASK}


class TestInfill:
    def test_it_fills_the_masks_and_nothing_else(self, model: DualLM):
        for steps in (1, 2, 3, 7, 99, None):
            filled = infill(model, ROW, steps=steps, **INFILL)
            assert len(filled) == len(ROW)
            for position, token in enumerate(ROW):
                assert filled[position] == token or position in MASKED
            assert not {filled[position] for position in MASKED} & set(SPECIAL)

    @pytest.mark.parametrize("target", ["next", "in_place"])
    @pytest.mark.parametrize("steps", [1, 3, 7])
    def test_greedy_by_confidence_is_the_plain_loop(self, model: DualLM, target: str, steps: int):
        row = list(ROW)
        shift = 1 if target == "next" else 0
        for left in range(steps, 0, -1):
            probabilities = logits_of(model, row, "full").softmax(-1)
            open_positions = [p for p, token in enumerate(row) if token == MASK]
            best = sorted(open_positions, key=lambda p: -float(probabilities[p - shift].max()))
            for p in best[: -(-len(open_positions) // left)]:
                row[p] = int(probabilities[p - shift].argmax())
        found = infill(model, ROW, steps=steps, temperature=0, target=target, **INFILL)
        assert found == row

    @pytest.mark.parametrize(
        ("steps", "left"),
        [(1, [7]), (3, [7, 4, 2]), (7, [7, 6, 5, 4, 3, 2, 1]), (99, range(7, 0, -1))],
    )
    def test_steps_share_the_masks(self, model: DualLM, steps: int, left: list[int]):
        seen = []

        def watched(input_ids: Tensor, **options: object):
            seen.append(int((input_ids == MASK).sum()))
            return model(input_ids, **options)

        infill(watched, ROW, steps=steps, **INFILL)
        assert seen == list(left)

    def order_of(self, order: str, scores: dict[int, float], seed: int = 0) -> list[int]:
        """In which order a model as sure of each position as given has its masks filled."""
        row = [1, *[MASK] * len(scores), 9]
        filled: list[int] = []

        def crafted(input_ids: Tensor, *, attention: object, selection: Tensor):
            open_positions = (input_ids[0] == MASK).nonzero()[:, 0].tolist()
            assert (selection + 1).tolist() == open_positions
            filled.extend(p for p in scores if p not in open_positions and p not in filled)
            logits = torch.zeros(len(selection), VOCABULARY)
            logits[:, 20] = torch.tensor([scores[p] for p in open_positions])
            return SimpleNamespace(logits=logits)

        options = {**INFILL, "seed": seed, "temperature": 0}
        result = infill(crafted, row, order=order, **options)
        assert result == [1, *[20] * len(scores), 9]
        return filled + [p for p in scores if p not in filled]

    def test_the_surest_first(self):
        scores = {1: 2.0, 2: 5.0, 3: 1.0, 4: 3.0, 5: 4.0}
        assert self.order_of("confidence", scores) == [2, 5, 4, 1, 3]

    def test_of_equals_the_leftmost_first(self):
        assert self.order_of("confidence", dict.fromkeys(range(1, 6), 1.0)) == [1, 2, 3, 4, 5]

    def test_left_to_right(self):
        scores = {1: 2.0, 2: 5.0, 3: 1.0, 4: 3.0, 5: 4.0}
        assert self.order_of("left_to_right", scores) == [1, 2, 3, 4, 5]

    def test_random_order_is_the_seeds(self):
        scores = dict.fromkeys(range(1, 6), 1.0)
        orders = [tuple(self.order_of("random", scores, seed)) for seed in (0, 0, 1, 2, 3)]
        assert orders[0] == orders[1]
        assert len(set(orders)) > 2

    def test_the_seed_decides(self, model: DualLM):
        first = infill(model, ROW, **INFILL)
        torch.manual_seed(99)
        assert infill(model, ROW, **INFILL) == first
        assert infill(model, ROW, **{**INFILL, "seed": 1}) != first

    def test_nothing_to_fill(self, model: DualLM):
        assert infill(model, [1, 8, 9], **INFILL) == [1, 8, 9]

    @pytest.mark.parametrize(
        ("row", "options", "message"),
        [
            ([MASK, 8], {}, "the first token is masked"),
            ([1] * 33, {}, "33 tokens with the gaps — expected at most 32"),
            ([1, MASK], {"steps": 0}, "0 steps"),
        ],
    )
    def test_what_cannot_be_filled_is_refused(self, model, row, options, message):
        with pytest.raises(UserError, match=message):
            infill(model, row, **INFILL, **options)

    def test_in_place_reads_a_first_mask_where_it_is(self, model: DualLM):
        row = [MASK, 8, 9]
        expected = int(logits_of(model, row, "full")[0].argmax())
        found = infill(model, row, temperature=0, target="in_place", **INFILL)
        assert found == [expected, 8, 9]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level BPE: tokens carry the space before their word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["The cat sat on the mat. " * 20], trainer)
    return tokenizer


class TestGaps:
    def parse(self, text: str, tokenizer: Tokenizer) -> list[int]:
        return parse_gaps(text, tokenizer, bos_id=1, mask_id=MASK)

    def encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("The <mask:8> sat", ["The", 8, " sat"]),
            ("<mask:2> sat", [2, " sat"]),
            ("The <mask>", ["The", 1]),
            ("The<mask:2>mat", ["The", 2, "mat"]),
            ("<mask:1><mask:2>", [3]),
            ("The  <mask:1> \n sat <mask:12>.", ["The ", 1, " \n sat", 12, "."]),
            ("a <masked> cat <mask:1>", ["a <masked> cat", 1]),
        ],
    )
    def test_gaps_become_masks(self, tokenizer: Tokenizer, text: str, parts: list[str | int]):
        expected = [1]
        for part in parts:
            expected += [MASK] * part if isinstance(part, int) else self.encode(part, tokenizer)
        assert self.parse(text, tokenizer) == expected

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("The cat", "no gap in 'The cat'"),
            ("", "no gap in ''"),
            ("The <mask:0> sat", "empty gap '<mask:0>'"),
            ("The <mask:x> sat", "malformed gap '<mask:x> sat'"),
            ("The <mask:-1>", "malformed gap"),
            ("The <mask: 3>", "malformed gap"),
            ("The <mask:3 sat", "malformed gap"),
            ("The <mask:3> sat <mask", "malformed gap '<mask'"),
            ("The <mask:99999999999>", "malformed gap"),
        ],
    )
    def test_bad_gaps_are_named(self, tokenizer: Tokenizer, text: str, message: str):
        with pytest.raises(UserError, match=f"infill: {message}.* — expected <mask:N>"):
            self.parse(text, tokenizer)

    def test_prompts_begin_with_bos(self, tokenizer: Tokenizer):
        assert encode_prompt("", tokenizer, bos_id=1) == [1]
        expected = [1, *self.encode("The cat", tokenizer)]
        assert encode_prompt("The cat", tokenizer, bos_id=1) == expected

    def test_filled_gaps_are_told_apart(self, tokenizer: Tokenizer):
        before = self.parse("The <mask:1> sat on <mask:2>.", tokenizer)
        fillings = iter(self.encode(" cat", tokenizer) + self.encode(" the", tokenizer) * 2)
        after = [next(fillings) if token == MASK else token for token in before]
        assert infilled_pieces(before, after, tokenizer, mask_id=MASK) == (
            ("The", False),
            (" cat", True),
            (" sat on", False),
            (" the the", True),
            (".", False),
        )

    def test_end_to_end(self, tokenizer: Tokenizer):
        config = DualConfig(
            tokenizer.get_vocab_size() + 20, width=16, layers=1, heads=2, mlp_width=8
        )
        row = self.parse("The <mask:3> sat on the <mask:1>.", tokenizer)
        filled = infill(
            DualLM(config),
            row,
            **{**INFILL, "context": 64},
            vocab_size=tokenizer.get_vocab_size(),
        )
        pieces = infilled_pieces(row, filled, tokenizer, mask_id=MASK)
        text = "".join(text for text, _ in pieces)
        assert text.startswith("The") and text.endswith(".") and " sat on the" in text
        assert max(filled) < tokenizer.get_vocab_size()
