"""What a recipe's dataset holds, as far as deriving a run's numbers needs it; opens no shard."""

from __future__ import annotations

from pathlib import Path

from dualtrain.data.dataset import DatasetInfo
from dualtrain.recipe.derive import CorpusFacts
from dualtrain.recipe.schema import Recipe


def read_corpus(recipe: Recipe) -> CorpusFacts | None:
    """Count the train split; None when there is no dataset yet.

    Raises:
        UserError: when what is there is not a dataset, or only a part of one.
    """
    path = Path(recipe.data.path)
    if not path.exists():
        return None
    info = DatasetInfo.load(path)
    train = info.splits["train"]
    return CorpusFacts(tokens=train.tokens, documents=train.documents, vocab_size=info.vocab_size)
