"""The words of a text as 64-bit hashes with their places: numpy's speed, no Python per word.

Text is split at whitespace (`str.isspace`) and lower-cased character by character (the first character of what
`str.lower` makes of it). Two ways to look at the rest:

    Reading.spark   every other character belongs to its word: Spark's Tokenizer
    Reading.bare    punctuation vanishes: Unicode's categories P and S, and the invisible Cc and Cf; a word that is
                    nothing else vanishes with it. "Don't - STOP" is `dont stop`: GPT-3's n-grams (appendix C)

A word's hash is a polynomial of its characters modulo 2^64, mixed; an n-gram's one of its words' hashes. Words that are
different have the same hash about once in 2^64 pairs. It is no shield against who makes collisions on purpose.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from functools import cache
from typing import NamedTuple

import numpy as np

SIZE = 1 << 18  # characters that are looked at together: memory is bounded for a text of any length
_SPACE, _GONE = 0, 1  # what a character is read as; a letter is its lower case's code + 2
_BASE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: it has an inverse
_WORD_BASE, _MIX = 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD  # odd, and without a pattern in their bits
_WHITE = re.compile(r"\s")


class Reading(Enum):
    spark = frozenset[str]()
    bare = frozenset(("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Cc", "Cf"))


class Words(NamedTuple):
    """`hashes` [n] uint64, and the characters [starts, ends) of each, [n] int64, without what vanishes at its ends."""

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def blocks(text: str, reading: Reading) -> Iterator[Words]:
    """The words in order, some at a time. A word longer than SIZE may be cut in several."""
    start = 0
    while start < len(text):
        end = start + SIZE
        white = _WHITE.search(text, end, end + SIZE)
        end = white.end() if white else end + SIZE
        hashes, starts, ends = _words(text[start:end], reading)
        yield Words(hashes, starts + start, ends + start)
        start = end


class Joined:
    """Some texts as one, parted by line breaks: one call of numpy for many; `first` is the first one's number."""

    def __init__(self, first: int, texts: Sequence[str]) -> None:
        self.text, self.first = "\n".join(texts), first
        self.begins = np.cumsum([0, *(len(text) + 1 for text in texts)])  # of each, and of the one that would follow

    def of(self, starts: np.ndarray) -> np.ndarray:
        """Which of the texts characters [n] are in, from 0."""
        return np.searchsorted(self.begins, starts, side="right") - 1


def joined(texts: Sequence[str]) -> Iterator[Joined]:
    """Neighbours, of SIZE characters together or a single longer one."""
    first, held = 0, 0
    for number, text in enumerate(texts):
        if held and held + len(text) > SIZE:
            yield Joined(first, texts[first:number])
            first, held = number, 0
        held += len(text) + 1
    if held:
        yield Joined(first, texts[first:])


def hashes(texts: Sequence[str], reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """(hashes [n] uint64, number of its text [n] int64) of all words of the texts, in order."""
    found, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for group in joined(texts):
        for block in blocks(group.text, reading):
            found.append(block.hashes)
            numbers.append(group.first + group.of(block.starts))
    return np.concatenate(found), np.concatenate(numbers)


def ngrams(words: np.ndarray, lengths: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(n, hashes [words - n + 1] uint64 of the n-grams, by first word) for each of `lengths`, the shortest first."""
    wanted = set(lengths)
    grams = words
    for n in range(1, max(wanted, default=0) + 1):
        if n > 1:
            grams = grams[:-1] * np.uint64(_WORD_BASE) + words[n - 1 :]
        if n in wanted:
            yield n, grams


def _words(text: str, reading: Reading) -> Words:
    chars = _table(reading)[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")]
    kept = None
    if reading.value:
        kept = np.flatnonzero(chars != _GONE)
        chars = chars[kept]
    inside = np.zeros(len(chars) + 2, bool)
    np.not_equal(chars, _SPACE, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    powers, inverses = _powers()
    sums = np.zeros(len(chars) + 1, np.uint64)
    np.cumsum(chars * powers[: len(chars)], out=sums[1:])
    mixed = (sums[ends] - sums[starts]) * inverses[starts]
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(_MIX)
    mixed ^= mixed >> np.uint64(29)
    return Words(mixed, starts, ends) if kept is None else Words(mixed, kept[starts], kept[ends - 1] + 1)


@cache
def _table(reading: Reading) -> np.ndarray:
    """What each character of Unicode is read as, [0x110000] uint32."""
    out = np.arange(2, 0x110002, dtype=np.uint32)
    for code in (*range(0x20000), *range(0xE0000, 0xE1000)):  # elsewhere are ideographs, private use and nothing
        char = chr(code)
        if char.isspace():
            out[code] = _SPACE
        elif reading.value and unicodedata.category(char) in reading.value:
            out[code] = _GONE
        else:
            out[code] = ord(char.lower()[0]) + 2
    return out


@cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """_BASE^i and _BASE^-i modulo 2^64 for the characters of a block."""
    out = np.full((2, 2 * SIZE), 1, np.uint64)
    out[:, 1:] = np.array([[_BASE], [pow(_BASE, -1, 1 << 64)]], np.uint64)
    return np.cumprod(out[0]), np.cumprod(out[1])
