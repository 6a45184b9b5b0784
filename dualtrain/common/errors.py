"""The one exception a user sees, and the exit codes of the command line.

Every layer raises :class:`UserError` for what the user can mend; ``cli`` prints it once, without a
traceback, and leaves with :data:`EXIT_USER_ERROR`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_NON_FINITE_LOSS = 3
EXIT_SAVED_AFTER_SIGNAL = 75


class UserError(Exception):
    """A mistake in what the user gave, with the way out.

    Args:
        where: The place: ``file:line``, a dotted recipe path, a directory, a command-line option.
        what: What is wrong there, quoting the offending value.
        hint: How to fix it, or the nearest valid name.
    """

    def __init__(self, where: str, what: str, expected: str = "", hint: str = "") -> None:
        self.where, self.what, self.expected, self.hint = where, what, expected, hint
        super().__init__(str(self))

    def __reduce__(self) -> tuple[type[UserError], tuple[object, ...]]:
        return type(self), (self.where, self.what, self.expected, self.hint)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.expected:
            text += f" — expected {self.expected}"
        if self.hint:
            text += f" ({self.hint})"
        return text


class UserErrors(UserError):
    """Several mistakes of one kind, found and shown together."""

    def __init__(self, errors: list[UserError]) -> None:
        self.errors = errors
        super().__init__("", "\n".join(str(error) for error in errors))

    def __reduce__(self) -> tuple[type[UserErrors], tuple[object, ...]]:
        return type(self), (self.errors,)


def raise_together(errors: Iterable[UserError]) -> None:
    """Raise all that was found wrong at once; nothing if nothing was."""
    found = list(errors)
    if found:
        raise found[0] if len(found) == 1 else UserErrors(found)


def nearest(word: object, candidates: Iterable[str], *, cutoff: float = 0.5) -> str:
    """A hint at the candidate that a word was meant to be; empty if none is near."""
    near = difflib.get_close_matches(str(word), list(candidates), n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else ""
