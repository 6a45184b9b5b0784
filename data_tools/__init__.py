"""Corpora to datasets: readers, tokenizer, conversion to MDS shards, verification.

``app`` is mounted as ``dualtrain data``; ``convert.build_dataset`` is what a recipe's
``data.build`` calls. The format itself is described in ``dualtrain.data.dataset``.
"""
