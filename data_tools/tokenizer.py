"""The tokenizer of a dataset: byte-level BPE in the ``tokenizer.json`` of Hugging Face.

Conversion trains and applies it; generation loads it from the dataset or the checkpoint. Text is
always text: ``<mask>`` written in a document becomes ordinary tokens, never the special id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dualtrain.errors import UserError

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<mask>")
RESERVED = 16
"""Ids 0 to 15 of a tokenizer trained here are special, as in the paper."""


class Tokenizer:
    """Text to token ids and back.

    Args:
        json: Content of a ``tokenizer.json``.
        where: Its place, for messages.

    Raises:
        UserError: It is not a tokenizer, or lacks one of the five special tokens.
    """

    def __init__(self, json: str, *, where: str) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(where, f"is not a tokenizer.json: {error}") from None
        # Not stored in the file: without it "<s>" in a text becomes the special token.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.json = json
        self.special_tokens = self._find_special_tokens(where)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        self.special_ids = tuple(sorted(special | set(self.special_tokens.values())))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train byte-level BPE: ids 0-15 special, then 256 bytes, then merges.

        Args:
            texts: What to learn from.
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
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a ``tokenizer.json``.

        Raises:
            UserError: It cannot be read or used.
        """
        try:
            return cls(Path(path).read_bytes().decode(), where=str(path))
        except OSError as error:
            raise UserError(str(path), f"cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(str(path), "is not a tokenizer.json: not UTF-8") from None

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

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of several texts, as :meth:`encode`, each (tokens,) int64."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=np.int64) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens appear by name."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _find_special_tokens(self, where: str) -> dict[str, int]:
        ids = {name: self._tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
        if missing := [name for name, i in ids.items() if i is None]:
            raise UserError(
                where,
                f"the tokenizer has no {', '.join(missing)}",
                f"all of {' '.join(SPECIAL_TOKENS)} among its tokens",
                "add them as special tokens, or leave the tokenizer out to have one trained",
            )
        return ids
