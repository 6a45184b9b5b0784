"""Tests of: dualtrain.recipe.yaml_source: YAML 1.2 scalars, places, duplicates, the way back."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtrain.common.errors import UserError
from dualtrain.recipe.yaml_source import dump, parse


def value_of(text: str) -> object:
    tree, problems = parse(text, "f.yaml")
    assert not problems
    return tree.plain()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("5", 5),
        ("-7", -7),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("off", "off"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("63/64", "63/64"),
        ("'5'", "5"),
        ("-.INF", -math.inf),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    got = value_of(f"key: {text}")["key"]
    assert got == value and type(got) is type(value)


def test_every_value_has_its_line():
    tree, _ = parse("a: 1\nb:\n  c:\n    - 2\n    - d: 3\n", "f.yaml")
    lines = {path: place.line for path, place in tree.leaves()}
    assert lines == {("a",): 1, ("b", "c", 0): 4, ("b", "c", 1, "d"): 5}
    assert str(tree.locate(("b", "c"))) == "f.yaml:3"
    # Of what is not there, the place of what would hold it.
    assert str(tree.locate(("b", "x", "y"))) == "f.yaml:2"


def test_all_duplicate_keys_are_reported_and_the_first_value_counts():
    tree, problems = parse("a: 1\nb: {c: 1, c: 2}\na: 3\n", "f.yaml")
    assert sorted(str(problem) for problem in problems) == [
        "f.yaml:2: b.c: duplicate key — expected each key once; the first is on line 2",
        "f.yaml:3: a: duplicate key — expected each key once; the first is on line 1",
    ]
    assert tree.plain() == {"a": 1, "b": {"c": 1}}


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: 1\nb: [1,\nc: 2\n", "f.yaml:4", "flow sequence that begins on line 2"),
        ("a: x: y\n", "f.yaml:1", "quotes"),
        ("a:\n\tb: 1\n", "f.yaml:2", "not tabs"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2", "document"),
        ("a: *nowhere\n", "f.yaml:1", "alias"),
        ("a: \x01\n", "f.yaml", "not valid YAML"),
        ("[" * 5000, "f.yaml", "nested too deeply"),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_line(text, where, what):
    with pytest.raises(UserError) as caught:
        parse(text, "f.yaml")
    assert caught.value.where == where
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("1: a\n", "the key '1' is not text"),
        ("a: !!python/object:os.system x\n", "tag"),
        ("a: !mine {b: 1}\n", "tag"),
        ("a: &x [*x]\n", "alias inside its own anchor"),
        ("a: !!int four\n", "not a number"),
        ('a: "\\ud800"\n', "half of a character"),
        ('"\\ud800": 1\n', "the key '\\ud800' has half of a character"),
        ("a: " + "9" * 5000 + "\n", "not a number"),
    ],
)
def test_yaml_that_a_recipe_has_no_use_for_is_reported(text, what):
    _, problems = parse(text, "f.yaml")
    assert len(problems) == 1 and what in str(problems[0])


def test_aliases_that_stand_for_billions_are_refused_at_once():
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{9 * f'*a{i - 1},'}]" for i in range(1, 20))]
    with pytest.raises(UserError, match=r"f\.yaml:\d+: aliases stand for more than 10,000 values"):
        parse("\n".join(lines), "f.yaml")
    assert value_of("a: &a [1]\nb: [*a, *a]\n")["b"] == [[1], [1]]


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"])) | st.sampled_from(
    ["1e5", "yes", "null", "~", "", " ", "1_000", "0x1F", ".5", "12:30", "2024-01-01", "#", "a: b"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_dumped_values_read_back_unchanged_here_and_in_yaml_1_1(values):
    text = dump(values)
    tree, problems = parse(text, "f.yaml")
    assert not problems
    assert json.dumps(tree.plain()) == json.dumps(values)
    # Checkpoints compare recipes by PyYAML's own reader.
    assert json.dumps(yaml.safe_load(text)) == json.dumps(values)
