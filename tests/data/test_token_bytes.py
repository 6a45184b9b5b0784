"""Tests of: dualtrain.data.token_bytes: those of a text's tokens add up to the text's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from data_tools.tokenizers.tokenizer import Tokenizer
from dualtrain.data.token_bytes import token_bytes

TEXTS = [
    "The function returns a list of names, or raises an error if there is none.",
    "def walk(tree):\n    for node in tree:\n        yield from walk(node)\n\n\n",
    "Größe, naïve, Ærø: €5 — 日本語のテキスト, 😀👩‍🚀.",
    "lists  of   words\tand\r\ntabs",
]
UNSEEN = ["Ω ≠ ж 🦉", "x" * 9, "", " ", "unbelievable listings, rewalked"]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer.train(TEXTS, 330)


def measure(tokenizer: tokenizers.Tokenizer, folder: Path) -> np.ndarray:
    """The bytes of all tokens of a tokenizer, whose special tokens stand for no text."""
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    added = tokenizer.get_added_tokens_decoder()
    return token_bytes(file, [token for token, about in added.items() if about.special])


def assert_adds_up(tokenizer: tokenizers.Tokenizer, sizes: np.ndarray, text: str, more: int = 0):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text  # else there is no right answer
    assert sizes[ids].sum() == len(text.encode()) + (more if ids else 0), ids


def test_byte_level_tokens_are_exact(byte_level: Tokenizer, tmp_path: Path):
    byte_level.save(tmp_path / "tokenizer.json")
    sizes = token_bytes(tmp_path / "tokenizer.json", byte_level.special_ids)
    assert sizes.shape == (byte_level.vocab_size,) and sizes.dtype == np.int64
    assert (sizes[list(byte_level.special_ids)] == 0).all()
    assert sizes.max() > 4 and (np.delete(sizes, byte_level.special_ids) > 0).all()

    @settings(max_examples=60, deadline=None)
    @given(st.one_of(st.text(), st.sampled_from(TEXTS + UNSEEN)))
    def check(text: str) -> None:
        ids = byte_level.encode(text)
        assert sizes[ids].sum() == len(text.encode())
        # Not only in sum: what stands before any place in the text.
        for end in range(len(ids)):
            before = byte_level.decode(ids[:end])
            if "\ufffd" not in before:  # a character cut in the middle
                assert sizes[ids[:end]].sum() == len(before.encode())

    check()


def test_added_tokens_of_a_byte_level_tokenizer_are_written_as_they_are(
    byte_level: Tokenizer, tmp_path: Path
):
    tokenizer = tokenizers.Tokenizer.from_str(byte_level.json)
    tokenizer.add_tokens([AddedToken("日本", normalized=False), AddedToken("      ")])
    sizes = measure(tokenizer, tmp_path)
    assert sizes[tokenizer.token_to_id("日本")] == 6
    assert sizes[tokenizer.token_to_id("      ")] == 6
    for text in (*TEXTS, "of 日本      a"):
        assert_adds_up(tokenizer, sizes, text)


def test_ids_without_a_token_count_nothing(tmp_path: Path):
    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters["Ġ"], letters["z"] = 300, 310
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sizes = measure(tokenizer, tmp_path)
    assert len(sizes) == 311
    assert sizes.sum() == 256 and sizes[301] == 0
    assert_adds_up(tokenizer, sizes, "Größe of zzz")


def metaspace(scheme: str) -> tokenizers.Tokenizer:
    """Unigram over ▁ for spaces, as SentencePiece has it."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return tokenizer


@pytest.mark.parametrize(("scheme", "more"), [("never", 0), ("always", 1)])
def test_a_unigram_tokenizer_with_its_spaces(scheme: str, more: int, tmp_path: Path):
    tokenizer = metaspace(scheme)
    sizes = measure(tokenizer, tmp_path)
    assert sizes[tokenizer.token_to_id("<unk>")] == 0
    for text in TEXTS:
        # The space put before a text is a byte that the text does not have.
        assert_adds_up(tokenizer, sizes, text, more)


@pytest.mark.parametrize("text", [*TEXTS, *UNSEEN])
def test_bytes_of_characters_without_a_token(text: str, tmp_path: Path):
    """As Llama 2's tokenizer: ▁ for spaces, and <0x0A> for a byte of what has no token."""
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters += ["▁", *"abcdefghijklmnopqrstuvwxyzT.,"]
    merges = [("▁", "o"), ("▁o", "f"), ("l", "i"), ("s", "t"), ("li", "st"), ("▁", "list")]
    letters += [one + other for one, other in merges]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={letter: n for n, letter in enumerate(letters)},
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    sizes = measure(tokenizer, tmp_path)
    assert sizes[letters.index("<0x0A>")] == 1 and sizes[letters.index("▁of")] == 3
    assert_adds_up(tokenizer, sizes, text, more=1)


def test_word_pieces_bring_the_space_before_a_word(tmp_path: Path):
    pieces = ["[UNK]", "list", "##ing", "##s", "of", "na", "##ï", "##ve", "word"]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece(vocab={piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]"])
    sizes = measure(tokenizer, tmp_path)
    assert sizes.tolist() == [0, 5, 3, 1, 3, 3, 2, 2, 5]
    for text in ("listings of naïve words", "word", "lists of listings"):
        # No space before the first word.
        assert_adds_up(tokenizer, sizes, text, more=1)
