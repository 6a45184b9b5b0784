"""How many bytes of text each token stands for, for bits per byte."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dualtrain.common.file_kinds import parse_tokenizer


def token_bytes(tokenizer_file: Path, special_ids: Iterable[int]) -> np.ndarray:
    """Count the UTF-8 bytes of every token.

    Exact for byte-level tokenizers, whose tokens are bytes. For others, what a token adds to the
    decoded text behind another one; what they normalise away before they encode is not seen.

    Args:
        tokenizer_file: A ``tokenizer.json``.
        special_ids: Tokens that stand for no text.

    Returns:
        (vocabulary,) int64.
    """
    tokenizer = parse_tokenizer(tokenizer_file)
    size = 1 + max(tokenizer.get_vocab().values())  # there may be ids without a token
    if "ByteLevel" in _decoders(tokenizer):
        # One letter of the written token for each byte; added ones are written as they are.
        counts = [len(tokenizer.id_to_token(token) or "") for token in range(size)]
        for token, added in tokenizer.get_added_tokens_decoder().items():
            counts[token] = len(added.content.encode())
    else:
        counts = [_added_bytes(tokenizer, token) for token in range(size)]
    found = np.array(counts, dtype=np.int64)
    found[[token for token in special_ids if token < size]] = 0
    return found


def _decoders(tokenizer: Tokenizer) -> set[str]:
    decoder = json.loads(tokenizer.to_str())["decoder"]
    parts = [] if decoder is None else [decoder, *decoder.get("decoders", ())]
    return {part["type"] for part in parts}


def _added_bytes(tokenizer: Tokenizer, token: int) -> int:
    written = tokenizer.id_to_token(token) or ""
    if len(written) == 6 and written.startswith("<0x"):
        return 1  # a byte of a character that has no token
    twice = tokenizer.decode([token, token], skip_special_tokens=False)
    once = tokenizer.decode([token], skip_special_tokens=False)
    return len(twice.encode()) - len(once.encode())
