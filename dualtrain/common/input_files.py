"""Text and JSON from files that users write: prompts, and the data of tasks.

Compressed or not, in UTF-8, and strict: what is wrong is named with its file and line, and nothing
is read as something else without a word.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualtrain.common.errors import UserError

STDIN = "-"
_SPACE = re.compile(r"[ \t\n\r]*")
_OBJECTS = "one JSON object a line, or an array of objects"


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


EACH_KEY_ONCE = json.JSONDecoder(object_pairs_hook=_each_key_once)
"""Refuses an object with a key that is there twice, of which Python would take the last."""


@dataclass(frozen=True)
class InputFile:
    """A file, read and decompressed.

    Attributes:
        suffix: The end of its name in small letters, without that of a compression.
    """

    name: str
    suffix: str
    content: bytes

    @classmethod
    def read(cls, path: Path) -> InputFile:
        """Read a file, or for ``-`` standard input."""
        from dualtrain.common.compression import SUFFIXES, BrokenFile, Content

        is_stdin = str(path) == STDIN
        name = "standard input" if is_stdin else str(path)
        inner = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
        # Without a suffix that says so, a compressed file would be called text that is not UTF-8.
        compression = "detect" if is_stdin else SUFFIXES.get(path.suffix.lower(), "detect")
        if is_stdin and sys.stdin is None:
            raise UserError(name, "is closed", "a file, or something that writes to it")
        try:
            with nullcontext(sys.stdin.buffer) if is_stdin else path.open("rb") as raw:
                content = b"".join(Content(raw, compression))
        except BrokenFile as error:
            raise UserError(name, f"{error.kind}: {error.what}", hint=error.hint) from None
        except OSError as error:
            raise UserError(name, f"cannot be read: {error.strerror or error}") from None
        return cls(name, inner.suffix.lower(), content)

    def text(self) -> str:
        """The content as text.

        Raises:
            UserError: It is not UTF-8; with the line.
        """
        place, what = -1, ""
        try:
            text = self.content.decode()
            # UTF-16 without a mark can be read as UTF-8: every other character would be a zero.
            place, what = self.content.find(b"\0"), "has a zero byte"
        except UnicodeDecodeError as error:
            place, what = error.start, f"byte 0x{self.content[error.start]:02x} is not UTF-8"
        if place >= 0:
            line = 1 + self.content.count(b"\n", 0, place)
            hint = "convert the file, for example with iconv"
            raise UserError(f"{self.name}:{line}", what, "text in UTF-8", hint)
        return text

    def json_parts(self) -> list[tuple[int, str]]:
        """Divide JSON lines, an array, or one object over several lines into the source of each.

        Returns:
            The line where each begins, and its source, as :func:`parse_object` takes it.

        Raises:
            UserError: It is not UTF-8, or an array or object that is not JSON; with the line.
        """
        text = self.text()
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not lines or not (lines[0][1].lstrip().startswith("[") or lines[0][1].strip() == "{"):
            return lines
        line, counted, parts = 1, 0, []
        try:
            for _, start, end in json_values(text, json.JSONDecoder()):
                line, counted = line + text.count("\n", counted, start), start
                parts.append((line, text[start:end]))
        except json.JSONDecodeError as error:
            raise _not_json(f"{self.name}:{error.lineno}", error) from None
        return parts


def parse_object(source: str, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        where: ``FILE:LINE`` of it, for messages.

    Raises:
        UserError: It is something else, or a key is there twice.
    """
    try:
        value = EACH_KEY_ONCE.decode(source)
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from None
    if not isinstance(value, dict):
        raise UserError(where, f"is a JSON {type(value).__name__}", "a JSON object")
    return value


def check_unicode(text: str, where: str) -> None:
    """See that UTF-8 can express a text, as tokenizers and files need it.

    Raises:
        UserError: It holds half of a character, or a byte of an argument that was not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # How Python passes on the bytes of arguments that it cannot decode.
        is_byte = 0xDC80 <= code <= 0xDCFF
        found = f"byte 0x{code - 0xDC00:02x}" if is_byte else f"half of a character, \\u{code:04x},"
        what = f"has the {found} at position {error.start + 1}"
        raise UserError(where, what, "text that UTF-8 can express") from None


def json_values(text: str, decoder: json.JSONDecoder) -> Iterator[tuple[Any, int, int]]:
    """The values of an array, or the only value, each with where it begins and ends.

    Raises:
        JSONDecodeError: The text is not JSON, after the values before that place.
    """
    at = _behind_space(text, 0)
    is_array = text.startswith("[", at)
    if is_array:
        at = _behind_space(text, at + 1)
    more = not (is_array and text.startswith("]", at))
    while more:
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise json.JSONDecodeError(_reason(error), text, at) from None
        yield value, at, end
        at = _behind_space(text, end)
        more = is_array and text.startswith(",", at)
        at = _behind_space(text, at + 1) if more else at
    if is_array:
        if not text.startswith("]", at):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        at = _behind_space(text, at + 1)
    if at < len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _behind_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return match.end() if match else start


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _not_json(where: str, error: Exception) -> UserError:
    return UserError(where, f"is not JSON: {_reason(error)}", _OBJECTS)
