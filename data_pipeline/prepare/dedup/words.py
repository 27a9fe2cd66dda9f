"""Text as words and as hashes of word n-grams, by arithmetic over whole arrays of characters: no Python per word.

Two ways to look at a text, character by character; both lower the case, take what is no letter, mark or number for a
space and leave format characters (a soft hyphen) out:

    plain   for exact keys: nothing else
    loose   for near-duplicates, as FineWeb's MinHash reads it (datatrove's simplify_text): accents are left out, and a
            number of any digits is 0

Words are what spaces part, so a language that writes none between them has few words and little that is found.
The classes of characters are the Unicode of the Python that runs (unicodedata.unidata_version).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
SPACE, GONE = 0, 0xFFFFFFFF
BATCH = 1 << 18  # characters that are looked at together, where a text is not longer
_ASSIGNED = (range(0x34000), range(0xE0000, 0xE1000))  # the planes beyond have no letters
_BASE = 0x9E3779B97F4A7C15  # any odd number of well-mixed bits: hashes are polynomials in it, modulo 2^64
_WORD_BASE = 0xC2B2AE3D27D4EB4F
_LONG = 1 << 12  # characters of a word; what comes after is weighed as at the start


def mix(x: U64) -> U64:
    """MurmurHash3's finalizer (Appleby), a bijection of 64 bits, in place: each bit of the input moves each of it."""
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53), (33, 1)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    return x


def powers(base: int, n: int) -> U64:
    """base^0, base^1, ... modulo 2^64, [n]."""
    return np.cumprod(np.array([1, *[base] * (n - 1)], np.uint64), dtype=np.uint64)


def batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """In order, enough at a time to make array operations worth their call."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= BATCH:
            yield held
            held, size = [], 0
    if held:
        yield held


def pieces(text: str) -> Iterator[str]:
    """The text in order, cut where a word ends, so that no array is large; a word longer than BATCH is cut too."""
    start = 0
    while len(text) - start > BATCH:
        cut = max(text.rfind(space, start + 1, start + BATCH) for space in " \n")
        end = cut if cut > start else start + BATCH
        yield text[start:end]
        start = end
    yield text[start:]


def plain(text: str) -> bytes:
    """A piece's plain form: its words with a separator behind each; empty where it has no word."""
    chars = _table(False)[_characters([text])]
    chars = chars[chars != GONE]
    keep = chars != SPACE
    keep[1:] |= keep[:-1]  # the first separator behind a word, which the last one has too
    return chars[keep].tobytes()


def word_hashes(texts: Sequence[str]) -> tuple[U64, npt.NDArray[np.int64]]:
    """A hash of each word of the texts' loose forms, text after text, and how many words each text has, [n]."""
    cut = [list(pieces(text)) for text in texts]
    found = [_word_hashes(batch) for batch in batches([piece for own in cut for piece in own])]
    ends = np.cumsum([len(own) for own in cut])
    counts = np.concatenate([counts for _, counts in found])
    return np.concatenate([hashes for hashes, _ in found]), np.add.reduceat(counts, np.roll(ends, 1) % ends[-1])


def _word_hashes(texts: Sequence[str]) -> tuple[U64, npt.NDArray[np.int64]]:
    chars = _table(True)[_characters(texts)]
    sizes = np.fromiter((len(text) + 1 for text in texts), np.int64, len(texts))
    chars, sizes = _without(chars, chars == GONE, sizes)
    zero = chars == ord("0")
    zero[1:] &= zero[:-1]
    zero[:1] = False
    chars, sizes = _without(chars, zero, sizes)

    inside = chars != SPACE
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    if len(chars) and inside[0]:
        edges = np.concatenate([[0], edges])
    starts, lengths = edges[0::2], edges[1::2] - edges[0::2]  # each text ends in a space
    letters = chars[inside].astype(np.uint64)
    at = np.cumsum(lengths) - lengths
    place = np.arange(len(letters)) - np.repeat(at, lengths)
    letters *= _POWERS[place & (_LONG - 1)]
    hashes = np.add.reduceat(letters, at) if len(at) else np.empty(0, np.uint64)
    counts = np.diff(np.searchsorted(starts, np.cumsum(sizes)), prepend=0)
    return mix(hashes), counts


def ngram_hashes(texts: Sequence[str], n: int) -> tuple[U64, npt.NDArray[np.int64]]:
    """A hash of each n words in a row, text after text, and how many each text has, [texts].

    A text of fewer words is one n-gram of all its words; a text without a word has none.
    """
    words, counts = word_hashes(texts)
    weights = powers(_WORD_BASE, n)
    first = np.cumsum(counts) - counts
    grams = np.minimum(counts, 1) + np.maximum(counts - n, 0)
    starts = np.arange(grams.sum()) + np.repeat(first - (np.cumsum(grams) - grams), grams)
    padded = np.concatenate([words, np.zeros(n, np.uint64)])
    hashes = np.zeros(len(words), np.uint64)
    for k in range(n):
        hashes += padded[k : k + len(words)] * weights[k]
    for text in np.flatnonzero((counts > 0) & (counts < n)):
        own = words[first[text] : first[text] + counts[text]]
        hashes[first[text]] = (own * weights[: len(own)]).sum(dtype=np.uint64)
    return mix(hashes[starts]), grams


def _characters(texts: Sequence[str]) -> npt.NDArray[np.uint32]:
    """Code points, a space behind each text."""
    return np.frombuffer("".join(text + " " for text in texts).encode("utf-32-le", "surrogatepass"), "<u4")


def _without(
    chars: npt.NDArray[np.uint32], drop: npt.NDArray[np.bool_], sizes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """The characters but for some, and the texts' sizes then."""
    if not drop.any():
        return chars, sizes
    return chars[~drop], sizes - np.add.reduceat(drop, np.cumsum(sizes) - sizes, dtype=np.int64)


@cache
def _table(loose: bool) -> npt.NDArray[np.uint32]:
    """What becomes of each code point: another, SPACE or GONE."""
    table = np.full(0x110000, SPACE, np.uint32)
    for block in _ASSIGNED:
        table[block.start : block.stop] = [_fold(chr(point), loose) for point in block]
    return table


def _fold(char: str, loose: bool) -> int:
    kind = unicodedata.category(char)
    if kind == "Cf" or (loose and kind == "Mn"):
        return GONE
    if kind[0] not in "LMN":
        return SPACE
    if not loose:
        return ord(char.lower()[0])
    if kind == "Nd":
        return ord("0")
    apart = unicodedata.normalize("NFD", char.lower())
    accented = all(unicodedata.category(mark) == "Mn" for mark in apart[1:])  # else a syllable of Korean letters
    return ord(apart[0] if accented else char.lower()[0])


_POWERS = powers(_BASE, _LONG)
