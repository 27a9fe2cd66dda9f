"""MinHash signatures and their bands (Broder 1997; banding: Leskovec, Rajaraman, Ullman, chapter 3).

Two texts whose sets of word n-grams have the Jaccard similarity J agree in one hash with probability J, in a band of
`rows` hashes with J^rows, and in one band at least with 1 - (1 - J^rows)^bands.

The i-th hash of an n-gram x is a_i * x modulo 2^32, a_i odd and random. x itself is 31 well-mixed bits of a hash of the
words, and odd, so that no x is the minimum of every order. Integer arithmetic alone: the same bytes on each machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_pipeline.prepare.recipe_config import MinHashConfig
from data_pipeline.text.hashing import U64, WordForm, batches, mix, powers, shingles

BLOCK = 2048  # n-grams whose hashes are held at a time: what the cache next to a core holds
_BASE = 0xD6E8FEB86659FD93
_NONE = 2**64 - 1  # no text's n-gram
_MAX = np.uint32(0xFFFFFFFF)


class MinHash:
    def __init__(self, config: MinHashConfig) -> None:
        self.config = config
        hashes = config.bands * config.rows
        start = mix(np.array([config.seed * _BASE % 2**64], np.uint64))
        drawn = mix(np.add(start, np.arange(1, hashes + 1, dtype=np.uint64)))
        self.factors = ((drawn >> np.uint64(32)).astype(np.uint32) | np.uint32(1))[:, None]

    def bands_of(self, texts: Sequence[str]) -> U64:
        """[n, bands] hashes of each band's rows; 0 = none, in all bands of a text without a word. Others are not 0."""
        bands = [self._bands(*self._shingles(batch)) for batch in batches(texts)]
        return np.concatenate([np.empty((0, self.config.bands), np.uint64), *bands])

    def bands_and_sets_of(self, texts: Sequence[str]) -> tuple[U64, npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """As bands_of; the texts' n-grams as sorted sets, one after the other; the end of each set, [n].

        An n-gram is 31 bits of its hash: sets of a and b have a * b / 2^31 in common by chance.
        """
        bands, sets, sizes = [np.empty((0, self.config.bands), np.uint64)], [np.empty(0, np.uint32)], [np.empty(0, int)]
        for batch in batches(texts):
            grams, counts = self._shingles(batch)
            bands.append(self._bands(grams, counts))
            owned = np.repeat(np.arange(len(counts), dtype=np.uint64), counts) << np.uint64(32) | grams
            owned.sort()
            owned = owned[np.diff(owned, prepend=np.uint64(_NONE)) != 0]
            sets.append(owned.astype(np.uint32))
            sizes.append(np.bincount((owned >> np.uint64(32)).astype(np.int64), minlength=len(counts)))
        return np.concatenate(bands), np.concatenate(sets), np.concatenate(sizes).cumsum(dtype=np.int64)

    def _shingles(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        hashes, counts = shingles(texts, self.config.ngram, WordForm.plain if self.config.numbers else WordForm.loose)
        return (hashes >> np.uint64(32)).astype(np.uint32) | np.uint32(1), counts

    def _bands(self, grams: npt.NDArray[np.uint32], counts: npt.NDArray[np.int64]) -> U64:
        bands = np.zeros((len(counts), self.config.bands), np.uint64)
        minima = self._minima(grams, counts[counts > 0])
        by_band = minima.reshape(self.config.bands, self.config.rows, -1).astype(np.uint64)
        weights = powers(_BASE, self.config.rows)
        keys = mix((by_band * weights[:, None]).sum(axis=1, dtype=np.uint64))
        bands[counts > 0] = np.maximum(keys, np.uint64(1)).T
        return bands

    def _minima(self, grams: npt.NDArray[np.uint32], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        """Each hash's minimum over each text's n-grams, [hashes, texts]; every text has one n-gram or more."""
        minima = np.full((len(self.factors), len(counts)), _MAX)
        ends = np.cumsum(counts)
        starts = ends - counts
        products = np.empty((len(self.factors), BLOCK), np.uint32)
        for low in range(0, len(grams), BLOCK):
            block = grams[low : low + BLOCK]
            hashed = np.multiply(self.factors, block, out=products[:, : len(block)])
            first, last = np.searchsorted(ends, low, "right"), np.searchsorted(starts, low + len(block))
            own = minima[:, first:last]
            cuts = np.maximum(starts[first:last] - low, 0)
            np.minimum(own, np.minimum.reduceat(hashed, cuts, axis=1), out=own)
        return minima
