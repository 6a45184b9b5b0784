"""Tests of: whatever a file or a line of data holds, it is read, or refused in a sentence."""

import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from dualtrain.common.errors import UserError
from dualtrain.common.input_files import InputFile, parse_object
from dualtrain.evaluate.templates import Templates, compile_expression, compile_template

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "B", "1", "1.0", "\ud800"])
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "items", "a b", ""]), inner, max_size=3)
    ),
    max_leaves=8,
)
RECORDS = st.fixed_dictionaries(
    {
        "question": VALUES,
        "choices": st.just(["a", "b"]) | st.lists(st.text(min_size=1), min_size=2) | VALUES,
        "gold": st.integers(0, 1) | VALUES,
        "topic": VALUES,
    }
)
PROMPTS = (
    "{{ question }}",
    "{{ question | trim }} {{ topic ~ '' }}",
    "{{ question.text }}",
    "{{ question | join(' ') }}",
    "{{ question | default(topic, true) }}",
    "{{ question | truncate(1) }}",
    "{% for word in question %}{{ word }}{% endfor %}",
)
CHOICES = ("choices", "choices | map('trim') | list", "choices.text")
GOLDS = ("gold", "gold | int", "choices.index(gold)", "gold - 1")


@settings(max_examples=200, deadline=None)
@given(RECORDS, st.sampled_from(PROMPTS), st.sampled_from(CHOICES), st.sampled_from(GOLDS))
def test_any_record_is_an_item_or_a_sentence(record, prompt, choices, gold):
    parts = {
        "prompt": compile_template(prompt),
        "choice": compile_template(" {{ choice }}"),
        "choices": compile_expression(choices),
        "gold": compile_expression(gold),
        "group": compile_expression("topic"),
    }
    try:
        item = Templates(parts, "quiz.yaml").item(record, where="quiz.jsonl:1", line=1)
    except UserError as error:
        assert error.where == "quiz.jsonl:1" and error.what
        return
    assert 0 <= item.gold < len(item.choices)
    for text in (item.prompt, *item.choices, item.group):
        text.encode()  # or neither tokenizers nor files would take it
    # Python's own words for what is no text.
    assert "None" not in item.prompt or "None" in json.dumps(record)
    assert "Undefined" not in item.prompt


def mutated(content: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    for place, new in changes:
        place %= len(content) + 1
        content = content[:place] + new + content[place + len(new) - 1 :]
    return content


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([b'{"a": "b"}\n\n{"a": [1, null]}\r\n', b'[\n{"a": "\\ud83d"},\n{"b": {}}]\n']),
    st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=3)), max_size=4),
)
def test_any_bytes_are_objects_with_their_lines_or_a_sentence(content, changes):
    content = mutated(content, changes)
    try:
        parts = InputFile("file", ".json", content).json_parts()
        found = [parse_object(source, f"file:{line}") for line, source in parts]
    except UserError as error:
        assert re.fullmatch(r"file(:\d+)?", error.where) and error.what
        return
    lines = [line for line, _ in parts]
    assert lines == sorted(lines) and all(1 <= n <= 1 + content.count(b"\n") for n in lines)
    assert all(isinstance(value, dict) for value in found)
