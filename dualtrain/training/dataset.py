"""Making the dataset of a recipe before a run, or fetching what is known of it.

Called by every rank 0, and by ``start`` before it starts any; so it needs no torch, whose import
would delay the ranks by seconds.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from dualtrain.common.errors import UserError
from dualtrain.common.files import user_path
from dualtrain.data.dataset import DATASET_FILE, DatasetInfo
from dualtrain.data.remote import fetch_facts
from dualtrain.recipe.load import COMMAND_LINE, LoadedRecipe
from dualtrain.recipe.schema import Recipe


def with_dataset_there(loaded: LoadedRecipe) -> LoadedRecipe:
    """Drop ``data.build`` where the command line names another dataset that is there.

    ``data.path=DIR`` for a dataset of one's own says nothing of how a recipe makes its own. A
    recipe that names both is another matter: what is there was once made for it, and may be stale.
    """
    build, path = loaded.recipe.data.build, user_path(loaded.recipe.data.path)
    by_hand = {key for key, origin in loaded.origins.items() if origin.startswith(COMMAND_LINE)}
    is_named = "data.path" in by_hand and not any(key.startswith("data.build") for key in by_hand)
    if build is None or not is_named or not os.path.exists(path / DATASET_FILE):
        return loaded
    from data_tools.accept import changed_settings

    if not changed_settings(DatasetInfo.load(path), build):
        return loaded
    data = loaded.recipe.data.model_copy(update={"build": None})
    recipe = loaded.recipe.model_copy(update={"data": data})
    origin = f"{COMMAND_LINE}: data.path holds another dataset"
    return replace(loaded, recipe=recipe, origins={**loaded.origins, "data.build": origin})


def check_dataset(recipe: Recipe) -> None:
    """Refuse what :func:`build_missing_dataset` would refuse before it makes anything."""
    if recipe.data.build is not None:
        from data_tools.convert import check_build

        check_build(recipe.data.build, recipe.data.path)


def missing_dataset(recipe: Recipe) -> UserError | None:
    """What a run says whose dataset is not there and which no key says how to get; or None."""
    if recipe.data.build is not None or recipe.data.remote is not None:
        return None
    try:
        DatasetInfo.load(recipe.data.path)
    except UserError as error:
        return error
    return None


def build_missing_dataset(recipe: Recipe) -> None:
    """Make ``data.path`` as ``data.build`` or ``data.remote`` says, unless it is there already.

    Of a remote dataset only the facts are fetched; shards follow when they are read.
    """
    if recipe.data.remote is not None:
        fetch_facts(recipe.data.remote, recipe.data.path)
    if recipe.data.build is not None:
        from data_tools.view import build_with_view

        build_with_view(recipe.data.build, Path(recipe.data.path))
