"""Words of texts as 64-bit hashes, at numpy's speed: no Python per word.

A `WordForm` says how characters are read. Each lowers the case, character by character (the first character of what
`str.lower` makes of it):

    spark   whitespace parts words, every other character belongs to its word: Spark's Tokenizer
    bare    whitespace parts words, punctuation vanishes (Unicode's categories P and S, and the invisible Cc and Cf); a
            word of nothing else vanishes with it. "Don't - STOP" is `dont stop`: GPT-3's n-grams (appendix C)
    plain   whatever is no letter, mark or number parts words; format characters (a soft hyphen) vanish: exact keys
    loose   as plain, without accents, and a number of any digits is 0: FineWeb's MinHash (datatrove's simplify_text)

A word's hash is a polynomial of its characters modulo 2^64, mixed; an n-gram's hash is a polynomial of its words'
hashes. Two different words share a hash once in 2^64 pairs, unless someone makes collisions on purpose. A language that
writes no spaces between words has few, long words. Classes of characters are those of this Python's Unicode.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from functools import cache, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
SIZE = 1 << 18  # characters that are read together: memory is bounded for a text of any length
BASE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: odd, so that it has an inverse modulo 2^64
INVERSE = pow(BASE, -1, 1 << 64)
SPAN = 2 * SIZE  # powers of a base that are kept
FEW = 64  # powers that are kept of a base of which no more are needed
_NGRAM_BASE, _SHINGLE_BASE = 0xD6E8FEB86659FD93, 0xC2B2AE3D27D4EB4F  # odd, and without a pattern in their bits
_FINALIZER = ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53), (33, 1))  # MurmurHash3's (Appleby)
_SHORT_MIX = ((32, 0xFF51AFD7ED558CCD), (29, 1))
_SPACE, _GONE = 0, 1  # values of characters that part words, and of those that vanish
_WHITE = re.compile(r"\s")


class WordForm(Enum):
    spark = "spark"
    bare = "bare"
    plain = "plain"
    loose = "loose"


class Words(NamedTuple):
    """`hashes` [n] uint64, and the characters [starts, ends) of each, [n] int64, without what vanishes at its ends."""

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class Polynomials(NamedTuple):
    """Hashes of stretches of a row of numbers: the sum of number i * BASE^(i - start) modulo 2^64, not mixed.

    `sums` and `shifts` [bounds] are running sums, and powers of BASE's inverse, at the bounds of stretches.
    """

    sums: U64
    shifts: U64

    @classmethod
    def over(cls, numbers: np.ndarray) -> Polynomials:
        """A bound before each number, and one after the last."""
        sums = np.zeros(len(numbers) + 1, np.uint64)
        np.cumsum(numbers * powers(BASE, len(numbers)), out=sums[1:])
        return cls(sums, powers(INVERSE, len(numbers) + 1))

    def pick(self, bounds: np.ndarray) -> Polynomials:
        """The polynomials with only some of the bounds."""
        return Polynomials(self.sums[bounds], self.shifts[bounds])

    def between(self, starts: np.ndarray | slice, ends: np.ndarray | slice) -> U64:
        """Hashes of the stretches between two bounds, [n]."""
        return (self.sums[ends] - self.sums[starts]) * self.shifts[starts]


def pieces(text: str) -> Iterator[tuple[int, str]]:
    """(start, piece) of a text, cut at whitespace, each of SIZE characters or a word more.

    A word longer than SIZE may be cut too.
    """
    start = 0
    while start < len(text):
        end = start + SIZE
        white = _WHITE.search(text, end, end + SIZE)
        end = white.end() if white else end + SIZE
        yield start, text[start:end]
        start = end


def blocks(text: str, form: WordForm) -> Iterator[Words]:
    """The words of a text in order, one piece's at a time."""
    for start, piece in pieces(text):
        hashes, starts, ends = _words(piece, form)
        yield Words(hashes, starts + start, ends + start)


def plain_form(piece: str) -> bytes:
    """The words of a piece in plain form with a separator after each; empty if it has none."""
    chars = values_of_characters(WordForm.plain)[_codes(piece + " ")]
    chars = chars[chars != _GONE]
    keep = chars != _SPACE
    keep[1:] |= keep[:-1]  # the first separator after a word
    return chars[keep].tobytes()


class Joined:
    """Some texts as one, parted by line breaks: one call of numpy for many. `first` is the number of the first one."""

    def __init__(self, first: int, texts: Sequence[str]) -> None:
        self.text = "\n".join(texts)
        self.first = first
        self.starts = np.cumsum([0, *(len(text) + 1 for text in texts)])  # of each, and of the one that would follow

    def of(self, characters: np.ndarray) -> np.ndarray:
        """Numbers, from 0, of the texts that hold these characters, [n]."""
        return np.searchsorted(self.starts, characters, side="right") - 1


def batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Neighbours of SIZE characters together, or a single longer text."""
    first, held = 0, 0
    for number, text in enumerate(texts):
        if held and held + len(text) > SIZE:
            yield texts[first:number]
            first, held = number, 0
        held += len(text) + 1
    if held:
        yield texts[first:]


def joined(texts: Sequence[str]) -> Iterator[Joined]:
    first = 0
    for batch in batches(texts):
        yield Joined(first, batch)
        first += len(batch)


def hashes(texts: Sequence[str], form: WordForm) -> tuple[U64, np.ndarray]:
    """(hashes [n] uint64, number of its text [n] int64) of all words of the texts, in order."""
    words, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for group in joined(texts):
        for block in blocks(group.text, form):
            words.append(block.hashes)
            numbers.append(group.first + group.of(block.starts))
    return np.concatenate(words), np.concatenate(numbers)


def ngrams(words: np.ndarray, lengths: Iterable[int]) -> Iterator[tuple[int, U64]]:
    """(n, hashes [words - n + 1] of the n-grams, by first word) for each of `lengths`, the shortest first."""
    wanted = set(lengths)
    grams = words
    for n in range(1, max(wanted, default=0) + 1):
        if n > 1:
            grams = grams[:-1] * np.uint64(_NGRAM_BASE) + words[n - 1 :]
        if n in wanted:
            yield n, grams


def shingles(texts: Sequence[str], n: int, form: WordForm = WordForm.loose) -> tuple[U64, npt.NDArray[np.int64]]:
    """Mixed hashes of the n-grams of words, text after text, and how many each text has, [texts].

    A text of fewer than n words is one n-gram of all its words; a text without a word has none.
    """
    words, numbers = hashes(texts, form)
    counts = np.bincount(numbers, minlength=len(texts))
    sizes = np.where(counts, np.maximum(counts, n), 0)  # zeros fill up a text of fewer words
    filled = np.cumsum(sizes - counts) - (sizes - counts)
    padded = np.zeros(sizes.sum(), np.uint64)
    padded[np.arange(len(words)) + np.repeat(filled, counts)] = words
    windows = max(0, len(padded) - n + 1)
    grams = np.zeros(windows, np.uint64)
    for k, weight in enumerate(powers(_SHINGLE_BASE, n)):
        grams += padded[k : k + windows] * weight
    of = np.repeat(np.arange(len(texts)), sizes)
    return mix(grams[of[:windows] == of[n - 1 :]]), np.where(counts, sizes - n + 1, 0)


def mix(x: U64, rounds: tuple[tuple[int, int], ...] = _FINALIZER) -> U64:
    """A bijection of 64 bits, in place: each bit of the input changes each bit of the output."""
    for shift, factor in rounds:
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    return x


def powers(base: int, n: int) -> U64:
    """base^0 .. base^(n-1) modulo 2^64."""
    kept = _powers(base, FEW if n <= FEW else SPAN)
    if n <= SPAN:
        return kept[:n]
    steps = np.fromiter(accumulate([pow(base, SPAN, 1 << 64)] * (n // SPAN), lambda a, b: a * b % (1 << 64)), np.uint64)
    return (np.concatenate((np.ones(1, np.uint64), steps))[:, None] * kept).reshape(-1)[:n]


@lru_cache(maxsize=8)
def _powers(base: int, n: int) -> U64:
    factors = np.full(n, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


def _words(text: str, form: WordForm) -> Words:
    chars, kept = values_of_characters(form)[_codes(text)], None
    if form is not WordForm.spark:
        kept = np.flatnonzero(chars != _GONE)
        chars = chars[kept]
    if kept is not None and form is WordForm.loose:
        digit = chars == ord("0")
        digit[1:] &= digit[:-1]
        digit[:1] = False
        kept, chars = kept[~digit], chars[~digit]
    inside = np.zeros(len(chars) + 2, bool)
    np.not_equal(chars, _SPACE, out=inside[1:-1])
    bounds = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = bounds[::2], bounds[1::2]
    hashes = mix(Polynomials.over(chars).between(starts, ends), _FINALIZER if form is WordForm.loose else _SHORT_MIX)
    return Words(hashes, starts, ends) if kept is None else Words(hashes, kept[starts], kept[ends - 1] + 1)


def _codes(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@cache
def values_of_characters(form: WordForm) -> npt.NDArray[np.uint32]:
    """The value of each character of Unicode, [0x110000]: _SPACE, _GONE or what it is hashed as."""
    whole_words = form in (WordForm.spark, WordForm.bare)
    table = np.arange(2, 0x110002, dtype=np.uint32) if whole_words else np.full(0x110000, _SPACE, np.uint32)
    for code in (*range(0x34000), *range(0xE0000, 0xE1000)):  # beyond are private use and nothing
        table[code] = _lowered(chr(code), form) if whole_words else _letter(chr(code), form)
    return table


def _lowered(char: str, form: WordForm) -> int:
    if char.isspace():
        return _SPACE
    kind = unicodedata.category(char)
    if form is WordForm.bare and (kind[0] in "PS" or kind in ("Cc", "Cf")):
        return _GONE
    return ord(char.lower()[0]) + 2


def _letter(char: str, form: WordForm) -> int:
    kind, loose = unicodedata.category(char), form is WordForm.loose
    if kind == "Cf" or (loose and kind == "Mn"):
        return _GONE
    if kind[0] not in "LMN":
        return _SPACE
    if not loose:
        return ord(char.lower()[0])
    if kind == "Nd":
        return ord("0")
    parts = unicodedata.normalize("NFD", char.lower())
    accented = all(unicodedata.category(mark) == "Mn" for mark in parts[1:])  # else a syllable of Korean letters
    return ord(parts[0] if accented else char.lower()[0])
