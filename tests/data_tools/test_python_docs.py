"""Tests of: data_tools.python_docs: the embedded corpus."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from data_tools.python_docs import _docstrings, python_docs

PRINT_HASH = """
import hashlib, sys
from data_tools.python_docs import python_docs
text = repr(python_docs()).encode()
# These do something visible, or fail, when they are imported.
imported = {"antigravity", "this", "turtle", "tkinter", "idlelib"} & set(sys.modules)
print(hashlib.sha256(text).hexdigest(), sorted(imported))
"""


def test_size_and_kind_of_text() -> None:
    documents = python_docs()
    size = sum(len(text.encode()) for _, text in documents)
    assert 1_500_000 < size < 3_500_000
    assert len(documents) > 400
    words = " ".join(text for _, text in documents).split()
    assert sum(word in {"the", "of", "is", "to", "a"} for word in words) > 0.1 * len(words)
    assert len({name for name, _ in documents}) == len(documents)


def test_character_that_is_no_text_is_written_out(tmp_path: Path) -> None:
    """It would be refused, as in any corpus; Python 3.14 has one."""
    file = tmp_path / "padding.py"
    file.write_text('"""Pad the input with \\0, so that its length is a multiple of four."""')
    (found,) = _docstrings(file, "padding")
    assert "with \\0, so" in found and "\0" not in found


def test_same_text_in_any_process_and_nothing_imported() -> None:
    env = os.environ | {"PYTHONHASHSEED": "7"}
    result = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", PRINT_HASH],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [
        hashlib.sha256(repr(python_docs()).encode()).hexdigest(),
        "[]",
    ]
    assert result.stderr == ""


def test_no_paragraph_stands_in_two_documents() -> None:
    """Held-out documents would be known by heart otherwise: the help topics quote one another."""
    seen: dict[str, str] = {}
    for name, text in python_docs():
        for paragraph in {" ".join(p.split()) for p in text.split("\n\n")}:
            if len(paragraph) >= 40:
                assert seen.setdefault(paragraph, name) == name
