"""What a dataset looks like: how long its documents are, and what stands in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_tools.tokenizers.tokenizer import Tokenizer
from dualtrain.data.dataset import TokenDataset


@dataclass(frozen=True)
class Bin:
    """Documents with at least `first` and at most `last` tokens."""

    first: int
    last: int
    documents: int
    tokens: int


def length_histogram(lengths: np.ndarray) -> list[Bin]:
    """Count documents by length, in bins whose bounds are powers of two.

    Args:
        lengths: (documents,) int64, at least one.

    Returns:
        Bins from the shortest document to the longest, without a gap.
    """
    # The exponent e of the bin [2**e, 2**(e+1)) of each document; those without tokens have none.
    exponents = np.frexp(np.maximum(lengths, 1))[1] - 1
    documents = np.bincount(exponents)
    tokens = np.bincount(exponents, weights=lengths).astype(np.int64)
    return [
        Bin(2**e, 2 ** (e + 1) - 1, int(documents[e]), int(tokens[e]))
        for e in range(int(exponents.min()), int(exponents.max()) + 1)
    ]


def sample(dataset: TokenDataset, tokenizer: Tokenizer, document: int, characters: int) -> str:
    """The beginning of a document as training sees it: after its ``<s>``.

    Special tokens appear by name; the end of a document is shown by ``</s>``, which training packs
    unless ``append_eos`` is false.
    """
    # Every token is at least a byte, but some take several to make one character.
    most = 4 * characters
    ids = dataset.read(document, 0, most).tolist()
    text = tokenizer.decode(ids)
    whole = len(ids) == dataset.lengths[document] and len(text) <= characters
    return "<s>" + (text + "</s>" if whole else text[:characters] + "…")
