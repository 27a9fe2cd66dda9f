"""Repetition in a text: equal parts, and equal n-grams of words, found by their hashes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from data_pipeline.prepare.text.words import Text
from data_pipeline.text.hashing import Polynomials, ngrams


def repeated(parts: Sequence[str]) -> tuple[int, int]:
    """(number of parts that occurred before, their characters)."""
    if len(set(parts)) == len(parts):
        return 0, 0
    again = Counter(parts)
    return len(parts) - len(again), sum(len(part) * (n - 1) for part, n in again.items())


class Grams:
    """The n-grams of a text's words."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.size = len(text.lengths)  # words
        self.ends = np.concatenate(([0], np.cumsum(text.lengths)))  # [words + 1], characters before each word
        self.joined = "".join(text.runs)
        codes = np.frombuffer(self.joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        self.polynomials = Polynomials.over(codes).pick(self.ends)

    def characters(self, n: int) -> np.ndarray:
        """Length of each n-gram, without blanks between its words."""
        return self.ends[n:] - self.ends[:-n]

    def hashes(self, n: int) -> np.ndarray:
        """Hash of the characters of each n-gram, so that "a bc" is "ab c"."""
        return self.polynomials.between(slice(-n), slice(n, None))

    def most_frequent(self, n: int, above: float) -> int:
        """The characters of the most frequent n-gram (of those, the first), blanks included, times its number; or 0,
        if that is certainly not more than `above`."""
        if self.size < n:
            return 0
        characters = self.characters(n) + (n - 1)
        ((_, hashes),) = ngrams(self.hashes(1), [n])
        ordered = np.sort(hashes)
        often = int(above / int(characters.max()) - 1e-9)  # as often it may occur without being more than `above`
        if often and not (ordered[often:] == ordered[:-often]).any():
            return 0
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        counts = np.diff(starts, append=len(ordered))
        first = np.isin(hashes, ordered[starts[counts == counts.max()]]).argmax()
        return int(characters[first]) * int(counts.max())

    def covered(self, n: int, enough: float) -> int:
        """The characters of the words that lie in an n-gram that occurred before; or a larger number, if that is
        below `enough`."""
        if self.size < n:
            return 0
        hashes = self.hashes(n)
        ordered = np.sort(hashes)
        bound = int(np.count_nonzero(ordered[1:] == ordered[:-1])) * int(self.characters(n).max())
        if bound < enough:
            return bound
        _, first = np.unique(hashes, return_index=True)
        again = np.ones(len(hashes), bool)
        again[first] = False
        depth = np.zeros(self.size + 1, np.int64)
        depth[: len(hashes)] += again
        depth[n:] -= again
        return int(self.text.lengths[np.cumsum(depth[:-1]) > 0].sum())

    def duplicated(self, n: int) -> int:
        """The characters of the n-grams that occurred before, none of which overlap: a walk over the words goes on
        after such an n-gram, and by one word otherwise. N-grams are equal if their characters are."""
        text, ends = self.joined, self.ends.tolist()
        seen: set[str] = set()
        total = word = 0
        while word + n < len(ends):
            gram = text[ends[word] : ends[word + n]]
            if gram in seen:
                total += len(gram)
                word += n
            else:
                seen.add(gram)
                word += 1
        return total
