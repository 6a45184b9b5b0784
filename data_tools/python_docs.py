"""A corpus of real English that every Python installation carries: its own documentation.

The reference text behind ``help()`` (``pydoc_data.topics``) and the docstrings of the standard
library, read from the source files and never imported: about 2 MB, with nothing to download. One
document is one help topic or one module. The text differs a little between Python versions.

The topics quote one another at length. A paragraph that occurred before is dropped, or the held-out
documents would stand in the training set.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

# Test suites hold little English; the two others hold text written for other purposes.
_SKIPPED = frozenset({"test", "tests", "idle_test", "pydoc_data", "lib2to3"})
_SHORT = 40

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@lru_cache(maxsize=1)
def python_docs() -> tuple[tuple[str, str], ...]:
    """The corpus as (name, text), in an order that depends on the Python version only."""
    seen: set[str] = set()
    documents = []
    for name, blocks in [*_topics(), *_modules()]:
        kept = [block for block in (_without_repeats(block, seen) for block in blocks) if block]
        if kept:
            documents.append((name, "\n\n".join(kept) + "\n"))
    return tuple(documents)


def _topics() -> Iterator[tuple[str, list[str]]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", [topics[name]]


def _modules() -> Iterator[tuple[str, list[str]]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {file.relative_to(root).parts: file for file in root.rglob("*.py")}
    for parts, file in sorted(files.items()):
        known = parts[0].removesuffix(".py") in sys.stdlib_module_names
        if known and _SKIPPED.isdisjoint(parts):
            name = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
            yield f"module {name}", _docstrings(file, name)


def _docstrings(file: Path, name: str) -> list[str]:
    """The docstrings of a source file in its order, each under the name of what it describes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in files that are not ours
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []  # a template or a file kept broken on purpose
    found: list[str] = []
    _collect(tree, name, found)
    return found


def _collect(node: _Documented, name: str, found: list[str]) -> None:
    if text := ast.get_docstring(node):
        # Python 3.14's base64 writes b'\x00' in a docstring that is not raw.
        text = text.replace("\0", "\\0")
        found.append(f"{name}\n\n{text}")
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _collect(child, f"{name}.{child.name}", found)


def _without_repeats(block: str, seen: set[str]) -> str:
    """Drop the block's paragraphs that are in `seen`, and remember the others."""
    kept = []
    new = False
    for paragraph in block.strip().split("\n\n"):
        words = " ".join(paragraph.split())
        if len(words) >= _SHORT and words in seen:
            continue
        new = new or words not in seen
        seen.add(words)
        kept.append(paragraph.rstrip())
    return "\n\n".join(kept) if new else ""
