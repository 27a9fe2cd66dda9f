"""Permutations that depend on their key alone. Numpy only."""

from __future__ import annotations

import numpy as np


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), [n], that depends on `key` alone, on every machine and with every version of numpy.

    It sorts n different values, so every sorting algorithm gives the same order.
    """
    return np.argsort(outputs(n, *key)).astype(np.int32 if n < 2**31 else np.int64)


def outputs(n: int, *key: int) -> np.ndarray:
    """The first n outputs, [n] uint64, of SplitMix64 with the folded key as seed."""
    folded = 0
    for part in key:
        folded = int(splitmix64(folded ^ part, 1)[0])
    return splitmix64(folded, n)


def splitmix64(seed: int, n: int) -> np.ndarray:
    """The first n outputs of SplitMix64, [n] uint64, all different (Steele, Lea and Flood, OOPSLA 2014)."""
    z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def groups(values: np.ndarray) -> list[np.ndarray]:
    """The rows of each distinct value, in ascending order of the values."""
    rows = np.argsort(values, kind="stable")
    return np.split(rows, np.flatnonzero(np.diff(values[rows])) + 1)
