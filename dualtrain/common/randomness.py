"""Random numbers that depend on nothing but their key.

Data order and corruption draw from here, each with a purpose of its own. The
generators are counter-based and keyed by (seed, purpose, key), so that any process on any machine
gets the same numbers for the same key, and no run ever has a generator's state to save.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Make the generator that belongs to (seed, purpose, key).

    Args:
        purpose: What the numbers are for, such as ``"corruption"``: two purposes never share them.
        *key: Any integers, such as a stream's number and a sequence's index.

    Returns:
        A fresh Philox generator, at its beginning. Its key is the blake2b hash of the arguments,
        128 bits, so that neighbouring keys are unrelated. Python's own ``hash`` would differ
        between processes.
    """
    text = "\x1f".join((str(int(seed)), purpose, *(str(int(number)) for number in key)))
    digest = blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class KeyedPermutation:
    """A permutation of range(size) that is computed for one number at a time, and never kept.

    A Feistel network over the next power of four, walked on until it comes back into the range
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
        size: At least 1.
    """

    def __init__(self, size: int, seed: int, purpose: str, *key: int) -> None:
        self._size = size
        # Below 8 bits the halves would be too short to be mixed well.
        self._bits = max(4, ((size - 1).bit_length() + 1) // 2)
        self._round_keys = generator(seed, purpose, *key).integers(1 << 63, size=_ROUNDS).tolist()

    def __getitem__(self, index: int) -> int:
        """Where the permutation takes `index`, one of range(size)."""
        mask = (1 << self._bits) - 1
        while True:
            left, right = index >> self._bits, index & mask
            for round_key in self._round_keys:
                left, right = right, left ^ (_mixed(right + round_key) & mask)
            index = left << self._bits | right
            if index < self._size:
                return index


_ROUNDS = 6
_WORD = (1 << 64) - 1


def _mixed(number: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every bit depends on all bits."""
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _WORD
    return number ^ (number >> 31)
