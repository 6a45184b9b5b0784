"""Making what was written last through a loss of power, and never seen half-written."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

from dualtrain.errors import UserError


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write JSON beside its place and give it its name, as :func:`write_bytes`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text beside its place and give it its name, as :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place and give it its name: readers find the old one or the new one.

    Raises:
        UserError: It cannot be written.
    """
    # Several processes, on several machines, may write the same file.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(str(path), f"cannot be written: {error.strerror}") from None
