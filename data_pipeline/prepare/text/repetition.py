"""How much of a text is said twice: n-grams of words, of which hashes tell the equal ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from data_pipeline.prepare.text.words import Text

BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse among 64-bit numbers
INVERSE = pow(BASE, -1, 1 << 64)
MIX = 0xD6E8FEB86659FD93  # odd, and not a power of BASE: for n-grams whose words are told apart
SPAN = 1 << 16  # powers are kept of that many


def repeated(parts: Sequence[str]) -> tuple[int, int]:
    """(how many of the parts were there before, their characters)."""
    if len(set(parts)) == len(parts):
        return 0, 0
    again = Counter(parts)
    return len(parts) - len(again), sum(len(part) * (n - 1) for part, n in again.items())


class Grams:
    """The n-grams of a text's words.

    The hash of characters a to b is the sum of character * BASE^k over them, divided by BASE^a, so that one running sum
    gives those of all n-grams of all n at once. All numbers are taken modulo 2^64.
    """

    def __init__(self, text: Text) -> None:
        self.text = text
        self.size = len(text.lengths)  # words
        self.ends = np.concatenate(([0], np.cumsum(text.lengths)))  # [words + 1], characters before each word
        self.joined = "".join(text.runs)
        codes = np.frombuffer(self.joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(codes * powers(BASE, len(codes)))))
        self.sums = sums[self.ends]
        self.shifts = powers(INVERSE, len(codes) + 1)[self.ends]

    def characters(self, n: int) -> np.ndarray:
        """Of each n-gram, without blanks between its words."""
        return self.ends[n:] - self.ends[:-n]

    def hashes(self, n: int) -> np.ndarray:
        """Of the characters of each n-gram, so that "a bc" is "ab c"."""
        return (self.sums[n:] - self.sums[:-n]) * self.shifts[: self.size + 1 - n]

    def most_frequent(self, n: int, above: float) -> int:
        """The characters of the most frequent n-gram (of those, the first), blanks included, times its number; or 0,
        where that is certainly not more than `above`."""
        if self.size < n:
            return 0
        characters = self.characters(n) + (n - 1)
        words = self.hashes(1)
        hashes = words[: len(characters)]
        for i in range(1, n):
            hashes = hashes * np.uint64(MIX) + words[i : i + len(characters)]
        ordered = np.sort(hashes)
        often = int(above / int(characters.max()) - 1e-9)  # so often it may be there without being more than `above`
        if often and not (ordered[often:] == ordered[:-often]).any():
            return 0
        begins = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        counts = np.diff(begins, append=len(ordered))
        first = np.isin(hashes, ordered[begins[counts == counts.max()]]).argmax()
        return int(characters[first]) * int(counts.max())

    def covered(self, n: int, enough: float) -> int:
        """The characters of the words that lie in an n-gram that was there before; or a larger number, if that is
        below `enough`."""
        if self.size < n:
            return 0
        hashes = self.hashes(n)
        ordered = np.sort(hashes)
        most = int(np.count_nonzero(ordered[1:] == ordered[:-1])) * int(self.characters(n).max())
        if most < enough:
            return most
        _, first = np.unique(hashes, return_index=True)
        again = np.ones(len(hashes), bool)
        again[first] = False
        depth = np.zeros(self.size + 1, np.int64)
        depth[: len(hashes)] += again
        depth[n:] -= again
        return int(self.text.lengths[np.cumsum(depth[:-1]) > 0].sum())

    def duplicated(self, n: int) -> int:
        """The characters of the n-grams that were there before, none of which overlap: a walk over the words goes on
        behind such a one, and by one word otherwise. N-grams are the same that have the same characters."""
        text, ends = self.joined, self.ends.tolist()
        seen: set[str] = set()
        found = at = 0
        while at + n < len(ends):
            gram = text[ends[at] : ends[at + n]]
            if gram in seen:
                found += len(gram)
                at += n
            else:
                seen.add(gram)
                at += 1
        return found


def powers(base: int, n: int) -> np.ndarray:
    """base^0 .. base^(n-1) modulo 2^64."""
    kept = _powers(base)
    if n <= SPAN:
        return kept[:n]
    steps = np.fromiter(accumulate([pow(base, SPAN, 1 << 64)] * (n // SPAN), lambda a, b: a * b % (1 << 64)), np.uint64)
    return (np.concatenate((np.ones(1, np.uint64), steps))[:, None] * kept).reshape(-1)[:n]


@lru_cache(maxsize=2)
def _powers(base: int) -> np.ndarray:
    factors = np.full(SPAN, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
