"""Tests of: dualtrain.recipe.reference, describe, derived.dry_run: what is written for readers."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from dualtrain.derived.derive import derive
from dualtrain.derived.dry_run import print_dry_run
from dualtrain.recipe.describe import fields
from dualtrain.recipe.load import load_recipe
from dualtrain.recipe.reference import json_schema, markdown_reference
from dualtrain.recipe.schema import Recipe

RECIPE = load_recipe("paper/470m-r128")


def dry_run(*overrides, width=80, terminal=False, name="paper/470m-r128") -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, highlight=False)
    loaded = load_recipe(name, overrides)
    print_dry_run(loaded, derive(loaded.recipe, corpus=None), console=console)
    return out.getvalue()


def test_every_field_is_described_once():
    for field in fields():
        assert field.description, field.path
        assert not field.description.startswith(" ")
    paths = [field.path for field in fields()]
    assert len(paths) == len(set(paths))


def test_the_reference_has_every_key_that_a_dump_has():
    reference = markdown_reference()
    loaded = load_recipe("ablations/alpha-curriculum", ["algorithms=[{use: input_masking}]"])
    for key in loaded.origins | dict.fromkeys(_leaves(json.loads(loaded.recipe.model_dump_json()))):
        assert f"| `{re.sub(r'.[0-9]+', '[]', key)}` |" in reference, key


def _leaves(node: object, path: str = "") -> list[str]:
    if isinstance(node, dict) and node:
        return [leaf for key, value in node.items() for leaf in _leaves(value, f"{path}.{key}")]
    if isinstance(node, list) and node and isinstance(node[0], dict):
        return [leaf for i, value in enumerate(node) for leaf in _leaves(value, f"{path}.{i}")]
    return [path.lstrip(".")]


@pytest.mark.parametrize(
    "row",
    [
        "| `seed` | integer in [0, 2^63) | `0` | Decides initialisation",
        "| `alpha` | share in [0, 1] such as 1/8 or section | required | AR share",
        "| `alpha.phases[].until` | share in [0, 1] such as 1/8 | required |",
        "| `objective.corruption.name` | uniform or span | required |",
        "| `objective.corruption.rate` | section or null | `null` |",
        "| `objective.corruption.rate.end` | number in [1e-30, 1] | `0.15` |",
        "| `unique_tokens` | all, integer in [1, 10^15] or null | `null` |",
        "| `optim.lr` | number in [1e-30, 1e6] | `0.007` |",
        "| `optim.weight_decay` | number in [0, 1e6] | `0.1` |",
        "| `engine.timeout_s` | number in [1, 10^6] | `1800.0` |",
        "| `eval.modes` | list of at least one item | `['ar']` |",
        "| `sample.prompt` | text | `''` |",
    ],
)
def test_rows_of_the_reference(row):
    assert row in markdown_reference()


def test_the_json_schema_lets_an_ablation_leave_things_out():
    schema = json_schema()
    assert schema["else"] == {"required": ["name", "alpha", "data"]}
    assert schema["if"] == {"required": ["extends"]} and "required" not in schema
    assert "extends" in schema["properties"]
    required = {name for name, section in schema["$defs"].items() if "required" in section}
    # Only items of lists, which are never merged.
    assert required == {"AlphaPhase", "AlgorithmEntry"}
    assert all(section.get("additionalProperties") is False for section in schema["$defs"].values())
    # Asking for it changes nothing.
    assert json_schema() == schema and "required" in Recipe.model_json_schema()


def test_the_json_schema_knows_shares():
    share = {"type": "number", "minimum": 0, "maximum": 1}
    until = json_schema()["$defs"]["AlphaPhase"]["properties"]["until"]
    assert share in until["anyOf"]
    pattern = next(kind["pattern"] for kind in until["anyOf"] if kind["type"] == "string")
    for text in ("1/8", "63 / 64", "0.5", "1", ".5"):
        assert re.search(pattern, text)
    for text in ("half", "1/", "1e5", "1.5/2"):
        assert not re.search(pattern, text)


def test_the_first_part_of_a_dry_run_is_the_recipe_with_its_origins(tmp_path):
    text = dry_run("optim.lr=1e-3")
    recipe, _, numbers = text.partition("\n\n")
    (tmp_path / "again.yaml").write_text(recipe)
    expected = load_recipe("paper/470m-r128", ["optim.lr=1e-3"]).recipe
    assert load_recipe(str(tmp_path / "again.yaml")).recipe == expected
    assert re.search(r"^alpha: 1/8 +# .*470m-r128.yaml:4$", recipe, re.M)
    assert re.search(r"^  width: 1024 +# .*470m.yaml:\d+$", recipe, re.M)
    assert re.search(r"^  lr: 0.001 +# command line$", recipe, re.M)
    assert re.search(r"^  betas: \[0.9, 0.95\] +# .*470m.yaml:\d+$", recipe, re.M)
    assert re.search(r"^  attention: auto$", recipe, re.M)
    assert "# What follows" in numbers


def test_the_numbers_of_a_dry_run_have_their_reasons():
    text = re.sub(r"\s+", " ", dry_run())
    for part in (
        "unique tokens 268,435,456 follows: 8,192 steps x 4,194,304 / 128 repetitions",
        "AR slots 262,144 of 2,097,152 in the run; alpha 1/8",
        "AR passes a token 16 16 over every token; the objectives share each pass",
        "learning rate at 6,144 0.007 falls linearly",
        "parameters 468,700,160 363,842,560 without",
    ):
        assert part in text


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_dry_run_fits_and_is_plain_without_a_terminal(width):
    overrides = ("alpha=1/1000", "repetitions=1300")
    text = dry_run(*overrides, width=width)
    assert "\x1b" not in text and "warning: " in text
    numbers = text[text.index("# What follows") :].splitlines()
    assert max(map(len, numbers)) <= min(width, 100)
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "\x1b" in dry_run(*overrides, width=width, terminal=True)


def test_a_dry_run_without_a_vocabulary_says_so():
    text = dry_run("data.build=null", name="quickstart")
    assert "unknown  the vocabulary is the dataset's" in text
