"""``dualtrain recipes`` and ``dualtrain schema``."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def recipes() -> None:
    """List the shipped recipes."""
    from dualtrain.recipe.shipped import shipped_recipes

    for name, summary in shipped_recipes():
        typer.echo(f"{name:28} {summary}")


def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The reference as a Markdown table.")
    ] = False,
) -> None:
    """Print the JSON schema of recipes, for editors and checkers."""
    from dualtrain.recipe.reference import json_schema, markdown_reference

    typer.echo(markdown_reference() if markdown else json.dumps(json_schema(), indent=2))
