"""Output that nobody reads: closed before the start, or lost on the way.

A run of weeks must survive its terminal. Called by ``cli`` and ``start``; a view that loses its
terminal while it is shown is the business of ``progress``.
"""

from __future__ import annotations

import os
import sys


def open_missing_output() -> None:
    """Give a process that was started with closed output (``>&-``) somewhere to write.

    Otherwise the next file that is opened would take the place, and get what is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def forget_output() -> None:
    """Send what is printed from now on nowhere, once nobody reads it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
