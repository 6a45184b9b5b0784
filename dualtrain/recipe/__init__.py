"""Recipes: every setting of a run in one YAML file, checked as a whole before anything starts.

``schema``                  the fields, described once
``load``                    files, ``extends``, overrides -> a checked recipe
``derive``, ``render``      the numbers that follow, and the dry run that shows them
``merge``, ``ds_rules``     the DeepSpeed configuration, and who decides which of its keys
``reference``               JSON schema and Markdown reference
``shipped``                 recipes and ds_configs by name
"""

from dualtrain.recipe.checks import check_world_size
from dualtrain.recipe.derive import (
    CorpusFacts,
    Derived,
    build_mixture,
    derive,
    uses_rotation,
)
from dualtrain.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from dualtrain.recipe.merge import (
    bfloat16_mode,
    deepspeed_config,
    merge_settings,
    zero_stage,
)
from dualtrain.recipe.reference import json_schema, markdown_reference
from dualtrain.recipe.shipped import shipped_recipes

__all__ = [
    "CorpusFacts",
    "Derived",
    "LoadedRecipe",
    "bfloat16_mode",
    "build_mixture",
    "check_world_size",
    "deepspeed_config",
    "derive",
    "dump_recipe",
    "json_schema",
    "load_recipe",
    "markdown_reference",
    "merge_settings",
    "shipped_recipes",
    "uses_rotation",
    "zero_stage",
]
