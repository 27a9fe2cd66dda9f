"""Features of a document for the quality model: Spark's Tokenizer and HashingTF (Brown et al. 2020, appendix A).

Lower-cased words, parted by whitespace, are counted by their hash modulo `n_features`. Two things differ from Spark:
the hash (`text/hashing.py`, not murmur3: faster in numpy, and as good as any), and a document's counts are divided by
their Euclidean norm, without which a long document's score is 0 or 1 whatever it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.text.hashing import WordForm, hashes


class Features(NamedTuple):
    """A sparse matrix [documents, n_features] by rows: `indices` [k] int32 and `values` [k] float32 that are not 0,
    those of document i from `ends[i]` to `ends[i + 1]`, ascending."""

    ends: np.ndarray
    indices: np.ndarray
    values: np.ndarray


def features(texts: Sequence[str], n_features: int) -> Features:
    """The features of each text, which do not depend on the texts beside it."""
    words, numbers = hashes(texts, WordForm.spark)
    size = np.uint64(n_features)
    keys, counts = np.unique(numbers.astype(np.uint64) * size + words % size, return_counts=True)
    of = (keys // size).astype(np.int64)
    norms = np.sqrt(np.bincount(of, np.square(counts, dtype=np.float64), len(texts)))
    ends = np.searchsorted(of, np.arange(len(texts) + 1))
    return Features(ends, (keys % size).astype(np.int32), (counts / norms[of]).astype(np.float32))


def stacked(rows: Sequence[Features]) -> Features:
    """The rows of all, in order."""
    ends = np.cumsum([0, *(length for row in rows for length in np.diff(row.ends).tolist())])
    return Features(ends, np.concatenate([r.indices for r in rows]), np.concatenate([r.values for r in rows]))
