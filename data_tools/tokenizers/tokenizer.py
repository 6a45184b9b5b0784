"""The tokenizer of a dataset: byte-level BPE in the ``tokenizer.json`` of Hugging Face.

Conversion trains and applies it; generation loads it from the dataset or the checkpoint. Text is
always text: ``<mask>`` written in a document becomes ordinary tokens, never the special id.

Whole documents are encoded through tiktoken where that gives the same ids (``fast``),
several times faster; what ``--tokenizer`` may name besides a file is read by ``ranks``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_tools.tokenizers.fast import FastEncoder, express, known_division
from data_tools.tokenizers.patterns import Pattern, segments
from data_tools.tokenizers.probes import probe_texts, token_texts
from data_tools.tokenizers.roles import declared_roles, find_roles, recorded_ids
from dualtrain.common.errors import UserError
from dualtrain.common.file_kinds import read_text, refuse_foreign
from dualtrain.data.dataset import SPECIAL_TOKENS

Backend = Literal["tiktoken", "tokenizers"]

RESERVED = 16
"""Ids 0 to 15 of a tokenizer trained here are special, as in the paper."""


MAX_UNDIVIDED_CHARS = 16 << 20
"""Longest text for a tokenizer that divides text in an unknown way: ``tokenizers`` needs about
120 bytes of memory per character, and nothing says where such a text might be cut."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        added: Special tokens that the given file lacked, appended to vocabulary and ``json``.
        roles: The file's own tokens that have another name than their role, by role.
        special_ids: These and all other ids that are no text.

    Args:
        json: Content of a ``tokenizer.json``.
        backend: What :meth:`encode_array` goes through, as another process found out; None to find
            out at its first call.
        special_tokens: Ids by role, as a dataset records them; None to find them, and to add what
            is missing.
        declared: Names for roles, from the files beside the tokenizer.
        own_names: Take only tokens that are called as their role, as versions before roles did.
    """

    def __init__(
        self,
        json: str,
        *,
        where: str,
        backend: Backend | None = None,
        special_tokens: Mapping[str, int] | None = None,
        declared: Mapping[str, tuple[str, ...]] | None = None,
        own_names: bool = False,
    ) -> None:
        self.json, self.added, self.roles = json, (), {}
        if special_tokens is None:
            tokenizer = _parse(json, where)
            _refuse_unusable(tokenizer, where)
            found = {} if own_names else find_roles(tokenizer, declared or {})
            self.json, self.added, special_tokens = _fill_roles(tokenizer, json, found, where)
            self.roles = {role: name for role, name in found.items() if role != name}
        self._where, self._given_backend = where, backend
        self._tokenizer = _parse(self.json, where)
        # Not stored in the file: without it "<s>" in a text becomes the special token.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special_tokens = dict(special_tokens)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        self.special_ids = tuple(sorted(special | set(self.special_tokens.values())))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train byte-level BPE: ids 0-15 special, then 256 bytes, then merges.

        Args:
            vocab_size: Size of the vocabulary, at most: few texts give fewer merges.
        """
        names = [
            *SPECIAL_TOKENS,
            *(f"<reserved_{i}>" for i in range(len(SPECIAL_TOKENS), RESERVED)),
        ]
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=names,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str(pretty=True), where="trained tokenizer")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        special_tokens: Mapping[str, int] | None = None,
        own_names: bool = False,
    ) -> Tokenizer:
        """Load a ``tokenizer.json``, with what the files beside it say of its special tokens.

        Args:
            special_tokens: Ids by role, as in the class.
        """
        path = Path(path)
        json = read_text(path, "a tokenizer.json")
        declared = None
        if special_tokens is None and not own_names:
            special_tokens = recorded_ids(path, json.encode())
            declared = declared_roles(path)
        try:
            return cls(
                json,
                where=str(path),
                special_tokens=special_tokens,
                declared=declared,
                own_names=own_names,
            )
        except UserError:
            refuse_foreign(path, "a tokenizer.json")
            raise

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def sha256(self) -> str:
        """Hash of the file that :meth:`save` writes."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the ``tokenizer.json``, byte for byte as it was loaded."""
        Path(path).write_bytes(self.json.encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without ``<s>`` and ``</s>``."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @property
    def backend(self) -> Backend:
        """What :meth:`encode_array` goes through: tiktoken if it was found to give the same ids."""
        return "tokenizers" if self._fast is None else "tiktoken"

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids as :meth:`encode`, (tokens,) uint32, by the fastest exact way.

        Raises:
            UnicodeEncodeError: The text has a lone surrogate, which is not a character.
            UserError: The text is too long for a tokenizer that allows no division of texts.
        """
        if not text.isascii():
            text.encode()  # tiktoken would replace a lone surrogate without a word
        if self._fast is not None:
            return self._fast.encode(text)
        if self._division is not None:
            _, prefix_space = self._division
            parts = segments(text, only_at_spaces=prefix_space)
            return np.concatenate([self._encode_undivided(part) for part in parts])
        if len(text) > MAX_UNDIVIDED_CHARS:
            raise UserError(
                self._where,
                f"this tokenizer cannot encode a text of {len(text):,} characters",
                f"at most {MAX_UNDIVIDED_CHARS:,}: it divides text in a way not known here,"
                " and would need far more memory than the text",
                "divide the document, leave it out by its length, or use a byte-level tokenizer",
            )
        return self._encode_undivided(text)

    def round_trip_failures(self) -> list[str]:
        """Probe texts that decoding does not give back, quoted and shortened; [] if exact."""
        texts = (text for text in probe_texts() if self.decode(self.encode(text)) != text)
        return [shown if len(shown := repr(text)) <= 60 else shown[:57] + "..." for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens appear by name."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def decode_array(self, ids: np.ndarray) -> str:
        """Text as :meth:`decode` of (tokens,) ids, by the fastest exact way."""
        text = None if self._fast is None else self._fast.decode(ids)
        return self.decode(ids.tolist()) if text is None else text

    def _encode_undivided(self, text: str) -> np.ndarray:
        (encoded,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoded.ids, dtype=np.uint32)

    @cached_property
    def _division(self) -> tuple[Pattern, bool] | None:
        return known_division(self.json)

    @cached_property
    def _fast(self) -> FastEncoder | None:
        if self._given_backend == "tokenizers":
            return None
        fast = express(self.json, checked=self._given_backend == "tiktoken")
        if fast is None or self._given_backend == "tiktoken":
            return fast
        texts = (*probe_texts(), *token_texts(self._token_texts()))
        same = all(fast.encode(text).tolist() == self.encode(text) for text in texts)
        return fast if same else None

    def _token_texts(self) -> list[str]:
        ids = sorted(set(self._tokenizer.get_vocab(with_added_tokens=True).values()))
        return [self.decode([i]) for i in ids]  # decode_batch has threads, bad before a fork


def _parse(json: str, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json)
    except Exception as error:  # the library raises nothing more specific
        raise UserError(where, f"is not a tokenizer.json: {error}") from None


def _fill_roles(
    tokenizer: tokenizers.Tokenizer, json: str, roles: Mapping[str, str], where: str
) -> tuple[str, tuple[str, ...], dict[str, int]]:
    """Add tokens for the roles that no token has, after all ids.

    Returns:
        The ``tokenizer.json``, what was added, and the ids by role.
    """
    names = {role: roles.get(role, role) for role in SPECIAL_TOKENS}
    missing = tuple(name for name in names.values() if tokenizer.token_to_id(name) is None)
    taken = set(tokenizer.get_vocab(with_added_tokens=True).values())
    if missing:
        tokenizer.add_special_tokens(list(missing))
        json = tokenizer.to_str(pretty=True)
    ids = {role: tokenizer.token_to_id(name) for role, name in names.items()}
    for name in missing:
        if ids[name] <= max(taken):
            raise UserError(
                where,
                f"the special token {name} would get the id {ids[name]}, which is not free",
                "ids without gaps, or a tokenizer that has all of " + " ".join(SPECIAL_TOKENS),
                "add the special tokens to the file",
            )
    return json, missing, ids


def _refuse_unusable(tokenizer: tokenizers.Tokenizer, where: str) -> None:
    if tokenizer.get_vocab_size(with_added_tokens=False) == 0:
        raise UserError(where, "the tokenizer has no tokens", "a trained tokenizer")
    if dropout := getattr(tokenizer.model, "dropout", None):
        raise UserError(
            where,
            f"the tokenizer has a dropout of {dropout:g}: it gives other ids each time",
            "none",
            'set "dropout" to null in its "model"',
        )
    try:
        tokenizer.encode("A text.", add_special_tokens=False)
    except Exception as error:  # the library raises nothing more specific
        raise UserError(where, f"the tokenizer cannot encode text: {error}") from None
