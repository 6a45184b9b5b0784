"""Files of Hugging Face's hub: fetched, or found where they were fetched before."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

_COMMIT = re.compile("[0-9a-f]{40}")


def hub_failures() -> tuple[type[Exception], ...]:
    """What the hub's library raises where it gives nothing; since version 1 httpx's own, too."""
    httpx = sys.modules.get("httpx")
    others = (httpx.HTTPError, httpx.InvalidURL) if httpx else ()
    return (OSError, ValueError, *others)


def fetch_from_hub(repository: str, revision: str, patterns: Iterable[str]) -> Path:
    """Fetch the files of a repository whose names match a pattern.

    Args:
        revision: A branch, a tag or a commit; empty for the main branch.

    Returns:
        Their directory in the hub's cache.

    Raises:
        Exception: One of :func:`hub_failures`.
    """
    from huggingface_hub import snapshot_download

    fetch = partial(
        snapshot_download, repository, revision=revision or None, allow_patterns=[*patterns]
    )
    try:
        return Path(fetch())
    except hub_failures():
        # Without a network version 1 takes only those commits that it has fetched itself.
        if _COMMIT.fullmatch(revision):
            with suppress(*hub_failures()):
                return Path(fetch(local_files_only=True))
        raise
