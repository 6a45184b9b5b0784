"""Tests of: dualtrain.export.modeling_dualtrain: the classes that evaluations of the field load."""

import pytest
import torch
from helpers.models import padded
from transformers import AutoTokenizer

from dualtrain.evaluate.request import encode_pair
from dualtrain.evaluate.scoring import Scorer
from dualtrain.export.modeling_dualtrain import (
    DualTrainForMaskedLM,
    DualTrainForSequenceClassification,
    DualTrainModel,
)
from dualtrain.model.handle import ModelHandle

IDS = torch.randint(16, 500, (2, 24), generator=torch.Generator().manual_seed(1))
ROWS = [IDS[0, :5], IDS[1, :9], IDS[0, :2]]


@pytest.fixture(scope="module")
def opened(cases):
    """Every class of both heads, by head and class."""
    classes = (DualTrainForMaskedLM, DualTrainForSequenceClassification, DualTrainModel)
    return {
        (head, kind): kind.from_pretrained(cases[head].directory).eval()
        for head in ("paper", "linear")
        for kind in classes
    }


def of(opened, case, kind):
    return opened[case.trained.model.config.head, kind]


def natural(case):
    """Where the logits of a token are without being asked for elsewhere: 1 before it, or at it."""
    return 1 if case.trained.target == "next" else 0


@torch.no_grad()
def test_masked_logits_are_those_of_full_attention(case, opened):
    model = of(opened, case, DualTrainForMaskedLM)
    for side in ("left", "right"):
        ids, mask = padded(ROWS, side=side)
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        assert len(output.hidden_states) == 3 and output.loss is None
        for row, seen, got in zip(ROWS, mask, output.logits, strict=True):
            assert (got[seen == 1] - case.logits(row[None], "full")[0]).abs().max() < 1e-5
    (as_tuple,) = model(ids, mask, return_dict=False)
    assert torch.equal(as_tuple, output["logits"])


@torch.no_grad()
def test_masked_logits_where_they_are_asked_for(case, opened):
    usual = of(opened, case, DualTrainForMaskedLM)(IDS).logits
    for wanted, offset in {"next": 1, "in_place": 0}.items():
        model = DualTrainForMaskedLM.from_pretrained(case.directory, masked_logits=wanted).eval()
        got, shift = model(IDS).logits, natural(case) - offset
        assert got.shape == usual.shape
        inner = slice(max(shift, 0), 24 + min(shift, 0))
        assert torch.equal(got[:, inner], usual.roll(shift, 1)[:, inner])
        if shift:  # nothing predicts the token at one end
            assert not got[:, 0 if shift > 0 else -1].any()
        labels = torch.full_like(IDS, -100)
        labels[:, [5, 9]] = IDS[:, [5, 9]]
        expected = torch.nn.functional.cross_entropy(
            usual[:, torch.tensor([5, 9]) - natural(case)].flatten(0, 1),
            IDS[:, [5, 9]].flatten(),
        )
        assert torch.allclose(model(IDS, labels=labels).loss, expected)
    with pytest.raises(ValueError, match="masked_logits: 'here', expected next or in_place"):
        DualTrainForMaskedLM.from_pretrained(case.directory, masked_logits="here")


def test_scores_of_sentences_are_those_of_pll(cases, opened):
    """As the `mntp` backend of the BabyLM pipeline computes them, from offsets and masks."""
    case, model = cases["paper"], opened["paper", DualTrainForMaskedLM]
    tokenizer = AutoTokenizer.from_pretrained(
        case.directory, padding_side="right", trust_remote_code=False
    )
    trained = case.trained
    handle = ModelHandle(
        model=trained.model, context=trained.context, vocabulary=trained.vocabulary
    )
    own_tokenizer = trained.tokenizer
    for sentence, completion in {
        "The list was returned.": "The list was returned.",
        "A café of its own": " of its own",
        "naïve “values” and ☃": " ☃",
    }.items():
        prompt = sentence.removesuffix(completion)
        encoded = tokenizer(text=sentence, return_offsets_mapping=True)
        tokens = torch.tensor(encoded["input_ids"])
        where = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)]
        rows = tokens.repeat(len(where), 1)
        rows[range(len(where)), where] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = model(input_ids=rows, attention_mask=torch.ones_like(rows))["logits"]
        read = logits[range(len(where)), [i - 1 for i in where]].log_softmax(-1)
        score = float(read.gather(-1, tokens[where][:, None]).sum())
        request = encode_pair(own_tokenizer, prompt, completion, bos_id=tokenizer.bos_token_id)
        (own,) = Scorer(handle).score([request], "pll")
        assert abs(score - own.log_likelihood) < 1e-4


@torch.no_grad()
def test_hidden_states(case, opened):
    model = of(opened, case, DualTrainModel)
    head = of(opened, case, DualTrainForMaskedLM)
    assert model.config.hidden_size == model(IDS).last_hidden_state.shape[-1]
    states = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(head.head(states[-1]), head(IDS).logits)
    assert torch.equal(model.norm(states[-1]), model(IDS)[0])
    model.config.output_hidden_states = True
    assert len(model(IDS, return_dict=False)) == 2
    model.config.output_hidden_states = False


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_of_pairs(case, opened, side):
    """Fine-tuning scripts make attention causal so: of each row of padding, a triangle."""
    model = of(opened, case, DualTrainModel)
    ids, mask = padded(ROWS, side=side)
    pairs = mask[:, None].repeat(1, ids.shape[1], 1).tril()
    own = model(ids, mask, attention="causal").last_hidden_state
    assert (own - model(ids, pairs).last_hidden_state)[mask == 1].abs().max() < 1e-5
    prefix = {"attention": "prefix", "prefix_lengths": torch.tensor([3, 5, 1])}
    whole = mask[:, None].repeat(1, ids.shape[1], 1)
    again = model(ids, whole, **prefix).last_hidden_state
    own = model(ids, mask, **prefix).last_hidden_state
    assert (own - again)[mask == 1].abs().max() < 1e-5
    with pytest.raises(ValueError, match="attention_mask of shape"):
        model(ids, pairs[:, :, :-1])


def test_a_classifier_reads_the_first_token_of_whole_rows(case, opened):
    model = of(opened, case, DualTrainForSequenceClassification)
    states = of(opened, case, DualTrainModel)
    ids, mask = padded(ROWS)
    other, right = padded(ROWS, side="right")
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        expected = model.classifier(states(other, right).last_hidden_state[:, 0])
    assert logits.shape == (3, 2)
    assert (logits - expected).abs().max() < 1e-5
    # The last token of a row decides, too.
    changed = ids.clone()
    changed[:, -1] = 77
    assert (model(changed, attention_mask=mask).logits - logits).abs().min() > 0


def test_a_classifier_learns(cases):
    torch.manual_seed(0)
    model = DualTrainForSequenceClassification.from_pretrained(
        cases["paper"].directory, num_labels=3, classifier_dropout=0.0
    )
    labels = torch.tensor([0, 2, 1])
    ids, mask = padded(ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        output = model(ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.1 < 0.5 < losses[0]
    assert output.logits.argmax(-1).tolist() == labels.tolist()


def test_pairs_of_texts_are_parted(case):
    tokenizer = AutoTokenizer.from_pretrained(case.directory, trust_remote_code=False)
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a b", "c"))
    pair = tokenizer([("a b", "c")])["input_ids"][0]
    assert pair == [tokenizer.bos_token_id, *one, tokenizer.eos_token_id, *two]
