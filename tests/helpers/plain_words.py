"""The plain way to find words, and texts that are hard to find them in: for tests of words, grams and cuts."""

from __future__ import annotations

import random
import unicodedata

SPACES = (" ", " ", " ", "\n", "\t", "\u00a0", "\u2003", "\x1f", "\u3000", "  ")
PIECES = [
    "the",
    "The",
    "CAT",
    "don't",
    "“Stop!”",
    "—",
    "...",
    "naïve",
    "NAÏVE",
    "İstanbul",
    "ΣΟΦΟΣ",
    "日本",
    "🙂",
    "x=1",
]
PIECES += ["a\u200bb", "\u00ad", "e\u0301t\u00e9", "ß", "\x00", "№5", "$", "well-known", "ﬁne", "𝔸𝒃", "\U00010400", "ǅ"]
PIECES += ["ab", "\ud800"]


def random_text(rng: random.Random, n: int) -> str:
    return "".join(rng.choice(PIECES) + rng.choice(SPACES) for _ in range(n))


def plain_words(text: str, bare: bool) -> list[tuple[str, int, int]]:
    """(word, start, end) with characters of punctuation left out if `bare`."""
    words, word, indices = [], "", []
    for i, char in enumerate(text + " "):
        if char.isspace():
            if word:
                words.append((word, indices[0], indices[-1] + 1))
            word, indices = "", []
        elif not bare or not (unicodedata.category(char)[0] in "PS" or unicodedata.category(char) in ("Cc", "Cf")):
            word += char.lower()[0]
            indices.append(i)
    return words
