"""The n-grams of evaluation sets, and a search for them in texts (Brown et al. 2020, appendix C).

Words are in `WordForm.bare`: lower-cased, parted by whitespace, without punctuation. `EvaluationSet.n` words of an
example in a row say that it is dirty: n is the 5th percentile of the set's examples' lengths in words, between 8 and
13. An example with fewer words than n has no n-gram.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_pipeline.text.hashing import Joined, WordForm, Words, blocks, hashes, joined, ngrams

PERCENTILE, MIN_N, MAX_N = 5, 8, 13  # of the examples' lengths; between which n lies


class Table:
    """Sorted hashes, and a bit map that turns most others away at once."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = np.unique(keys)
        bits = min(26, max(10, (16 * len(self.keys)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._seen = np.zeros(1 << bits, bool)
        self._seen[self.keys >> self._shift] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(indices of the `hashes` [n] uint64 that are keys, indices of those keys), both [hits] int64."""
        maybe = np.flatnonzero(self._seen[hashes >> self._shift])
        index = np.searchsorted(self.keys, hashes[maybe])
        hit = index < len(self.keys)
        hit[hit] = self.keys[index[hit]] == hashes[maybe[hit]]
        return maybe[hit], index[hit]


@dataclass(frozen=True)
class EvaluationSet:
    """Examples in order: `lengths` in words [examples]; the hashes [k] of all n-grams of `n` words, each in example
    `of` [k]."""

    name: str
    n: int
    lengths: np.ndarray
    grams: np.ndarray
    of: np.ndarray

    @classmethod
    def of_texts(cls, name: str, texts: Sequence[str], min_n: int = MIN_N) -> EvaluationSet:
        words, of = hashes(texts, WordForm.bare)
        lengths = np.bincount(of, minlength=len(texts))
        fifth = np.percentile(lengths[lengths > 0], PERCENTILE, method="lower") if len(words) else min_n
        n = int(np.clip(fifth, min_n, MAX_N))
        return cls(name, n, lengths, *inside(words, of, n))


class Hits(NamedTuple):
    """n-grams in texts, each [k] int64: number of the text, the n-gram's id, its characters [start, end) there."""

    of: np.ndarray
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class Grams:
    """The n-grams of all sets, and `others` by their length.

    An n-gram's id is its index in the tables put in a row, the shortest n-grams' first.
    """

    def __init__(self, sets: Sequence[EvaluationSet], others: Mapping[int, np.ndarray] | None = None) -> None:
        self.sets = sets
        parts = {n: [grams] for n, grams in (others or {}).items()}
        for s in sets:
            parts.setdefault(s.n, []).append(s.grams)
        self.tables = {n: Table(np.concatenate(parts[n])) for n in sorted(parts)}
        sizes = [len(table.keys) for table in self.tables.values()]
        self.first = dict(zip(self.tables, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        self.size = sum(sizes)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tables: counts that were made with other tables do not fit."""
        digest = hashlib.sha256()
        for n, table in self.tables.items():
            digest.update(f"{n} {len(table.keys)} ".encode() + table.keys.astype("<u8").tobytes())
        return digest.hexdigest()

    def ids_in(self, texts: Sequence[str]) -> np.ndarray:
        """Ids [k] of the n-grams that are in the texts: each once for each text that has it."""
        hits = self.hits(texts, self.tables)
        return np.unique(hits.of * self.size + hits.ids) % self.size

    def dirty(self, s: EvaluationSet, found: np.ndarray) -> np.ndarray:
        """The examples of a set, [examples] bool, of which an n-gram is found; `found` [size] bool, by id."""
        ids = self.first[s.n] + self.tables[s.n].find(s.grams)[1]
        return np.bincount(s.of[found[ids]], minlength=len(s.lengths)) > 0

    def hits(self, texts: Sequence[str], lengths: Iterable[int]) -> Hits:
        """The n-grams of these lengths that are in the texts, in order."""
        hits = [Hits(*[np.empty(0, np.int64)] * 4)]
        hits += [some for group in joined(texts) for some in self._hits_of(group, set(lengths))]
        return Hits(*map(np.concatenate, zip(*hits, strict=True)))

    def _hits_of(self, group: Joined, lengths: set[int]) -> Iterator[Hits]:
        """The hits of each block, which begins with the last words of the block before: n-grams lie across blocks.

        An n-gram across two texts does not count.
        """
        words = Words(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
        for block in blocks(group.text, WordForm.bare):
            keep = max(0, len(words.hashes) - max(lengths) + 1)
            words = Words(*(np.concatenate((old[keep:], new)) for old, new in zip(words, block, strict=True)))
            for n, grams in ngrams(words.hashes, lengths):
                first, index = self.tables[n].find(grams)
                of, starts, ends = group.of(words.starts[first]), words.starts[first], words.ends[first + n - 1]
                inside = ends < group.starts[of + 1]
                of, offsets = of[inside], group.starts[of[inside]]
                yield Hits(
                    group.first + of, self.first[n] + index[inside], starts[inside] - offsets, ends[inside] - offsets
                )


def inside(words: np.ndarray, of: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, numbers of their texts) [k] of the n-grams of `n` words that lie in one text."""
    (_, grams), firsts = next(ngrams(words, [n])), of[: max(0, len(of) - n + 1)]
    inside = firsts == of[n - 1 :]
    return grams[inside], firsts[inside]
