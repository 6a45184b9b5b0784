"""What may stand at a place of a recipe, in words, from the recipe's JSON schema.

Used by the messages about wrong values and by the reference, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from dualtrain.common.errors import nearest
from dualtrain.recipe.schema import Recipe
from dualtrain.recipe.yaml_source import Path, shown

Schema = dict
"""A node of a JSON schema."""


@dataclass(frozen=True)
class Field:
    """One key of the recipe.

    Attributes:
        path: Dotted keys; ``[]`` stands for any item of a list, such as ``algorithms[].use``.
        type: What values it takes, in words; empty for a section.
        default: The default as YAML shows it, or None where there is none.
    """

    path: str
    type: str
    default: str | None
    description: str
    is_section: bool


@cache
def recipe_schema() -> Schema:
    """The JSON schema of a complete recipe, as pydantic makes it."""
    return Recipe.model_json_schema()


def expectation(path: Path) -> str:
    """What is expected at a path, such as ``an integer >= 1``; empty for an unknown one."""
    nodes = _at(path)
    return _in_words(nodes, with_article=True) if nodes else ""


def options(path: Path) -> list[str]:
    """The words that are allowed at a path, among whatever else is."""
    return [str(word) for node in _at(path) for word in _enumerated(node)]


def keys(path: Path) -> list[str]:
    """The keys of the section at a path; of all its kinds, if there are several."""
    found: dict[str, None] = {}
    for node in _at(path):
        found |= dict.fromkeys(node.get("properties", {}))
    return list(found)


def nearest_key(path: Path) -> str:
    """A hint at the key that an unknown one was meant to be; empty if none is near."""
    *parents, key = path
    if hint := nearest(key, keys(tuple(parents)), cutoff=0.6):
        return hint
    elsewhere = [f.path for f in fields() if f.path.split(".")[-1] == key and "[]" not in f.path]
    return f"did you mean {elsewhere[0]}?" if elsewhere else ""


@cache
def fields() -> tuple[Field, ...]:
    """All keys of a recipe, sections before what they hold, in the schema's order."""
    return tuple(_walk([recipe_schema()], ""))


def _walk(sections: Sequence[Schema], prefix: str) -> Iterator[Field]:
    """The fields of a section, given as the schemas of all its kinds."""
    for key in dict.fromkeys(key for section in sections for key in section["properties"]):
        owners = [section for section in sections if key in section["properties"]]
        raw = owners[0]["properties"][key]
        values = [n for owner in owners for n in _alternatives(owner["properties"][key])]
        items = [n for value in values if "items" in value for n in _alternatives(value["items"])]
        inner = [n for n in values if "properties" in n]
        in_list = [n for n in items if "properties" in n]
        only_sections = inner and all("properties" in n for n in values)
        yield Field(
            path=prefix + key,
            type="" if only_sections else _in_words(values),
            default=_default(raw, any(key in owner.get("required", ()) for owner in owners)),
            description=raw.get("description") or (inner[0]["description"] if inner else ""),
            is_section=bool(inner or in_list),
        )
        if inner:
            yield from _walk(inner, f"{prefix}{key}.")
        if in_list:
            yield from _walk(in_list, f"{prefix}{key}[].")


def _default(raw: Schema, is_required: bool) -> str | None:
    if is_required or isinstance(raw.get("default"), dict):
        return None
    # pydantic leaves out defaults that a factory makes; ours are an empty list and section.
    value = raw.get("default", [] if raw.get("type") == "array" else {})
    if isinstance(value, str):
        return value or "''"
    return str(value) if isinstance(value, (list, dict)) else shown(value)


def _at(path: Path) -> list[Schema]:
    """The alternatives for the value at a path."""
    nodes = [recipe_schema()]
    for key in path:
        found: list[Schema] = []
        for node in nodes:
            if isinstance(key, int):
                fixed = node.get("prefixItems", [])
                child = fixed[key] if key < len(fixed) else node.get("items")
            else:
                child = node.get("properties", {}).get(key) or node.get("additionalProperties")
            if isinstance(child, dict):
                found += _alternatives(child)
        nodes = found
    return nodes


def _alternatives(node: Schema) -> list[Schema]:
    """A node without references, one for each of its alternatives; a share is one."""
    if "$ref" in node:
        return _alternatives(recipe_schema()["$defs"][node["$ref"].rpartition("/")[2]])
    if node.get("title") == "Share":
        return [node]
    for key in ("anyOf", "oneOf"):
        if key in node:
            return [leaf for child in node[key] for leaf in _alternatives(child)]
    return [node]


def _enumerated(node: Schema) -> list[object]:
    return [node["const"]] if "const" in node else node.get("enum", [])


def _in_words(nodes: Sequence[Schema], *, with_article: bool = False) -> str:
    """Say what the alternatives allow: ``an integer >= 1, or null``."""
    words = [str(word) for node in nodes for word in _enumerated(node)]
    parts = [_either(words)] if words else []
    for node in nodes:
        if not _enumerated(node) and node.get("type") != "null":
            parts.append(_one_in_words(node, with_article))
    if any(node.get("type") == "null" for node in nodes):
        parts.append("null")
    return _either(parts)


def _either(parts: Sequence[str]) -> str:
    unique = list(dict.fromkeys(parts))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"


def _one_in_words(node: Schema, with_article: bool) -> str:
    if node.get("title") == "Share":
        return ("a " if with_article else "") + "share in [0, 1] such as 1/8"
    kind = node.get("type", "")
    names = {
        "integer": "an integer",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "array": "a list",
        "object": "a section",
    }
    name = names.get(kind, "a value")
    if not with_article:
        name = name.removeprefix("an ").removeprefix("a ")
    if kind == "array" and "prefixItems" in node:
        inner = _one_in_words(node["prefixItems"][0], with_article=False)
        return f"{name} of {len(node['prefixItems'])} times {inner}"
    if kind == "string" and "pattern" in node:
        return f"{name} of letters, digits and ._- only"
    if node.get("minItems"):
        return f"{name} of at least one item"
    return " ".join(part for part in (name, _range(node)) if part)


def _range(node: Schema) -> str:
    """The bounds of a number: ``>= 1``, ``in [0, 1)``."""
    lowest, above = node.get("minimum"), node.get("exclusiveMinimum")
    highest, below = node.get("maximum"), node.get("exclusiveMaximum")
    low = _short(above if lowest is None else lowest)
    high = _short(below if highest is None else highest)
    if low and high:
        return f"in {'(' if lowest is None else '['}{low}, {high}{')' if highest is None else ']'}"
    if low:
        return f"{'>' if lowest is None else '>='} {low}"
    return f"{'<' if highest is None else '<='} {high}" if high else ""


def _short(number: float | None) -> str:
    """A bound in few characters: ``2^24``, ``10^8``, ``1e6``."""
    if isinstance(number, int) and number >= 10_000:
        power = number.bit_length() - 1
        return f"2^{power}" if number == 2**power else f"10^{len(str(number)) - 1}"
    return "" if number is None else f"{number:g}".replace("e+0", "e")
