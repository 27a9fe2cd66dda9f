"""Pairs that are nearly the same, found among those that share a band and compared exactly.

If a band is one hash (GPT-3's), nearly all documents share one with nearly all others: comparing all pairs of a bucket,
as Spark's approxSimilarityJoin does, compares nearly all pairs. Here each document is compared with the next WINDOW
ones of its bucket, sorted by the other hashes in turn, so that documents that share many hashes are neighbours (the
LSH forest of Bawa et al. 2005). Of these pairs only those are compared that agree in as many bands as 99 of 100 pairs
of that similarity do. The cost is bounded by bands x documents x WINDOW, and the result is exact: a pair can be missed,
none is taken wrongly. Of more documents than fit in memory, a bucket that does not fit is sorted piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from math import comb

import numpy as np
import numpy.typing as npt

from data_pipeline.prepare.dedup.groups import Forest, Indices
from data_pipeline.prepare.recipe_config import MinHashConfig
from data_pipeline.text.hashing import U64

WINDOW = 16
_MISSED = 0.01  # of the pairs that are similar enough, by asking that they agree in several bands
_GRAMS = 1 << 24  # of the pairs that are compared together
Sets = Callable[[Indices], Iterator[npt.NDArray[np.uint32]]]


def agreement(minhash: MinHashConfig) -> int:
    """Number of bands in which 99 of 100 pairs of the Jaccard similarity min_jaccard agree, or in more."""
    p, bands = float(minhash.min_jaccard or 0.0) ** minhash.rows, minhash.bands
    below, k = 0.0, 0
    while k < bands and (below := below + comb(bands, k) * p**k * (1 - p) ** (bands - k)) <= _MISSED:
        k += 1
    return max(1, k)


def join_near(
    rows: Iterable[tuple[Indices, U64, Indices]],
    band: int,
    minhash: MinHashConfig,
    limit: int,
    sets: Sets,
    forest: Forest,
) -> None:
    """Join in `forest` those whose n-gram sets have the similarity min_jaccard and that are neighbours in `band`.

    `rows` are batches of (index [n], bands [bands, n], size of the set [n]); `limit` rows are compared together.
    """
    held: list[tuple[Indices, U64, Indices]] = []
    count = 0
    for batch in rows:
        held.append(batch)
        count += len(batch[0])
        if count > limit:
            _join(held, band, minhash, sets, forest)
            held, count = [], 0
    if held:
        _join(held, band, minhash, sets, forest)


def _join(
    held: list[tuple[Indices, U64, Indices]], band: int, minhash: MinHashConfig, sets: Sets, forest: Forest
) -> None:
    index, bands, size = (np.concatenate(column, axis=-1) for column in zip(*held, strict=True))
    turned = np.roll(bands, -band, axis=0)
    order = np.lexsort((index, size, *turned[::-1]))
    index, turned, size = index[order], turned[:, order], size[order]
    similarity, needed = float(minhash.min_jaccard or 0.0), agreement(minhash)
    for step in range(1, min(WINDOW, len(index) - 1) + 1):
        agreed = (turned[:, :-step] == turned[:, step:]).sum(axis=0)
        small, large = np.minimum(size[:-step], size[step:]), np.maximum(size[:-step], size[step:])
        fit = (turned[0, :-step] == turned[0, step:]) & (agreed >= needed) & (small / large >= similarity)
        one, other = index[:-step][fit], index[step:][fit]
        apart = forest.root(one) != forest.root(other)
        both = (small + large)[fit][apart]
        for part in _parts(both):
            near = _similar(one[apart][part], other[apart][part], similarity, sets)
            forest.join(one[apart][part][near], other[apart][part][near])


def _parts(sizes: Indices) -> Iterator[slice]:
    """Parts whose sizes add up to _GRAMS."""
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // _GRAMS)) + 1
    yield from (slice(a, b) for a, b in pairwise([0, *cuts.tolist(), len(sizes)]) if a < b)


def _similar(one: Indices, other: Indices, similarity: float, sets: Sets) -> npt.NDArray[np.bool_]:
    """Marks of the pairs that have a Jaccard similarity of `similarity` or more, [n]."""
    every, numbers = np.unique(np.concatenate([one, other]), return_inverse=True)
    grams = list(sets(every))
    near = np.zeros(len(one), np.bool_)
    for pair, (a, b) in enumerate(numbers.reshape(2, -1).T):
        common = len(np.intersect1d(grams[a], grams[b], assume_unique=True))
        near[pair] = common / (len(grams[a]) + len(grams[b]) - common) >= similarity
    return near
