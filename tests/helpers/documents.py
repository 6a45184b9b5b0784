"""Real English, small, the same on every Python: excerpts of Python 3.11's own documentation.

``documents.jsonl`` holds every twelfth document of ``data_tools.python_docs`` there, its first 1500
characters. Copyright (c) 2001-2023 Python Software Foundation; PSF License Version 2,
https://docs.python.org/3.11/license.html.
"""

from __future__ import annotations

import json
from pathlib import Path


def documents() -> list[str]:
    """The texts, some 47,000 characters in 55 documents."""
    lines = Path(__file__).with_name("documents.jsonl").read_text("utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines if line]
