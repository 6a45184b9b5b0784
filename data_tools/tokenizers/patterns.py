r"""How byte-level tokenizers divide text before merging, in a form that needs no look-ahead.

The patterns in use (GPT-2's, GPT-4's and their relatives) differ from a regular expression in one
place: ``\s+(?!\S)``, "leave the last white space of a run to the next word". That look-ahead costs
half of the speed of tiktoken, and its stack on a long run. Here the place is marked in the text
instead, by a character that the pattern never matches (tiktoken passes over such characters), and
what is left runs in linear time and constant stack.

Used by ``fast`` to encode and by ``ranks`` to write a ``tokenizer.json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MARKS = "\x02\x03\x04\x05\x06\x07\x08" + "".join(map(chr, range(0xE000, 0xF900)))
"""Characters to mark with: the first one that the text has not."""

SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""White space as Rust and Oniguruma see it; Python's own class has four control characters more."""

SEGMENT_CHARS = 1 << 20
"""Long text is encoded in segments of about this size, so that memory does not grow with it."""

# A new pre-token begins here whatever comes before or after, in every pattern below: a space
# after anything else; a line after one line break; CJK punctuation after a letter or a digit.
# The slash is excluded because o200k joins it to line breaks.
_CERTAIN_BOUNDARY = re.compile(
    r"(?<=\S) |(?<=\S\n)(?=[^\s/])|(?<=[^\W_])(?=[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])"
)

_SPACE = re.compile(r"(?<=\S) ")

_BEFORE_LAST_SPACE = re.compile(f"[{SPACES}](?=[{SPACES}][^{SPACES}])")
_BEFORE_LAST_BLANK = re.compile(f"[{SPACES}](?=(?![\r\n])[{SPACES}][^{SPACES}])")


@dataclass(frozen=True)
class Pattern:
    """One way to divide text.

    Args:
        json: As a ``tokenizer.json`` has it, in Oniguruma's syntax.
        plain: The same without look-ahead, to be completed by :meth:`marked_by`; for tiktoken.
        breaks_lines: Line breaks end a pre-token, so no white space is left over after them.
    """

    json: str
    plain: str
    breaks_lines: bool

    def marked_by(self, mark: str) -> str:
        """The pattern for text in which the places are marked by this character."""
        return self.plain.replace("[^", f"[^{mark}")

    def mark(self, text: str, mark: str) -> str:
        """Insert the mark where a look-ahead would divide a run of white space."""
        place = _BEFORE_LAST_BLANK if self.breaks_lines else _BEFORE_LAST_SPACE
        return place.sub(rf"\g<0>{mark}", text)


def segments(text: str, size: int | None = None, *, only_at_spaces: bool = False) -> Iterator[str]:
    """Divide long text at certain pre-token boundaries; where there are none, segments are longer.

    Args:
        size: Shortest length of a segment in characters, but for the last; :data:`SEGMENT_CHARS`.
        only_at_spaces: Every segment but the first begins with a space: for an encoder that puts
            one before any other text.
    """
    size = size or SEGMENT_CHARS
    start = 0
    while len(text) - start > size:
        boundary = (_SPACE if only_at_spaces else _CERTAIN_BOUNDARY).search(text, start + size)
        if boundary is None:
            break
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:] if start else text


def find_pattern(regex: str) -> Pattern | None:
    """The pattern that a file or tiktoken spells in this way, if it is one of those known here."""
    return _SPELLINGS.get(regex)


def named_pattern(name: str) -> Pattern | None:
    """The pattern of a well-known tiktoken encoding."""
    return _NAMES.get(name)


PATTERN_NAMES = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")


_GPT2_JSON = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_TIKTOKEN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2 = Pattern(
    json=_GPT2_JSON,
    plain=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+",
    breaks_lines=False,
)

_GPT4_ENDINGS = r"'(?i:[sdmt]|ll|ve|re)"
_GPT4_ENDINGS_LONG = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT4_REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
_GPT4_POSSESSIVE = r"[^\r\n\p{L}\p{N}]?+\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
_CL100K_TIKTOKEN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
    )
)
_LAST_SPACE = r"|\s+(?!\S)|\s+"

# tiktoken takes all white space at the end of a text as one pre-token, line breaks or not, which
# GPT-4's first pattern and the files made from it do not. Oniguruma has no possessive {1,3}+, and
# its $ is the end of any line.
CL100K = Pattern(
    json=rf"{_GPT4_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s++\z|\s*[\r\n]+|\s+(?!\S)|\s+",
    plain=rf"{_GPT4_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+$|\s*[\r\n]+|\s+",
    breaks_lines=True,
)
O200K = Pattern(json=_O200K + _LAST_SPACE, plain=_O200K + r"|\s+", breaks_lines=True)


def _gpt4_spellings() -> Iterator[tuple[str, Pattern]]:
    """Llama 3, Qwen, nanochat and others: GPT-4's pattern with one, two or three digits a token."""
    for number in (r"\p{N}", r"\p{N}{1,2}", r"\p{N}{1,3}"):
        rest = _GPT4_REST.replace("NUMBER", number)
        pattern = Pattern(
            json=f"{_GPT4_ENDINGS_LONG}|{rest}{_LAST_SPACE}",
            plain=rf"{_GPT4_ENDINGS}|{rest}|\s+",
            breaks_lines=True,
        )
        yield pattern.json, pattern
        possessive = _GPT4_POSSESSIVE.replace("NUMBER", number)
        yield f"{_GPT4_ENDINGS}|{possessive}{_LAST_SPACE}", pattern


_NAMES = {
    "gpt2": GPT2,
    "r50k_base": GPT2,
    "p50k_base": GPT2,
    "cl100k_base": CL100K,
    "o200k_base": O200K,
}
_SPELLINGS: dict[str, Pattern] = {
    _GPT2_JSON: GPT2,
    _GPT2_TIKTOKEN: GPT2,
    _CL100K_TIKTOKEN: CL100K,
    CL100K.json: CL100K,
    O200K.json: O200K,
    **dict(_gpt4_spellings()),
}
