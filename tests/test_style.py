"""Tests of: style: lint, format, types, who imports whom, with the settings of pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable, "-m"]
COMMANDS = {
    "lint": [*PYTHON, "ruff", "check", "--no-cache", "."],
    "format": [*PYTHON, "ruff", "format", "--no-cache", "--check", "."],
    "types": [*PYTHON, "pyright", "--pythonpath", sys.executable],
    "rooms": [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_complaints(name):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(COMMANDS[name], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
