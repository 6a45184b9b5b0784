"""Tests of: dualtrain.generate.prompts, .decode.

Gaps in texts become masks, and ids become text piece by piece.
"""

import pytest
from helpers.texts import MASK
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from dualtrain.common.errors import UserError
from dualtrain.generate.decode import TextStream, label_pieces
from dualtrain.generate.prompts import encode_prompt, has_gap, parse_gaps


def parse(text, tokenizer):
    return parse_gaps(text, tokenizer, bos_id=1, mask_id=MASK)


def encode(text, tokenizer):
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
def test_gaps_become_masks(tokenizer, text, parts):
    expected = [1]
    for part in parts:
        expected += [MASK] * part if isinstance(part, int) else encode(part, tokenizer)
    assert has_gap(text)
    assert parse(text, tokenizer) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("The cat", "no gap in 'The cat'"),
        ("", "no gap in ''"),
        ("The <mask:0> sat", "'<mask:0>' is no gap"),
        ("The <mask:x> sat", "'<mask:x>' is no gap"),
        ("The <mask:-1>", "'<mask:-1>' is no gap"),
        ("The <mask: 3>", "'<mask: 3>' is no gap"),
        ("The <mask:3 sat", "'<mask:3 sat' is no gap"),
        ("The <mask:3> sat <mask", "'<mask' is no gap"),
        ("The <mask:99999999999>", "'<mask:99999999999>' is no gap"),
    ],
)
def test_bad_gaps_are_named(tokenizer, text, message):
    assert has_gap(text) == ("<mask" in text)
    with pytest.raises(UserError, match=f"infill: {message}.* — expected a whole number from 1"):
        parse(text, tokenizer)


def test_prompts_begin_with_bos(tokenizer):
    assert encode_prompt("", tokenizer, bos_id=1) == [1]
    assert encode_prompt("The cat", tokenizer, bos_id=1) == [1, *encode("The cat", tokenizer)]


def spaced_tokenizer(kind: str) -> Tokenizer:
    """One that puts a space before every text: as RoBERTa's, or as Llama's."""
    space = "\u0120" if kind == "roberta" else "\u2581"
    line = "\u010a" if kind == "roberta" else "\n"
    words = ["<unk>", "<s>", "</s>", "<pad>", "<mask>", *"catsmThe.", space, line]
    merges = [(space, "T"), (space, "s"), (space + "s", "a"), (space + "sa", "t")]
    words += ["".join(pair) for pair in merges]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    if kind == "roberta":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("kind", ["roberta", "llama"])
def test_no_space_comes_behind_a_gap(kind):
    tokenizer = spaced_tokenizer(kind)
    ids = parse("The<mask:2>mat sat<mask> sat", tokenizer)
    tokens = [tokenizer.id_to_token(token) for token in ids]
    space = tokens[1][0]
    assert tokens == [
        *["<s>", space + "T", "h", "e", "<mask>", "<mask>"],
        *["m", "a", "t", space + "sat", "<mask>", space + "sat"],
    ]


def test_pieces_of_a_tokenizer_that_drops_the_first_space():
    tokenizer = spaced_tokenizer("llama")
    ids = encode("The sat sat", tokenizer)
    pieces = label_pieces(ids, [0, 0, 0, 1, 1], tokenizer)
    assert [(piece.text, piece.tokens) for piece in pieces] == [("The", 3), (" sat sat", 2)]


def test_filled_gaps_are_told_apart(tokenizer):
    before = parse("The <mask:1> sat on <mask:2>.", tokenizer)
    fillings = iter(encode(" cat", tokenizer) + encode(" the", tokenizer) * 2)
    after = [next(fillings) if token == MASK else token for token in before]
    pieces = label_pieces(after, [token == MASK for token in before], tokenizer)
    assert [(piece.text, piece.label) for piece in pieces] == [
        ("The", False),
        (" cat", True),
        (" sat on", False),
        (" the the", True),
        (".", False),
    ]


def test_a_character_is_shown_when_it_is_whole(tokenizer):
    ids = encode("a\u20acb\U0001f600", tokenizer)
    stream = TextStream(tokenizer)
    assert [stream.add([token]) for token in ids] == [
        *["a", "", "", "\u20ac"],
        *["b", "", "", "", "\U0001f600"],
    ]
    assert stream.rest() == ""
    stream.add(ids[:3])
    assert stream.rest() == "\ufffd"


@given(st.lists(st.integers(0, 299), max_size=30), st.lists(st.integers(0, 2), min_size=30))
def test_pieces_add_up_to_the_text(tokenizer, ids, labels):
    """Any tokens at all, broken characters and special tokens among them."""
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    stream = TextStream(tokenizer)
    assert "".join([stream.add([token]) for token in ids]) + stream.rest() == whole
    pieces = label_pieces(ids, labels[: len(ids)], tokenizer)
    assert "".join(piece.text for piece in pieces) == whole
    assert sum(piece.tokens for piece in pieces) == len(ids)
