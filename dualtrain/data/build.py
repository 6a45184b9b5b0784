"""Making the dataset of a recipe before a run, or fetching what is known of it.

Called by every rank 0, and by ``start`` before it starts any; so it needs no torch, whose import
would delay the ranks by seconds.
"""

from __future__ import annotations

from pathlib import Path

from dualtrain.data.remote import fetch_facts
from dualtrain.recipe.schema import Recipe


def build_missing_dataset(recipe: Recipe) -> None:
    """Make ``data.path`` as ``data.build`` or ``data.remote`` says, unless it is there already.

    Of a remote dataset only the facts are fetched; shards follow when they are read.

    Raises:
        UserError: when what is there was made with other arguments, or the sources are unusable.
    """
    if recipe.data.remote is not None:
        fetch_facts(recipe.data.remote, recipe.data.path)
    if recipe.data.build is not None:
        from data_tools.app import build_with_view

        build_with_view(recipe.data.build, Path(recipe.data.path))
