"""Tests of: style: lint, format, types, who imports whom, with the settings of pyproject.toml."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PYTHON = [sys.executable, "-m"]
COMMANDS = {
    "lint": [*PYTHON, "ruff", "check", "--no-cache", "."],
    "format": [*PYTHON, "ruff", "format", "--no-cache", "--check", "."],
    "types": [*PYTHON, "pyright", "--pythonpath", sys.executable],
    "rooms": [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
}


TYPED = {"torch": "2.13", "transformers": "4.57", "tokenizers": "0.22"}
"""Libraries whose annotations change from version to version, and those that ours agree with."""


@pytest.mark.parametrize("name", COMMANDS)
def test_no_complaints(name):
    found = {library: version(library) for library in TYPED}
    if name == "types" and any(not found[key].startswith(f"{TYPED[key]}.") for key in TYPED):
        pytest.skip(f"types are checked with {TYPED}, here are {found}")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(COMMANDS[name], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_test_file_says_what_it_covers():
    for file in TESTS.rglob("test_*.py"):
        first = file.read_text().partition("\n")[0]
        assert first.startswith('"""Tests of: '), f"{file.relative_to(ROOT)}: {first}"


def test_helpers_stand_in_helpers():
    """What ranks call stands in the test that calls it, and what several tests use in helpers."""
    for file in TESTS.rglob("*.py"):
        folder = file.relative_to(TESTS).parts[0]
        if folder not in ("helpers", "experiments", "benchmarks"):
            assert file.name.startswith("test_") or file.name == "conftest.py", file
        assert not file.stem.endswith("_workers"), file
