"""Files that others made: read whole, or named for what they are.

Whoever reads a tokenizer, a configuration or weights asks here, so that a file that is not what its
name says (a pointer of Git LFS, a pickle, a web page) is called by its own name everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtrain.common.errors import UserError
from dualtrain.common.files import in_utf8

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LARGEST_POINTER = 1024
"""Bytes of a pointer of Git LFS, at most."""

_HEAD_BYTES = 512
_SAVE = "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR) writes safetensors"
_POINTER = (
    b"version https://git-lfs",
    "is a pointer of Git LFS, not the file itself",
    "`git lfs pull` in its repository fetches the file",
)
_KINDS = (
    _POINTER,
    (b"\x1f\x8b", "is compressed by gzip", "decompress it"),
    (b"PK\x03\x04", "is a zip archive, such as torch.save writes", _SAVE),
    (b"\x80", "is a pickle, a program that would run when it is opened", _SAVE),
    (b"GGUF", "is a GGUF file", ""),
    (b"<!doctype html", "is a web page: the download failed", "download the file again"),
    (b"<html", "is a web page: the download failed", "download the file again"),
)
_SENTENCEPIECE = (
    "is a SentencePiece model",
    "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes a tokenizer.json beside it",
)


def pointer_problem(file: Path | str) -> UserError | None:
    """What to say of a pointer of Git LFS; None for any other file, and one that cannot be read."""
    begin, what, hint = _POINTER
    if (_head(file) or b"").startswith(begin):
        return UserError(in_utf8(file), what, hint=hint)
    return None


def find_foreign(file: Path, expected: str) -> UserError | None:
    """Find out whether a file is known to be of another kind.

    Args:
        file: Any file; one that cannot be read is left to its reader.

    Returns:
        What to say if it is empty, a pointer of Git LFS, a pickle, or the like.
    """
    head = _head(file)
    if head is None:
        return None
    if not head:
        return UserError(str(file), "is empty", expected)
    for begin, what, hint in _KINDS:
        if head.lower().startswith(begin.lower()):
            return UserError(str(file), what, expected, hint)
    # Pieces of text, each with its length before it; the unknown one is among the first.
    if head.startswith(b"\n") and b"<unk>" in head and b"\x00" in head:
        return UserError(str(file), _SENTENCEPIECE[0], expected, _SENTENCEPIECE[1])
    return None


def _head(file: Path | str) -> bytes | None:
    try:
        with open(file, "rb") as stream:
            return stream.read(_HEAD_BYTES)
    except OSError:
        return None


def refuse_foreign(file: Path, expected: str) -> None:
    """Raise UserError if :func:`find_foreign` has something to say."""
    if error := find_foreign(file, expected):
        raise error from None


def read_text(file: Path, expected: str) -> str:
    """Read a text file in UTF-8."""
    try:
        return file.read_bytes().decode()
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        refuse_foreign(file, expected)
        what = "is not text in UTF-8"
    raise UserError(str(file), what, expected)


def read_object(file: Path, expected: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        expected: What it is taken for, for messages.
    """
    text = read_text(file, expected)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse_foreign(file, expected)
        raise UserError(str(file), f"is not JSON: {error}", expected) from None
    if not isinstance(value, dict):
        raise UserError(str(file), f"holds a {type(value).__name__}", f"{expected}, a JSON object")
    return value


def parse_tokenizer(file: Path) -> Tokenizer:
    """Read a ``tokenizer.json`` that takes all text literally."""
    from tokenizers import Tokenizer

    text = read_text(file, "a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        refuse_foreign(file, "a tokenizer.json")
        raise UserError(str(file), f"cannot be read: {error}", "a tokenizer.json") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # It would add special tokens, which is done here, and cut spaces off the offsets of tokens.
    tokenizer.post_processor = None
    return tokenizer


def check_name(path: Path) -> None:
    """Raise UserError unless a name is text: safetensors takes no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        expected = "a name in UTF-8: the library for weights takes no other"
        raise UserError(str(path), "has a name that is not UTF-8", expected, "rename it") from None


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Open a file of safetensors for reading, tensors included.

    Raises:
        UserError: It cannot be read, is of another kind, is cut short, or lacks what is taken.
    """
    from safetensors import SafetensorError, safe_open

    check_name(file)
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except OSError as error:
        what = error.strerror or str(error)
        raise UserError(str(file), f"cannot be read: {what}", "safetensors") from None
    except SafetensorError as error:
        refuse_foreign(file, "safetensors")
        raise UserError(
            str(file),
            f"is damaged or cut short: {error}",
            "safetensors",
            "fetch the file again",
        ) from None
