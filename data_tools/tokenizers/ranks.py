"""tiktoken encodings and rank files as tokenizers that every reader of ``tokenizer.json`` knows.

A rank file gives each token's bytes and rank, nothing else: the merges are recovered from the ranks
and the division of text comes from a name. The result is compared with tiktoken on the probe texts
before it is used. Nothing is ever downloaded: an encoding that tiktoken would have to fetch is
refused with the ways to get it.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from data_tools.tokenizers.fast import byte_letters
from data_tools.tokenizers.patterns import PATTERN_NAMES, find_pattern, named_pattern
from data_tools.tokenizers.probes import probe_texts, token_texts
from data_tools.tokenizers.tokenizer import Tokenizer
from dualtrain.common.errors import UserError
from dualtrain.common.file_kinds import refuse_foreign
from dualtrain.common.files import user_path

if TYPE_CHECKING:
    import tiktoken

OPTION = "--tokenizer"
PATTERN_OPTION = "--tokenizer-pattern"
MAX_UNUSED = 4096
"""Gaps between ids that are filled without question: encodings keep some for later."""

_OTHER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
_KINDS = "a tokenizer.json, a directory with one, a rank file, or a tiktoken encoding"


def find_tokenizer(spec: str, *, pattern: str | None = None, own_names: bool = False) -> Tokenizer:
    """The tokenizer that ``--tokenizer`` names; nothing is downloaded.

    Args:
        spec: A ``tokenizer.json``, a directory with one, a rank file, or a tiktoken encoding.
        pattern: How a rank file's tokenizer divides text: a known name or a regular expression.
    """
    path = user_path(spec)
    try:
        if path.is_dir():
            path = _file_of(path)
        is_ranks = path.is_file() and not _is_json(path)
    except OSError as error:
        raise UserError(f"{OPTION} {spec}", f"cannot be read: {error.strerror}", _KINDS) from None
    if is_ranks:
        refuse_foreign(path, _KINDS)
        return from_rank_file(path, pattern=pattern, own_names=own_names)
    if pattern is not None:
        raise UserError(
            PATTERN_OPTION,
            f"{spec!r} is not a rank file",
            "a pattern only with a rank file: other tokenizers say how they divide text",
        )
    if path.exists():
        return Tokenizer.load(path, own_names=own_names)
    return from_tiktoken_name(spec, own_names=own_names)


def _file_of(directory: Path) -> Path:
    """The ``tokenizer.json`` of a directory."""
    file = directory / "tokenizer.json"
    if file.is_file():
        return file
    others = [name for name in _OTHER_FILES if (directory / name).is_file()]
    raise UserError(
        str(directory),
        "the directory has no tokenizer.json" + (f", only {', '.join(others)}" if others else ""),
        _KINDS,
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes one" if others else "",
    )


def from_rank_file(path: Path, *, pattern: str | None, own_names: bool = False) -> Tokenizer:
    """The tokenizer of a file of lines ``base64 rank``.

    Args:
        path: The file; read here, since tiktoken caches local files by path and never looks again.
        pattern: A name of :data:`PATTERN_NAMES` or a regular expression; None if the file has the
            name of a well-known encoding.
    """
    import tiktoken

    ranks = read_ranks(path)
    given = pattern or (path.stem if named_pattern(path.stem) else None)
    if given is None:
        raise UserError(
            str(path),
            "a rank file does not say how text is divided",
            f"{PATTERN_OPTION} with one of {', '.join(PATTERN_NAMES)}, or a regular expression",
        )
    known = named_pattern(given) or find_pattern(given)
    try:
        encoding = tiktoken.Encoding(
            path.name,
            pat_str=known.json if known else given,
            mergeable_ranks=ranks,
            special_tokens={},
        )
    except ValueError as error:
        raise UserError(
            PATTERN_OPTION,
            f"{given!r} is not a regular expression: {error}",
            f"one of {', '.join(PATTERN_NAMES)}, or a regular expression",
        ) from None
    return from_encoding(encoding, ranks, where=str(path), own_names=own_names)


def from_tiktoken_name(name: str, *, own_names: bool = False) -> Tokenizer:
    """The tokenizer of a tiktoken encoding that is on this machine."""
    import tiktoken

    names = tiktoken.list_encoding_names()
    if name not in names:
        near = difflib.get_close_matches(name, [*names, *_files_beside(name)], n=3)
        raise UserError(
            OPTION,
            f"there is no tokenizer {name!r}",
            f"{_KINDS} ({', '.join(sorted(names))})",
            f"did you mean {' or '.join(near)}?" if near else "nothing is downloaded by name",
        )
    with _no_downloads(name):
        encoding = tiktoken.get_encoding(name)
    # No public way tells which token has lost its id to a special one.
    where, ranks = f"{OPTION} {name}", encoding._mergeable_ranks
    return from_encoding(encoding, ranks, where=where, own_names=own_names)


def from_encoding(
    encoding: tiktoken.Encoding, ranks: dict[bytes, int], *, where: str, own_names: bool = False
) -> Tokenizer:
    """Write a tiktoken encoding as ``tokenizer.json`` and prove it on the probe texts.

    Ids of ordinary tokens are the ranks, the encoding's special tokens keep theirs, and unused ids
    become special tokens that no text gives. Missing special tokens of ours come last.
    """
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(
            where,
            f"{len(missing)} of the 256 single bytes have no rank, first 0x{missing[0]:02x}",
            "all of them: without them some texts cannot be encoded",
        )
    specials = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    pattern = find_pattern(encoding._pat_str)  # there is no public way to it
    regex = pattern.json if pattern else encoding._pat_str
    content = _tokenizer_json(ranks, specials, regex, where)
    tokenizer = Tokenizer(content, where=where, own_names=own_names)
    texts = [*probe_texts(), *token_texts([t.decode(errors="replace") for t in ranks])]
    for text in texts:
        if tokenizer.encode(text) != encoding.encode_ordinary(text):
            raise UserError(
                where,
                f"the tokenizers library gives other ids than tiktoken for {text[:40]!r}",
                "a division of text that both libraries understand alike",
                f"write the regular expression of {PATTERN_OPTION} without possessive intervals"
                " and with \\z for the end of text"
                if pattern is None
                else "",
            )
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and ranks of a rank file.

    Raises:
        UserError: It cannot be read; a line is not ``base64 rank``; a token or rank comes twice.
    """
    ranks: dict[bytes, int] = {}
    lines_of_ranks: dict[int, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        token, rank = _parse_line(line, f"{path}:{number}")
        if token in ranks:
            first = lines_of_ranks[ranks[token]]
            raise UserError(f"{path}:{number}", f"the token of line {first} again: {token!r}")
        if rank in lines_of_ranks:
            first = lines_of_ranks[rank]
            raise UserError(f"{path}:{number}", f"the rank of line {first} again: {rank}")
        ranks[token], lines_of_ranks[rank] = rank, number
    if not ranks:
        raise UserError(str(path), "the rank file is empty", "lines of a base64 token and a rank")
    return ranks


def _parse_line(line: bytes, where: str) -> tuple[bytes, int]:
    try:
        encoded, rank = line.split()
        token = base64.b64decode(encoded, validate=True)
        if token and rank.isdigit() and int(rank) < 1 << 31:
            return token, int(rank)
    except (ValueError, binascii.Error):
        pass
    shown = line[:40].decode(errors="replace")
    raise UserError(where, f"not a line of a rank file: {shown!r}", "a base64 token and its rank")


def _is_json(path: Path) -> bool:
    if path.suffix in (".tiktoken", ".json"):
        return path.suffix == ".json"
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def _files_beside(name: str) -> list[str]:
    folder = Path(name).parent
    with suppress(OSError):
        return [str(folder / file.name) for file in folder.iterdir()]
    return []


class _WouldDownload(Exception):
    """tiktoken wants to read from the network."""


@contextmanager
def _no_downloads(name: str) -> Iterator[None]:
    """Let tiktoken read its cache and local files only."""
    from tiktoken import load

    read_cached = load.read_file_cached

    def refuse(url: str) -> bytes:
        raise _WouldDownload(url)

    def read_here(place: str, expected_hash: str | None = None) -> bytes:
        if "://" in place:
            return read_cached(place, expected_hash)
        # tiktoken would look for a copy of this local file in its cache, and find an old one.
        data = Path(place).read_bytes()
        if expected_hash and not load.check_hash(data, expected_hash):
            raise UserError(place, f"is not the file that the encoding {name} was made from")
        return data

    try:
        with (
            mock.patch.object(load, "read_file", refuse),
            mock.patch.object(load, "read_file_cached", read_here),
        ):
            yield
    except _WouldDownload as error:
        raise UserError(
            f"{OPTION} {name}",
            f"the encoding is not on this machine; tiktoken would fetch {error}."
            " Nothing was fetched",
            "an encoding in tiktoken's cache",
            "where there is a network run python -c 'import tiktoken;"
            f' tiktoken.get_encoding("{name}")\' with TIKTOKEN_CACHE_DIR=DIR and set it here to a'
            " copy of DIR; or give a local rank file; or leave the tokenizer out to have one"
            " trained",
        ) from None
    except OSError as error:
        raise UserError(f"{OPTION} {name}", f"cannot be loaded: {error}") from None


def _tokenizer_json(
    ranks: dict[bytes, int], specials: dict[str, int], regex: str, where: str
) -> str:
    letters = {byte: letter for letter, byte in byte_letters().items()}
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    by_id = {i: names[token] for token, i in ranks.items()}
    others = _ids_of_no_text(by_id, specials, where)
    # The library numbers added tokens from the end of the model's; ids below are the model's.
    in_model = by_id | {i: name for i, name in others.items() if i < max(by_id)}
    merges = _merges(ranks)
    model = {
        "type": "BPE",
        "vocab": {in_model[i]: i for i in sorted(in_model)},
        "merges": [[names[left], names[right]] for left, right in merges],
        # Only a whole pre-token gives a token that no merge makes, as in tiktoken.
        "ignore_merges": len(merges) + 256 < len(ranks),
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level: dict[str, object] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": others[i], **flags, "special": True} for i in sorted(others)
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": {**byte_level, "use_regex": True},
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False, indent=1)


def _ids_of_no_text(by_id: dict[int, str], specials: dict[str, int], where: str) -> dict[int, str]:
    """Special tokens, and names for the ids that nothing uses: the libraries allow no gaps."""
    names: dict[int, str] = {}
    ordinary = set(by_id.values())
    for name, i in specials.items():
        if i in by_id or i in names or name in ordinary:
            other = by_id.get(i) or names.get(i) or name
            raise UserError(
                where,
                f"the special token {name!r} with id {i} collides with the token {other!r}",
                "an id of its own for every token",
            )
        names[i] = name
    top = max(*by_id, *names)
    unused = top + 1 - len(by_id) - len(names)
    if unused > max(MAX_UNUSED, len(by_id)):
        raise UserError(
            where,
            f"{unused:,} ids below {top:,} have no token",
            f"few gaps: every id costs a row of the embedding, {len(by_id):,} are in use",
        )
    gaps = (i for i in range(top + 1) if i not in by_id and i not in names)
    return names | {i: f"<|unused_{i}|>" for i in gaps}


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that makes each token, in the order of ranks, where there is one."""
    ordered = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    pairs = (_last_pair(token, ranks) for token in ordered)
    return [pair for pair in pairs if pair is not None]


def _last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that merging by rank joins to the token; None if it ends otherwise."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, -1) for a, b in zip(parts, parts[1:], strict=False)]
        best = min((rank for rank in joined if rank >= 0), default=None)
        if best is None:
            return None
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
