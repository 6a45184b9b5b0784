"""What a recipe's dataset holds, as far as deriving a run's numbers needs it; opens no shard.

Of a dataset in an object store ``dataset.json`` is fetched if need be, and nothing is kept.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dualtrain.common.errors import UserError
from dualtrain.data.dataset import DATASET_FILE, DatasetInfo
from dualtrain.recipe.schema import Recipe


@dataclass(frozen=True)
class CorpusFacts:
    """What has to be known of the train split.

    Attributes:
        tokens: Tokens of all documents, without ``<s>`` and ``</s>``.
        words: Of all documents; None if nobody counted.
    """

    tokens: int
    documents: int
    vocab_size: int
    words: int | None = None

    def packed_tokens(self, *, append_eos: bool) -> int:
        """Targets of one epoch over the whole split: its tokens, and ``</s>`` if asked for."""
        return self.tokens + (self.documents if append_eos else 0)


def read_corpus(recipe: Recipe) -> CorpusFacts | None:
    """Count the train split; None when there is no dataset yet.

    Raises:
        UserError: when what is there is not a dataset, or only a part of one; when it cannot be
            fetched.
    """
    info = _read_info(recipe)
    if info is None:
        return None
    train = info.splits["train"]
    return CorpusFacts(
        tokens=train.tokens,
        documents=train.documents,
        vocab_size=info.vocab_size,
        words=train.words,
    )


def _read_info(recipe: Recipe) -> DatasetInfo | None:
    path, remote = Path(recipe.data.path), recipe.data.remote
    if remote is None:
        if recipe.data.build is not None and not os.path.exists(path / DATASET_FILE):
            return None  # what is in the way is for the conversion to say
        return None if _is_absent(path) else DatasetInfo.load(path)
    if os.path.exists(path / DATASET_FILE):
        return DatasetInfo.load(path)
    from dualtrain.data.remote import fetch_info

    info = fetch_info(remote)
    if info is None:
        raise UserError(
            "data.remote",
            f"there is no dataset at {remote}",
            "the URL of a dataset that `dualtrain data convert` made",
        )
    return info


def _is_absent(path: Path) -> bool:
    """Whether there is nothing; what cannot be looked at is for whoever reads it to refuse."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False
