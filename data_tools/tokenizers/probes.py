r"""Texts on which two ways to encode are compared, and on which decoding must give the text back.

They hold what has told tokenizers apart before: scripts, combining marks, emoji sequences, both
normal forms, code, contractions, odd white space, control characters, runs, special-token text.
"""

from __future__ import annotations

import random
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache

_PROSE = (
    "",
    " ",
    "\n",
    "a",
    "The quick brown fox, aged 42, jumps over 1234567 lazy dogs.",
    " A leading space,  two spaces,   three; a tab\tand\t\ttabs \t mixed. Trailing ",
    "\nleading line break\n\n\nempty lines\n \n  \n\tindented\r\n\r\nwindows\rmac\n\n",
    "It's I'll we'VE THEY'RE he'd 'S 'LL don’t it’s ’S 'ſ '' ' s ''s x's's 's",
    "Grüße, façade, naïve, Łódź, İstanbul, ıI, ß ẞ ﬁ ﬆ Å K Ω ǅ ʰ ª º",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم ١٢٣. नमस्ते दुनिया १२३",
    "你好，世界。这是一个测试！日本語のテキスト、カタカナ。한국어 텍스트 각 가",
    "ไทย ภาษา ພາສາ ខ្មែរ မြန်မာ ქართული Հայերեն አማርኛ ᚠᚢᚦ 𐍈 𝒳 𝟙𝟚 Ⅻ ½ ² ①",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇬🇧🇫🇷 ❤️ 1️⃣ ☺ 😀😀😀",
    "e\u0301 \u0301x a\u0308\u0323 \u1112\u1161\u11ab Z\u0351\u036b\u0343 \ufeffbom \u200bzero",
    "a\u2028b\u2029c\x85d\xa0e\u3000f\u2003\u2003g\x0bh\x0ci\u1680j\u180ek\u202fl\u205fm",
    "\x00\x01\x02\x03 a\x02b \x02 \x1b[31m\x7f \x1c\x1d\x1e\x1f x\x1c y\ue000 \uffff \U0010ffff",
    "def f(x: int) -> str:\n    if x >= 10 and not (y[0] != '{}'):\n\t\treturn f\"{x!r}\\n\"\n",
    "#include <stdio.h>\r\nint main(void) {\r\n  /* c */ return a->b + 0x1F; // end\r\n}\r\n",
    '<a href="https://example.org/a/b?c=d&e=f%20g#h">x</a>\n!/\n/ //\n\n/ path\\to\\file',
    "1 12 123 1234 12345 1,000,000.50 -3e10 0x7f 2024-01-31 ٣٤٥٦ 1st v1.2.3",
    "CamelCaseWord HTTPServer snake_case_word SCREAMING_CASE kebab-case mIxEd ǅabc Ǆ",
    "!!! ??? ... --- ___ *** === ### $$$ %%% @@@ ~~~ ``` ^^^ ||| \\\\\\ «»“”‘’—…",
    "<unk> <s> </s> <pad> <mask> a<s>b </s><s> <|endoftext|> <|im_start|>x<|im_end|> [MASK] [CLS]",
    "  \n  ",
    " \n \n",
    "x \n ",
    "x\n\n\n",
    "!\n\n  x",
    "\xa0\xa0x \xa01 \u3000！",
    "\nno leading space",
    "\xa0odd leading space",
)
_REPEATED = (
    " ",
    "\n",
    "\t",
    "\r\n",
    " \n",
    "a",
    "A",
    "7",
    "!",
    "é",
    "中",
    "😀",
    "ab",
    "\xa0",
    "\0",
)
_REPEATS = (2, 3, 4, 7, 16, 129, 1500)


@cache
def probe_texts() -> tuple[str, ...]:
    """Texts for any tokenizer; the same at every call, about 100 kB."""
    runs = (piece * count for piece in _REPEATED for count in _REPEATS)
    embedded = (f"x{piece * 9}y {piece * 5}z" for piece in _REPEATED)
    forms = (unicodedata.normalize(form, text) for form in ("NFC", "NFD") for text in _PROSE)
    return (*_PROSE, *runs, *embedded, *forms, _class_borders(), *_random_texts())


def token_texts(tokens: Sequence[str], *, chunk: int = 400) -> list[str]:
    """Texts that hold every token's own text, in an order that has nothing to do with the ids."""
    shuffled = list(tokens)
    random.Random(0).shuffle(shuffled)
    return ["".join(shuffled[i : i + chunk]) for i in range(0, len(shuffled), chunk)]


def _class_borders() -> str:
    """Characters on both sides of every change of category: two Unicode versions differ there."""
    before, borders = "", []
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category == before:
            continue
        borders += [c for c in (code - 1, code) if c >= 0 and not 0xD800 <= c <= 0xDFFF]
        before = category
    # In the midst of letters, so that a character of another class divides them.
    return "".join(f"a{chr(c)}a {chr(c)}1" for c in borders)


def _random_texts() -> list[str]:
    """Short pieces of all kinds next to each other in ways nobody would write."""
    source = random.Random(1)
    pieces = [*_REPEATED, *"abcXYZ019 .,'\"/-_\r\n\t", "  ", "\n\n", "'s", "'LL", " the", "ing"]
    return ["".join(source.choices(pieces, k=200)) for _ in range(60)]
