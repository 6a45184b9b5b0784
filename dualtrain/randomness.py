"""Random numbers that depend on nothing but their key.

Data order, document groups and corruption draw from here, each with a purpose of its own. The
generators are counter-based and keyed by (seed, purpose, key), so that any process on any machine
gets the same numbers for the same key, and no run ever has a generator's state to save.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Make the generator that belongs to (seed, purpose, key).

    Args:
        seed: The recipe's seed; any integer.
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
