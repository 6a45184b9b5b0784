"""What the fuzzing tests give to the product, and how they see that it ends well."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dualtrain import cli
from dualtrain.common.errors import EXIT_DONE, EXIT_USER_ERROR, UserError

FACTOR = int(os.environ.get("DUALTRAIN_FUZZ", "1"))
"""How many times the usual number of examples are tried, drawn anew; 1: always the same ones."""


def examples(number: int) -> settings:
    """Settings of a fuzzing test with so many examples in the suite."""
    return settings(
        max_examples=number * FACTOR,
        derandomize=FACTOR == 1,
        deadline=None,
        # To say which parts of a failing example matter takes minutes.
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        database=None,
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 7, 64, -1, 10**6, 2**31, 2**63, 10**30, -(2**63)]
    + [0.0, -0.0, 0.1, 1.5, -0.5, 1e-9, 1e-320, 1e39, 1e300, float("inf"), float("nan")]
)
WORDS = st.sampled_from(
    ["", " ", "a", "null", "true", "yes", "~", "1e5", "1/2", "3/0", "1_000", "0x1F", "-", "--", "*"]
    + ["\n", "\t", "\0", "\ufeff", "\u2028", "é", "\U0001f600", "\ud800", "{{", "{% x", "${HOME}"]
    + [
        "<mask:3>",
        "<mask:0>",
        "<mask",
        "</s>",
        "[MASK]",
        "a.b",
        "a: b",
        "..",
        "/",
        "~/x",
        "~nobody",
    ]
    + ["/dev/null", "/proc/self/mem", "x" * 300, "x/" * 2000, "None", "nan", "inf", "builtin:other"]
)
TEXTS = WORDS | st.text(max_size=12)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
"""What JSON and YAML can hold, absurd things among it."""


@st.composite
def changed(draw: Callable[..., Any], value: Any) -> Any:
    """JSON in which one or two places hold something else, or are gone."""
    for _ in range(draw(st.integers(1, 2))):
        value = _changed_once(draw, value)
    return value


def _changed_once(draw: Callable[..., Any], value: Any) -> Any:
    keys = (
        list(value)
        if isinstance(value, dict)
        else list(range(len(value)))
        if (isinstance(value, list))
        else []
    )
    if not keys or draw(st.integers(0, 4)) == 0:
        return draw(VALUES)
    key = draw(st.sampled_from(keys))
    copy = dict(value) if isinstance(value, dict) else list(value)
    if draw(st.integers(0, 3)) == 0:
        del copy[key]
    else:
        copy[key] = _changed_once(draw, copy[key])
    return copy


@st.composite
def damaged(draw: Callable[..., Any], content: bytes) -> bytes:
    """A file in which a piece is missing, is there twice, or is something else."""
    begin = draw(st.integers(0, len(content)))
    end = draw(st.integers(begin, min(len(content), begin + 40)))
    inside = draw(
        st.sampled_from([b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"{", b"]", b'"', b"9" * 30])
        | st.binary(max_size=4)
        | st.just(content[begin:end] * 2)
    )
    return content[:begin] + inside + content[end:]


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code.
        message: What it says of its failure; empty after success.
    """

    code: int
    message: str


def call(*arguments: str) -> Ended:
    """Run a command in this process as ``dualtrain`` does, and see that it ends well."""
    if "data" not in {group.name for group in cli.app.registered_groups}:
        cli.mount_data_tools()
    # As the system hands them over: no argument holds half of a character, but its three bytes.
    given = [os.fsdecode(argument.encode("utf-8", "surrogatepass")) for argument in arguments]
    result = CliRunner().invoke(cli.app, given)
    error = result.exception
    if error is None or isinstance(error, SystemExit):
        message = result.stderr if result.exit_code else ""
        ended = Ended(result.exit_code, message)
    elif isinstance(error, Exception) and (mistake := cli._mistake(error)):
        ended = Ended(EXIT_USER_ERROR, str(mistake))
    else:
        raise error
    assert ended.code in (EXIT_DONE, EXIT_USER_ERROR), (ended, result.output)
    assert bool(ended.message.strip()) == bool(ended.code), ended
    assert "Traceback" not in result.output + ended.message
    assert "Traceback" not in result.stderr
    return ended


def refuses_or_returns(function: Callable[[], Any]) -> Any:
    """What a function returns; None where it refuses with a message."""
    try:
        return function()
    except UserError as error:
        assert str(error).strip() and "Traceback" not in str(error)
        return None
