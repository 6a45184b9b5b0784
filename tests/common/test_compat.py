"""Tests of: dualtrain.common.compat: a torchvision that cannot be imported stops nothing else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BROKEN = """
import sys
class Broken:
    # What PyPI's CUDA build does next to a CPU build of torch: leave submodules behind and raise.
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            from importlib.machinery import ModuleSpec
            return ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        sys.modules["torchvision.half_loaded"] = module
        raise RuntimeError("operator torchvision::nms does not exist")
sys.meta_path.insert(0, Broken())
"""
ABSENT = "import sys; sys.modules['torchvision'] = None"


def run(*lines: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


@pytest.mark.parametrize("torchvision", [BROKEN, ABSENT, ""], ids=["broken", "absent", "installed"])
def test_streaming_and_transformers_import(torchvision: str) -> None:
    out = run(
        torchvision,
        "import dualtrain",
        "import streaming",
        "from transformers import LlamaForCausalLM",
        "from streaming import LocalDataset, MDSWriter",
        "import sys",
        "print(LlamaForCausalLM.__name__, 'torchvision.half_loaded' in sys.modules)",
    )
    assert out == "LlamaForCausalLM False"


def test_a_broken_torchvision_is_really_what_is_cured() -> None:
    """Without the cure the same imports fail, so the test above can fail."""
    result = subprocess.run(
        [sys.executable, "-c", BROKEN + "\nimport streaming"], capture_output=True, text=True
    )
    assert "operator torchvision::nms does not exist" in result.stderr


def test_broken_torchvision_looks_absent_afterwards() -> None:
    out = run(
        BROKEN,
        "import dualtrain, transformers, importlib.util",
        "print(importlib.util.find_spec('torchvision'))",
    )
    assert out == "None"


def test_working_torchvision_is_left_alone(tmp_path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("works = True\n")
    out = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})",
        "import dualtrain",
        "from dualtrain.common.compat import hide_broken_torchvision",
        "print(hide_broken_torchvision())",
        "import torchvision",
        "print(torchvision.works)",
    )
    assert out.split() == ["True", "True"]


def test_importing_dualtrain_loads_nothing_heavy() -> None:
    out = run(
        "import sys, dualtrain",
        "print([m for m in ('torch', 'torchvision', 'numpy', 'transformers') if m in sys.modules])",
    )
    assert out == "[]"


def test_streaming_is_imported_in_one_place() -> None:
    """So that another library, or code of our own, can take its place."""
    files = [*(ROOT / "dualtrain").rglob("*.py"), *(ROOT / "data_tools").rglob("*.py")]
    importing = {file.name for file in files if "streaming" in imports_of(file)}
    assert importing == {"mds.py"}


def imports_of(file: Path) -> set[str]:
    """The packages that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_requirements_without_the_pins_of_streaming_are_the_project_s() -> None:
    """All of them, but the library that is installed without its dependencies."""
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[0]
    wanted = {line for line in re.findall(r'^  "(.+)",$', project, re.M) if " :: " not in line}
    lines = (ROOT / "tests" / "requirements-unpinned.txt").read_text().splitlines()
    assert wanted - set(lines) == {"mosaicml-streaming>=0.13,<0.14"}
    assert len(wanted) > 10
