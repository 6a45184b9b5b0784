"""The recipe's reference, from the schema: JSON for editors, Markdown for the README.

Called by ``dualtrain schema``.
"""

from __future__ import annotations

import copy

from dualtrain.recipe.describe import Schema, fields, recipe_schema

EXTENDS: Schema = {
    "type": "string",
    "description": "The recipe that this one changes: a path from this file, or a shipped name.",
}


def json_schema() -> Schema:
    """The JSON schema of a recipe file, for editors and checkers.

    A file that extends another one may leave out what that one has, so only list items, which are
    never merged, keep their required keys; the whole recipe has them unless there is ``extends``.
    """
    schema = copy.deepcopy(recipe_schema())
    required = schema.pop("required")
    schema["properties"] = {"extends": EXTENDS, **schema["properties"]}
    listed = {
        node["items"]["$ref"].rpartition("/")[2]
        for section in (schema, *schema["$defs"].values())
        for node in section.get("properties", {}).values()
        if "$ref" in node.get("items", {})
    }
    for name, section in schema["$defs"].items():
        if name not in listed:
            section.pop("required", None)
    _remove_titles(schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dualtrain recipe",
        **schema,
        "if": {"required": ["extends"]},
        "else": {"required": required},
    }


def markdown_reference() -> str:
    """The reference as Markdown: a table for each section."""
    lines: list[str] = []
    sections: dict[str, list[str]] = {"": []}
    descriptions = {"": ""}
    for field in fields():
        section, _, _ = field.path.rpartition(".")
        if field.is_section:
            sections[field.path.removesuffix("[]")] = []
            descriptions[field.path] = field.description
        if field.type:
            default = "required" if field.default is None else f"`{field.default}`"
            row = f"| `{field.path}` | {field.type} | {default} | {field.description} |"
            sections[section.removesuffix("[]")].append(row)
    for section, rows in sections.items():
        if not rows:
            continue
        title = f"`{section}`" if section else "The run"
        lines += [f"#### {title}", ""]
        if descriptions[section]:
            lines += [descriptions[section], ""]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def _remove_titles(node: object) -> None:
    """Drop the titles that pydantic makes of names; editors show the names anyway."""
    if isinstance(node, dict):
        if isinstance(node.get("title"), str):
            del node["title"]
        node = list(node.values())
    for child in node if isinstance(node, list) else ():
        _remove_titles(child)
