"""Encoding by tiktoken, for the tokenizers that it can express exactly.

tiktoken merges by the rank of the result and looks up whole pre-tokens first; ``tokenizers`` merges
by the rank of a pair. The merges inside one token's bytes are the same whatever stands around them,
so a token comes about in a text only in the way in which it comes about from its bytes alone.
Hence both give the same ids on every pre-token if, by its merges, every token gives itself.
:func:`express` tests that for each token; the caller compares ids on the probe texts besides.
"""

from __future__ import annotations

import array
import itertools
import json
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from data_tools.tokenizers.patterns import GPT2, MARKS, Pattern, find_pattern, segments
from dualtrain.common.errors import UserError

if TYPE_CHECKING:
    import tiktoken

_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


class FastEncoder:
    """Text to ids through tiktoken, in bounded memory and linear time.

    Args:
        ranks: Bytes of each token and its place in the order of merging.
        ids: (ranks,) uint32, the id of each rank.
        prefix_space: Put a space before a text that does not begin with one.
        normalizer: Applied first; one of the Unicode normal forms.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        ids: np.ndarray,
        pattern: Pattern,
        *,
        prefix_space: bool,
        normalizer: tokenizers.normalizers.Normalizer | None,
    ) -> None:
        self._ranks, self._ids, self._pattern = ranks, ids, pattern
        self._prefix_space, self._normalizer = prefix_space, normalizer
        self._encodings: dict[str, tiktoken.Encoding] = {}

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, (tokens,) uint32; special-token text is ordinary text."""
        parts = [self._encode_segment(part) for part in self._prepared(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def decode(self, ids: np.ndarray) -> str | None:
        """Text of (tokens,) ids, what is no UTF-8 replaced; None if one of them is no rank's."""
        try:
            data = b"".join(map(self._bytes.__getitem__, ids.tolist()))
        except KeyError:
            return None
        return data.decode(errors="replace")

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        return {int(self._ids[rank]): token for token, rank in self._ranks.items()}

    def _prepared(self, text: str) -> list[str]:
        if self._normalizer is not None and not text.isascii():
            # Before it is divided: a compatibility form turns one character into several words.
            text = self._normalizer.normalize_str(text)
        parts = list(segments(text))
        if self._prefix_space and parts[0] and not parts[0].startswith(" "):
            parts[0] = " " + parts[0]
        return parts

    def _encode_segment(self, text: str) -> np.ndarray:
        mark = next((mark for mark in MARKS if mark not in text), None)
        if mark is None:
            raise UserError("", f"a text has all of {len(MARKS)} control and private characters")
        marked = self._pattern.mark(text, mark)
        # encode_to_numpy is slower: it looks for special tokens.
        ranks = array.array("I", self._encoding(mark).encode_ordinary(marked))
        return self._ids[np.frombuffer(ranks, dtype=np.uint32)]

    def _encoding(self, mark: str) -> tiktoken.Encoding:
        import tiktoken

        if mark not in self._encodings:
            self._encodings[mark] = tiktoken.Encoding(
                "marked",
                pat_str=self._pattern.marked_by(mark),
                mergeable_ranks=self._ranks,
                special_tokens={},
            )
        return self._encodings[mark]


def express(content: str, *, checked: bool = False) -> FastEncoder | None:
    """The tokenizer as ranks, or None if it cannot be expressed so; ids are not compared yet.

    Args:
        content: A ``tokenizer.json``.
        checked: Leave out the test of every token: another process has done it.
    """
    config: dict[str, Any] = json.loads(content)
    divided = _text_division(config)
    if divided is None:
        return None
    ordered = _tokens_in_merge_order(config["model"])
    if ordered is None:
        return None
    if not checked and not _merges_as_ranks_do(config["model"], ordered):
        return None
    pattern, prefix_space = divided
    vocabulary = config["model"]["vocab"]
    return FastEncoder(
        {token_bytes(token): rank for rank, token in enumerate(ordered)},
        np.array([vocabulary[token] for token in ordered], dtype=np.uint32),
        pattern,
        prefix_space=prefix_space,
        normalizer=_normalizer(config),
    )


def known_division(content: str) -> tuple[Pattern, bool] | None:
    """How a tokenizer divides text, and whether it puts a space first.

    Returns:
        None where that is not known, so that a text must not be cut anywhere.
    """
    return _text_division(json.loads(content))


def _normalizer(config: dict[str, Any]) -> tokenizers.normalizers.Normalizer | None:
    normalizer = config.get("normalizer")
    return None if normalizer is None else getattr(tokenizers.normalizers, normalizer["type"])()


def _text_division(config: dict[str, Any]) -> tuple[Pattern, bool] | None:
    if any(not token["special"] for token in config.get("added_tokens", ())):
        return None
    normalizer = config.get("normalizer")
    if normalizer is not None and normalizer["type"] not in _NORMAL_FORMS:
        return None
    outer = config.get("pre_tokenizer") or {}
    steps = outer["pretokenizers"] if outer.get("type") == "Sequence" else [outer]
    if not steps or steps[-1].get("type") != "ByteLevel":
        return None
    last = steps[-1]
    if len(steps) == 1:
        return (GPT2, last["add_prefix_space"]) if last.get("use_regex", True) else None
    split = steps[0]
    if len(steps) > 2 or split["type"] != "Split" or last.get("use_regex", True):
        return None
    if last["add_prefix_space"] or split["behavior"] != "Isolated" or split["invert"]:
        return None
    pattern = find_pattern(split["pattern"].get("Regex", ""))
    return (pattern, False) if pattern else None


@cache
def byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    shown = [b for b in range(256) if chr(b).isprintable() and b != 0x20]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def token_bytes(token: str) -> bytes:
    """Bytes of a token written in byte letters."""
    letters = byte_letters()
    return bytes(letters[letter] for letter in token)


def _tokens_in_merge_order(model: dict[str, Any]) -> list[str] | None:
    """All 256 bytes, then the results of the merges; None where that is not the whole model."""
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    results = ["".join(pair) for pair in _pairs(model)]
    # Several merges with one result (Llama 3 lists every pair) have one rank only side by side.
    groups = [token for token, _ in itertools.groupby(results)]
    ordered = [*byte_letters(), *groups]
    if len(set(ordered)) < len(ordered) or not model["vocab"].keys() >= set(ordered):
        return None
    if model.get("ignore_merges"):
        others = sorted(model["vocab"].keys() - set(ordered))
        ordered += [token for token in others if token and byte_letters().keys() >= set(token)]
    return ordered


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges, which older files write as "a b"."""
    merges = model["merges"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def _merges_as_ranks_do(model: dict[str, Any], tokens: list[str]) -> bool:
    """Whether every token comes about from its bytes by merges, or cannot come about by ranks.

    With ``ignore_merges`` a token need not: whole pre-tokens are looked up in both libraries. Two
    parts would be joined by tiktoken, whose rank of the whole is enough; three or more never are.
    """
    merging = tokenizers.models.BPE(vocab=model["vocab"], merges=_pairs(model))
    parts = (len(merging.tokenize(token)) for token in tokens)
    if model.get("ignore_merges"):
        return all(count != 2 for count in parts)
    return all(count == 1 for count in parts)
