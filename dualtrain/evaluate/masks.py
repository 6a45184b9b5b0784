"""Rows for scoring with masked tokens and full attention: pll, chain and elbo.

Each passage becomes documents, copies of it with different tokens of its continuation masked. Only
ordinary tokens are masked and scored: a special one in a continuation is given, as those of the
context are. Let c_1 ... c_L be the ordinary tokens of a continuation.

pll      L documents, c_i masked in the i-th: Σ_i log p(c_i | all others). No likelihood.
chain    L documents, c_i ... c_L masked in the i-th: Σ_i log p(c_i | context, c_1 ... c_{i-1}),
         the likelihood of c given its length.
elbo     documents with random sets M masked. With k uniform on 1 ... L and M uniform among the
         sets of k tokens, the bound is

             E_M [ (L / k) Σ_{i in M} log p(c_i | all that is not in M) ].

         It is the mean, over all orders in which c can be uncovered, of the log-likelihood of
         uncovering it in that order, one token after the other; so it is no larger than the
         logarithm of the mean likelihood (Jensen's inequality).

The estimate of that expectation is the mean over S samples, of which sample s (from 0) has

    k_s = 1 + floor(L · (s + u_s) / S),   M_s: the k_s smallest of L uniform numbers,

u_s uniform on [0, 1). As (s + u_s) / S is uniform on the s-th part of [0, 1), the mean over s of
E[f(k_s)] is the integral of f(1 + floor(L·x)), which is Σ_k f(k) / L: the estimate has no bias,
whatever S. Where there are no more than S different sets, 2^L - 1, the expectation itself is
computed. The numbers are drawn from the seed and the passage, so no score depends on what else is
scored.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from dualtrain.common.randomness import generator
from dualtrain.common.vocabulary import Vocabulary
from dualtrain.evaluate.packing import PackedRow
from dualtrain.evaluate.request import Mode, Passage
from dualtrain.model.handle import Target


@dataclass(frozen=True)
class Masking:
    """How passages are masked."""

    mode: Mode
    vocabulary: Vocabulary
    target: Target = "next"  # a masked token at i is predicted at i-1, or in_place at i
    samples: int = 32  # S, for elbo
    seed: int = 0

    def documents(self, passage: Passage) -> tuple[list[MaskedDocument], np.ndarray]:
        """Mask a passage.

        Returns:
            The documents, and (N,) float64 weights of the losses read from them, in order; their
            weighted sum is the negative of the score.
        """
        places = self._ordinary(passage)
        length = len(places)
        if self.mode == "pll":
            sets = [((i,), (i,), 1.0) for i in range(length)]
        elif self.mode == "chain":
            sets = [(range(i, length), (i,), 1.0) for i in range(length)]
        else:
            sets = [(mask, mask, weight) for mask, weight in self._sets(passage, length)]
        tokens = np.array(passage.tokens, np.int64)
        shift = 1 if self.target == "next" else 0
        documents, weights = [], []
        for masked, read, weight in sets:
            corrupted, scored = tokens.copy(), places[list(read)]
            corrupted[places[list(masked)]] = self.vocabulary.mask_id
            documents.append(MaskedDocument(corrupted, scored - shift, tokens[scored]))
            weights += [weight] * len(scored)
        return documents, np.array(weights)

    def _ordinary(self, passage: Passage) -> np.ndarray:
        """(L,) int64, places of the continuation's tokens that may be masked."""
        places = range(passage.begin, len(passage.tokens))
        special = set(self.vocabulary.special_ids)
        return np.array([i for i in places if passage.tokens[i] not in special], np.int64)

    def _sets(self, passage: Passage, length: int) -> list[tuple[tuple[int, ...], float]]:
        """Choose the masked sets of elbo, with the weight of each of their losses."""
        if 2**length - 1 <= self.samples:
            return [
                (mask, 1 / (size * math.comb(length, size)))
                for size in range(1, length + 1)
                for mask in combinations(range(length), size)
            ]
        noise = generator(self.seed, "elbo", passage.begin, *passage.tokens)
        # A sample has a row of these numbers; more samples do not change the first ones' orders.
        numbers = noise.random((self.samples, 1 + length))
        rates = (np.arange(self.samples) + numbers[:, 0]) / self.samples
        # A sum that rounds up to 1 would be one token too many.
        sizes = np.minimum(1 + (length * rates).astype(int), length)
        orders = numbers[:, 1:].argsort(axis=1)
        chosen = Counter(
            tuple(sorted(order[:size])) for order, size in zip(orders.tolist(), sizes, strict=True)
        )
        return [
            (mask, count * length / (len(mask) * self.samples)) for mask, count in chosen.items()
        ]


@dataclass(frozen=True, eq=False)
class MaskedDocument:
    """A passage with some tokens masked, and what is read from it, as in a :class:`Row`."""

    tokens: np.ndarray
    at: np.ndarray
    targets: np.ndarray


def pack_documents(documents: Sequence[MaskedDocument], capacity: int) -> list[PackedRow]:
    """Put documents into rows.

    Args:
        documents: Their readings are numbered through in this order.
        capacity: Tokens of a row with several documents; a longer one has a row of its own.

    Returns:
        The rows. The longest documents come first, each into the first of the latest rows that
        has room for it.
    """
    first_reads = np.cumsum([0, *(len(document.at) for document in documents)])
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i].tokens))
    rows: list[list[int]] = []
    # Room left in the rows that are open, by row; looking at all would take quadratic time.
    open_rows: dict[int, int] = {}
    for i in order:
        size = len(documents[i].tokens)
        row = next((row for row, room in open_rows.items() if room >= size), None)
        if row is None:
            row = len(rows)
            rows.append([])
            open_rows[row] = max(capacity, size)
            if len(open_rows) > _OPEN_ROWS:
                del open_rows[min(open_rows, key=open_rows.__getitem__)]
        rows[row].append(i)
        open_rows[row] -= size
    return [_pack(documents, row, first_reads) for row in rows]


_OPEN_ROWS = 16


def _pack(
    documents: Sequence[MaskedDocument], chosen: Sequence[int], first_reads: np.ndarray
) -> PackedRow:
    parts = [documents[i] for i in chosen]
    sizes = [len(part.tokens) for part in parts]
    starts = np.cumsum([0, *sizes[:-1]])
    return PackedRow(
        tokens=np.concatenate([part.tokens for part in parts]),
        positions=np.concatenate([np.arange(size) for size in sizes]),
        at=np.concatenate([part.at + start for part, start in zip(parts, starts, strict=True)]),
        targets=np.concatenate([part.targets for part in parts]),
        reads=np.concatenate([np.arange(first_reads[i], first_reads[i + 1]) for i in chosen]),
        parts=len(parts),
        documents=np.repeat(np.arange(len(parts)), sizes).astype(np.int32),
    )
