"""The kinds of files that text is read from; one more is a module with a ``Format``, and a line.

``csv_files`` is a short one.
"""

from __future__ import annotations

from pathlib import Path

from data_tools.sources.csv_files import CSV, TSV
from data_tools.sources.files import Format
from data_tools.sources.json_files import JSON, JSON_LINES
from data_tools.sources.tables import ARROW, PARQUET
from data_tools.sources.text_files import TEXT
from data_tools.sources.token_files import TOKENS
from dualtrain.common.compression import SUFFIXES
from dualtrain.common.errors import UserError, nearest

FORMATS = [TEXT, JSON_LINES, JSON, CSV, TSV, PARQUET, ARROW, TOKENS]


def find_format(name: str, *, where: str = "--format") -> Format:
    """The format that an option names.

    Raises:
        UserError: There is none of this name.
    """
    names = {format.name: format for format in FORMATS}
    if name not in names:
        what = f"{name!r} is not allowed"
        raise UserError(where, what, "one of " + ", ".join(names), nearest(name, names))
    return names[name]


def format_of(path: Path) -> tuple[Format | None, str | None]:
    """Format and compression, by the name of a file."""
    suffix = path.suffix.lower()
    compression = SUFFIXES.get(suffix)
    if compression is not None:
        suffix = path.with_suffix("").suffix.lower()
    for format in FORMATS:
        if suffix.removeprefix(".") in format.suffixes:
            return (None if compression and format.parts is None else format), compression
    return None, compression


def known_suffixes() -> str:
    """For messages."""
    return ", ".join(f".{suffix}" for format in FORMATS for suffix in format.suffixes)
