"""The standard streams: closed before the start, lost on the way, or unable to show some text.

A run of weeks must survive its terminal. Called by ``cli`` and ``start``; a view that loses its
terminal while it is shown is the business of ``progress``.
"""

from __future__ import annotations

import io
import os
import sys


def prepare_streams() -> None:
    """Open what was closed (``<&-``, ``>&-``), and let no text fail to be printed.

    Otherwise the next file that is opened would take the place, and get what is printed; and a name
    of a file that is not UTF-8, or a sign that the terminal lacks, would end the program.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if os.environ.get("COLUMNS", "").strip() in ("0", "00"):
        del os.environ["COLUMNS"]  # a terminal without columns; tables would have none
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def forget_output() -> None:
    """Send what is printed from now on nowhere, once nobody reads it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
