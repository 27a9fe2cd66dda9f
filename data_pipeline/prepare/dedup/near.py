"""Pairs that are nearly the same, found among those that share a band and compared exactly.

Where a band is one hash (GPT-3's), nearly all documents share one with nearly all others, and to compare all pairs of a
bucket, as Spark's approxSimilarityJoin does, is to compare all pairs there are. Here each document is compared with the
WINDOW next ones of its bucket, ordered by the other hashes in turn, so that those that share most stand together (the
LSH forest of Bawa et al. 2005); of these only pairs that agree in as many bands as a pair of that similarity has in 99
cases of 100. So the cost is bounded, bands x documents x WINDOW, and what is found is exact: a pair can be missed, none
is taken wrongly. Among more documents than fit in memory, a bucket that doesn't fit is ordered piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from math import comb

import numpy as np
import numpy.typing as npt

from data_pipeline.prepare.dedup.groups import Forest, Indices
from data_pipeline.prepare.dedup.words import U64
from data_pipeline.prepare.recipe_config import MinHashConfig

WINDOW = 16
_MISSED = 0.01  # of the pairs that are similar enough, by asking that they agree in several bands
_GRAMS = 1 << 24  # of the pairs that are compared together
Sets = Callable[[Indices], Iterator[npt.NDArray[np.uint32]]]


def agreement(minhash: MinHashConfig) -> int:
    """Bands in which two agree at least, if their Jaccard similarity is min_jaccard, in 99 cases of 100."""
    p, bands = float(minhash.min_jaccard or 0.0) ** minhash.rows, minhash.bands
    below, k = 0.0, 0
    while k < bands and (below := below + comb(bands, k) * p**k * (1 - p) ** (bands - k)) <= _MISSED:
        k += 1
    return max(1, k)


def join_near(
    rows: Iterable[tuple[Indices, U64, Indices]],
    band: int,
    minhash: MinHashConfig,
    most: int,
    sets: Sets,
    forest: Forest,
) -> None:
    """Join in `forest` those whose n-gram sets have the similarity min_jaccard and that stand together in `band`.

    `rows` are batches of (index [n], bands [bands, n], size of the set [n]); `most` rows are looked at together.
    """
    held: list[tuple[Indices, U64, Indices]] = []
    count = 0
    for batch in rows:
        held.append(batch)
        count += len(batch[0])
        if count > most:
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
    least, needed = float(minhash.min_jaccard or 0.0), agreement(minhash)
    for step in range(1, min(WINDOW, len(index) - 1) + 1):
        agreed = (turned[:, :-step] == turned[:, step:]).sum(axis=0)
        small, large = np.minimum(size[:-step], size[step:]), np.maximum(size[:-step], size[step:])
        fit = (turned[0, :-step] == turned[0, step:]) & (agreed >= needed) & (small / large >= least)
        one, other = index[:-step][fit], index[step:][fit]
        apart = forest.root(one) != forest.root(other)
        both = (small + large)[fit][apart]
        for part in _parts(both):
            near = _similar(one[apart][part], other[apart][part], least, sets)
            forest.join(one[apart][part][near], other[apart][part][near])


def _parts(sizes: Indices) -> Iterator[slice]:
    """Cut where the sizes add up to _GRAMS."""
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // _GRAMS)) + 1
    edges = [0, *cuts.tolist(), len(sizes)]
    yield from (slice(a, b) for a, b in pairwise(edges) if a < b)


def _similar(one: Indices, other: Indices, least: float, sets: Sets) -> npt.NDArray[np.bool_]:
    """Which pairs have a Jaccard similarity of at least `least`, [n]."""
    every, at = np.unique(np.concatenate([one, other]), return_inverse=True)
    found = list(sets(every))
    near = np.zeros(len(one), np.bool_)
    for pair, (a, b) in enumerate(at.reshape(2, -1).T):
        common = len(np.intersect1d(found[a], found[b], assume_unique=True))
        near[pair] = common / (len(found[a]) + len(found[b]) - common) >= least
    return near
