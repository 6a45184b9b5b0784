"""Tests of: dualtrain.model.exported_tokenizer: ids around names of special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_tools.tokenizers.probes import probe_texts
from data_tools.tokenizers.tokenizer import Tokenizer
from dualtrain.generate.prompts import parse_gaps
from dualtrain.model.exported_tokenizer import ROLES, put_space_only_first, write_tokenizer

TEXTS = ["The cat sat on the mat.", "A dog, two cats and 13 mice?", "they sit  there\n and sat"]
WORD = "\u2581"


def bert() -> tokenizers.Tokenizer:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=names, show_progress=False, initial_alphabet=list("[]<>|s")
    )
    tokenizer.train_from_iterator(TEXTS * 9, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def t5(*normal_forms: normalizers.Normalizer) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    if normal_forms:
        tokenizer.normalizer = normalizers.Sequence(list(normal_forms))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=90,
        special_tokens=["<pad>", "</s>", "<unk>", "<extra_id_0>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 9, trainer)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def stripping_t5() -> tokenizers.Tokenizer:
    one_space = normalizers.Replace(Regex(r"\s+"), " ")
    return t5(normalizers.NFKC(), one_space, normalizers.Strip())


def llama_2() -> tokenizers.Tokenizer:
    """Its special tokens are found after the text has been normalized, in the file at least."""
    merges = [(WORD, "t"), ("a", "t"), ("s", "at"), (WORD, "sat"), (WORD, WORD), ("h", "e")]
    letters = sorted({*"".join(TEXTS), *"<>/|unkspadmask"} - {" ", "\n"})
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, WORD]
    words += ["".join(pair) for pair in merges]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=True) for name in words[:3]]
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(WORD), normalizers.Replace(" ", WORD)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(WORD, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def byte_level(*names: str, prefix_space: bool = False) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 9, trainer)
    tokenizer.add_special_tokens(
        # Some models' tokens take the space behind them, too.
        [tokenizers.AddedToken(name, special=True, rstrip=True) for name in names]
    )
    return tokenizer


KINDS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], str]] = {
    "bert": (bert, "."),
    "t5": (t5, "."),
    "stripping-t5": (stripping_t5, "."),
    "llama-2": (llama_2, "."),
    "gpt-2": (lambda: byte_level("<|endoftext|>"), ""),
    "llama-3": (lambda: byte_level("<|begin_of_text|>", "<|end_of_text|>"), ""),
    "roberta": (
        lambda: byte_level("<s>", "<pad>", "</s>", "<unk>", "<mask>", prefix_space=True),
        ".",
    ),
}
"""Tokenizers, and a text that does not grow together with what follows it."""


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """The original tokenizer, training's, and the export's as transformers opens it."""
    make, mark = KINDS[request.param]
    folder = tmp_path_factory.mktemp("tokenizer")
    original = make()
    original.save(str(folder / "original.json"))
    training = Tokenizer.load(folder / "original.json")
    training.save(folder / "tokenizer.json")
    (folder / "export").mkdir()
    write_tokenizer(
        folder / "tokenizer.json",
        folder / "export",
        special_tokens=training.special_tokens,
        context=64,
    )
    return original, mark, training, folder / "export"


def inside(text: str, original: tokenizers.Tokenizer, mark: str) -> list[int]:
    """Ids of a text behind another one, by the library and the file as it was given."""
    begin = original.encode(mark, add_special_tokens=False).ids
    ids = original.encode(mark + text, add_special_tokens=False).ids
    assert ids[: len(begin)] == begin
    return ids[len(begin) :]


def expected(text: str, original: tokenizers.Tokenizer, mark: str, training: Tokenizer):
    names = {training.decode([token]).strip(): token for token in training.special_tokens.values()}
    mask = training.decode([training.special_tokens["<mask>"]]).strip()
    ids = [training.special_tokens["<s>"]]
    pattern = "|".join([rf"\s*{re.escape(mask)}", *map(re.escape, names)])
    end = 0
    for found in [*re.finditer(pattern, text), None]:
        part = text[end : found.start() if found else None]
        if part:
            first = original.encode(part, add_special_tokens=False).ids
            ids += first if end == 0 else inside(part, original, mark)
        if found:
            ids.append(names[found.group().strip()])
            end = found.end()
    return ids


FORMS = ("{0}cat", "{0} cat", "The cat{0}", "The cat {0}", "The{0}cat", "The {0} cat sat", "{0}")
FORMS += ("The {0}{0} sat", "The {0} {0}sat{0}.", " {0}sat", "The{0}  cat", "{0}{0}")


def test_text_around_special_tokens(case):
    original, mark, training, directory = case
    by_path = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    exported = AutoTokenizer.from_pretrained(directory)
    names = {role: training.decode([token]) for role, token in training.special_tokens.items()}
    for role, name in names.items():
        for form in FORMS:
            text = form.format(name)
            wanted = expected(text, original, mark, training)
            assert exported(text)["input_ids"] == wanted, (role, text)
            assert by_path(text)["input_ids"] == wanted
    everything = f"The cat{names['<mask>']} sat{names['</s>']}{names['<s>']} on the"
    everything += f" mat {names['<unk>']}{names['<pad>']}."
    assert exported(everything)["input_ids"] == expected(everything, original, mark, training)


def test_gaps_of_a_prompt_are_masks_of_an_export(case):
    _, _, training, directory = case
    exported = AutoTokenizer.from_pretrained(directory)
    for form in (*FORMS, "The {0}\n cat"):
        gaps = parse_gaps(
            form.format("<mask>"),
            training._tokenizer,
            bos_id=training.special_tokens["<s>"],
            mask_id=training.special_tokens["<mask>"],
        )
        text = form.format(exported.mask_token)
        assert exported(text)["input_ids"] == gaps, text


def test_plain_text_is_as_in_training(case):
    original, _, training, directory = case
    exported = AutoTokenizer.from_pretrained(directory)
    begin = training.special_tokens["<s>"]
    texts = [text for text in probe_texts() if text] + [" ", "  a", "\n", "a ", WORD, f"{WORD}a b"]
    original.encode_special_tokens = True
    given = original.encode_batch(texts, add_special_tokens=False)
    original.encode_special_tokens = False
    ids = exported(texts, split_special_tokens=True)["input_ids"]
    assert ids == [[begin, *encoding.ids] for encoding in given]
    assert [encoding.ids for encoding in given] == [training.encode(text) for text in texts]


def test_roles_of_an_export_are_its_own_names(case):
    _, _, training, directory = case
    exported = AutoTokenizer.from_pretrained(directory)
    for key, role in ROLES.items():
        assert getattr(exported, f"{key}_id") == training.special_tokens[role]


def test_the_division_of_text_is_changed_once(case):
    _, _, training, directory = case
    content = json.loads(training.json)
    put_space_only_first(content)
    exported = json.loads((directory / "tokenizer.json").read_text())
    put_space_only_first(exported)
    for part in ("normalizer", "pre_tokenizer"):
        assert exported[part] == content[part]


def test_a_tokenizer_in_the_directory_of_an_export_keeps_its_roles(case):
    _, _, training, directory = case
    again = Tokenizer.load(Path(directory) / "tokenizer.json")
    assert again.added == () and again.special_tokens == training.special_tokens
