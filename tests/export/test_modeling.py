"""Tests of: dualtrain.export.modeling_dualtrain: it computes what the trained model does."""

import numpy as np
import pytest
import torch
from helpers.models import padded
from transformers import DynamicCache

from dualtrain.checkpoint.trained import open_trained
from dualtrain.export.modeling_dualtrain import DualTrainForCausalLM
from dualtrain.generate.autoregressive import continue_prompts
from dualtrain.generate.diffusion import fill_masks
from dualtrain.generate.settings import Settings

IDS = torch.randint(16, 500, (2, 24), generator=torch.Generator().manual_seed(1))
MASK = 4


@pytest.fixture(scope="module")
def models(cases):
    return {
        head: DualTrainForCausalLM.from_pretrained(case.directory).eval()
        for head, case in cases.items()
    }


@pytest.fixture
def model(models, case):
    return models[case.trained.model.config.head]


def test_logits_are_equal_in_every_mode_and_length(case, model):
    for length in (1, 2, 7, 24):
        ids = IDS[:, :length]
        prefix = torch.tensor([length // 2] * 2)
        with torch.no_grad():
            got = {
                "causal": model(ids).logits,
                "full": model(ids, attention="full").logits,
                "prefix": model(ids, prefix_lengths=prefix).logits,
            }
        for kind, logits in got.items():
            own = case.logits(ids, kind, length // 2 if kind == "prefix" else None)
            assert (logits - own).abs().max() < 1e-5
    # The modes are not the same thing by chance.
    assert (got["causal"] - got["full"]).abs().max() > 1e-3
    assert (got["causal"] - got["prefix"]).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(case, model, side):
    rows = [IDS[0, :5], IDS[1, :9], IDS[0, :2]]
    ids, mask = padded(rows, side=side)
    lengths = torch.tensor([3, 5, 1])
    for kind, options in {
        "causal": {},
        "full": {"attention": "full"},
        "prefix": {"attention": "prefix", "prefix_lengths": lengths},
    }.items():
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, **options).logits
        for row, seen, got, prefix in zip(rows, mask, logits, lengths, strict=True):
            own = case.logits(row[None], kind, int(prefix) if kind == "prefix" else None)
            assert (got[seen == 1] - own[0]).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["generate", "generate_prefix"])
def test_greedy_texts_are_the_whole_rows_likeliest_tokens(case, model, mode):
    rows = [IDS[0, :5], IDS[1, :9]]
    ids, mask = padded(rows)
    never = model.generation_config.suppress_tokens
    assert {0, MASK, 15} <= set(never) and not {1, 2} & set(never)
    texts = getattr(model, mode)(ids, attention_mask=mask, max_new_tokens=10)
    without = getattr(model, mode)(ids, attention_mask=mask, max_new_tokens=10, use_cache=False)
    assert torch.equal(texts, without)
    for row, text in zip(rows, texts, strict=True):
        expected = row
        for _ in range(10):
            prefix = len(row) if mode == "generate_prefix" else None
            last = case.logits(expected[None], "prefix" if prefix else "causal", prefix)[0, -1]
            last[never] = -torch.inf
            expected = torch.cat([expected, last.argmax()[None]])
            if int(last.argmax()) in (1, 2):
                break
        begin = ids.shape[1] - len(row)
        assert torch.equal(text[begin : begin + len(expected)], expected)


def test_greedy_texts_are_dualtrains_own(case, model):
    rows = [IDS[0, :5], IDS[1, :9]]
    ids, mask = padded(rows)
    for method, mode in {"generate": "ar", "generate_prefix": "prefix"}.items():
        texts = getattr(model, method)(ids, attention_mask=mask, max_new_tokens=12)
        own = continue_prompts(
            case.trained,
            [row.tolist() for row in rows],
            Settings(mode=mode, tokens=12, temperature=0),
            generators=[np.random.default_rng(0)] * 2,
        )
        for text, continuation in zip(texts[:, 9:].tolist(), own, strict=True):
            assert text[: len(continuation.ids)] == list(continuation.ids)
            ended = text[len(continuation.ids) :][:1]
            assert ended == [] if continuation.stop == "tokens" else ended[0] in (1, 2)


def test_pieces_of_a_row_through_the_cache(model):
    """A prompt in two pieces, then tokens: what chats and assisted decoding do."""
    cache = DynamicCache()
    with torch.no_grad():
        whole = model(IDS).logits
        pieces = [
            model(piece, past_key_values=cache, use_cache=True).logits
            for piece in (IDS[:, :10], IDS[:, 10:20], IDS[:, 20:21], IDS[:, 21:])
        ]
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-5


def test_several_texts_and_beams_of_a_prefix(model):
    ids, mask = padded([IDS[0, :5], IDS[1, :9]])
    torch.manual_seed(0)
    texts = model.generate_prefix(
        ids, attention_mask=mask, max_new_tokens=4, num_return_sequences=3, do_sample=True
    )
    assert texts.shape == (6, 13) and len({tuple(text.tolist()) for text in texts}) > 2
    beams = model.generate_prefix(ids, attention_mask=mask, max_new_tokens=4, num_beams=2)
    assert beams.shape[0] == 2


@pytest.mark.parametrize("order", ["confidence", "left_to_right"])
def test_infilling_is_dualtrains_own(case, model, order):
    ids = IDS[:1].clone()
    ids[0, [3, 4, 5, 11, 12, 20, 23]] = MASK
    for steps, block in [(None, None), (2, None), (None, 3), (5, 3), (3, 3), (40, 1)]:
        (own,) = fill_masks(
            case.trained,
            ids.tolist(),
            Settings(steps=steps, order=order, block=block, temperature=0),
            generators=[np.random.default_rng(0)],
        )
        got = model.infill(ids, steps=steps, block_length=block, order=order, temperature=0)
        assert got[0].tolist() == own


def test_rows_of_a_batch_are_infilled_as_alone(model):
    rows = [IDS[0, :9].clone(), IDS[1, :14].clone(), IDS[0, :4]]
    rows[0][[2, 3, 7]] = MASK
    rows[1][[1, 5, 6, 9, 10, 13]] = MASK
    ids, mask = padded(rows)
    together = model.infill(ids, mask, steps=4, temperature=0)
    assert not (together == MASK).any()
    for row, filled, seen in zip(rows, together, mask, strict=True):
        alone = model.infill(row[None], steps=4, temperature=0)[0]
        assert torch.equal(filled[seen == 1], alone)
        assert torch.equal(alone[row != MASK], row[row != MASK])


def test_diffusion_continues_prompts(model):
    ids, mask = padded([IDS[0, :5], IDS[1, :9]])
    masks = torch.full((2, 7), MASK)
    text = model.generate_diffusion(ids, mask, max_new_tokens=7, block_length=3, temperature=0)
    gap, seen = torch.cat([ids, masks], 1), torch.cat([mask, torch.ones_like(masks)], 1)
    assert torch.equal(text, model.infill(gap, seen, block_length=3, temperature=0))
    assert torch.equal(text[:, :9], ids) and (text[:, 9:] >= 16).all()
    draw = torch.Generator()
    drawn = [
        model.generate_diffusion(
            ids, mask, max_new_tokens=7, steps=2, order="random", generator=draw.manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_the_loss_of_labels(case, model):
    """Labels are where their tokens are, whichever position predicts them."""
    with torch.no_grad():
        loss = model(IDS, labels=IDS).loss
        nll = case.logits(IDS)[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])
        assert abs(float(loss + nll.mean())) < 1e-5
        masked = IDS.clone()
        masked[:, [5, 9]] = MASK
        labels = torch.full_like(IDS, -100)
        labels[:, [5, 9]] = IDS[:, [5, 9]]
        loss = model(masked, labels=labels, attention="full").loss
        reads = torch.tensor([5, 9]) - (1 if case.trained.target == "next" else 0)
        logits = case.logits(masked, "full")[:, reads].log_softmax(-1)
        assert abs(float(loss + logits.gather(-1, IDS[:, [5, 9], None]).mean())) < 1e-5


def test_gradients_reach_every_parameter(model):
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


def test_fewer_logits_and_more_states(model):
    with torch.no_grad():
        output = model(IDS, output_hidden_states=True)
        last = model(IDS, logits_to_keep=2)
        chosen = model(IDS, logits_to_keep=torch.tensor([0, 5]))
        embedded = model(inputs_embeds=model.get_input_embeddings()(IDS))
    assert len(output.hidden_states) == 3
    assert torch.equal(last.logits, output.logits[:, -2:])
    assert torch.equal(chosen.logits, output.logits[:, [0, 5]])
    assert torch.equal(embedded.logits, output.logits)


def test_the_vocabulary_can_be_enlarged(case):
    larger = DualTrainForCausalLM.from_pretrained(case.directory).eval()
    larger.resize_token_embeddings(520, mean_resizing=False)
    with torch.no_grad():
        logits = larger(IDS).logits
    assert logits.shape[-1] == 520 == larger.config.vocab_size
    assert (logits[..., :512] - case.logits(IDS)).abs().max() < 1e-5


def test_bf16_keeps_norms_and_angles_exact(case, model):
    half = DualTrainForCausalLM.from_pretrained(case.directory, torch_dtype=torch.bfloat16).eval()
    own = open_trained(case.directory, device="cpu").model.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(half(IDS).logits, own(IDS).logits)


def test_what_cannot_be(model):
    begins = torch.tensor([[MASK, 20]])
    cache = DynamicCache()
    model(IDS, past_key_values=cache)
    for match, call in {
        "unknown attention": lambda: model(IDS, attention="sideways"),
        "prefix_lengths belong": lambda: model(IDS, attention="prefix"),
        "to no other kind": lambda: model(
            IDS, attention="full", prefix_lengths=torch.tensor([1, 1])
        ),
        "no cache": lambda: model(IDS, attention="full", past_key_values=cache),
        "attention_mask of shape": lambda: model(IDS, attention_mask=torch.ones(2, 3)),
        "is needed": lambda: model(),
        "not returned": lambda: model(IDS, output_attentions=True),
        "are 1 or more": lambda: model.infill(IDS, steps=0),
        "2 steps for 3 blocks": lambda: model.infill(
            torch.tensor([[20, MASK, MASK, MASK]]), steps=2, block_length=1
        ),
        "unknown order": lambda: model.infill(torch.tensor([[20, MASK]]), order="backwards"),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    if model.config.diffusion_target == "next":
        with pytest.raises(ValueError, match="begins with a masked token"):
            model.infill(begins)
        mask = torch.tensor([[0, 1, 1]])
        with pytest.raises(ValueError, match="begins with a masked token"):
            model.infill(torch.tensor([[3, MASK, 20]]), mask)
    else:
        assert model.infill(begins)[0, 1] == 20
