"""The source of each draw: a table of one period, in which every source is as even as it can be. Numpy only.

With integer weights c_s that add up to P, lane l's i-th draw is of the source T[(i + l + r) mod P]. T is Tijdeman's
solution of the chairman assignment problem (Discrete Mathematics 32, 1980): of k sources, each has been drawn c_s t / P
times after t entries, give or take 1 - 1/(2k - 2). So

*   any P draws in a row of a lane hold each source exactly c_s times, and from T's first entry on a lane is never a
    whole window away from a source's share; over any stretch of draws it is less than 2;
*   the L lanes draw, in one column, L entries of T in a row, so that a column too holds each source's share give or
    take less than 2: no step is drawn from one source alone if the others' share of L is 2 or more;
*   r is the first entry from which all lanes together stay closest to the shares. That is within one window for each
    lane at every step: proved for one lane and for two sources, found so for up to ten;
*   the number of draws of a source before a lane's i-th draw is a division and a look-up: N_s(i + l) - N_s(l), with
    N_s(j) = (j div P) c_s + (the number of s in T, from r on, before j mod P).

A shuffled table would be uneven by some square root of P, and equal offsets into an even one can meet the same source
in every lane (docs/decisions/0005-order-of-a-mixture.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np

from conf.errors import UserError

MAX_PERIOD = 4096  # entries


def quantise(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights as integers: exact, with the smallest sum, if that is at most 4,096; otherwise parts of 4,096.

    0 stays 0, and every other weight becomes at least 1. Parts of 4,096 are dealt by the largest remainder.

    Raises:
        UserError: no weight above 0, or one that is negative or not finite.
    """
    if not all(0 <= w < float("inf") for w in weights.values()) or not any(weights.values()):
        raise UserError(f"weights {dict(weights)}: give numbers of 0 or more, at least one above 0")
    exact = {name: Fraction(repr(float(w))) for name, w in weights.items()}  # 0.1 is meant as a tenth
    total = sum(exact.values())
    shares = {name: w / total for name, w in exact.items()}
    period = lcm(*(share.denominator for share in shares.values()))
    if period <= MAX_PERIOD:
        return {name: int(share * period) for name, share in shares.items()}
    counts = {name: max(int(share * MAX_PERIOD), int(share > 0)) for name, share in shares.items()}
    if len(counts) > MAX_PERIOD:
        raise UserError(f"{len(counts)} sources: give at most {MAX_PERIOD}, or merge some into one")
    while (left := MAX_PERIOD - sum(counts.values())) != 0:  # less than one for each source
        gap = {name: (share * MAX_PERIOD - counts[name]) * (1 if left > 0 else -1) for name, share in shares.items()}
        open_to = [name for name in counts if left > 0 or counts[name] > 1]
        counts[max(open_to, key=lambda name: gap[name])] += 1 if left > 0 else -1
    return counts


class Mixture:
    """The table of weights `counts` for `lanes` lanes; sources are their numbers in it.

    table: [P], the source of each entry, from r on. counts: [S].
    """

    def __init__(self, counts: tuple[int, ...], lanes: int) -> None:
        self.counts = np.array(counts, dtype=np.int64)
        self.period = int(self.counts.sum())
        table = np.array(_table(counts), dtype=np.int64)
        self.table = np.roll(table, -_first_entry(table, self.counts, lanes))
        is_source = self.table == np.arange(len(counts))[:, None]
        self._before = np.concatenate([np.zeros((len(counts), 1), np.int64), np.cumsum(is_source, axis=1)], axis=1)
        self._entries = [np.flatnonzero(row) for row in is_source]

    def draw(self, column: np.ndarray, lane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each lane's draw number `column`, and the windows of it that the lane drew before: [n] each."""
        source = self.table[(column + lane) % self.period]
        return source, self.drawn(source, lane, column)

    def drawn(self, source: np.ndarray | int, lane: np.ndarray, draws: np.ndarray | int) -> np.ndarray:
        """The number of draws of `source` among the first `draws` draws of a lane."""
        return self._among(source, lane + draws) - self._among(source, lane)

    def column_of(self, source: int, lane: np.ndarray, number: np.ndarray) -> np.ndarray:
        """The draw that is the lane's `number`-th of `source`, counted from 0: the inverse of `draw`."""
        number = number + self._among(source, lane)
        count, entries = self.counts[source], self._entries[source]
        return number // count * self.period + entries[number % count] - lane

    def _among(self, source: np.ndarray | int, entries: np.ndarray) -> np.ndarray:
        """The number of entries of `source` among the first `entries` of the table, repeated for ever."""
        return entries // self.period * self.counts[source] + self._before[source, entries % self.period]


def _first_entry(table: np.ndarray, counts: np.ndarray, lanes: int) -> int:
    """r: the entry from which the lanes' draws, added up, are never further from the shares than they must be."""
    period, sources = len(table), np.arange(len(counts))[:, None]
    # draws of each source less its share before each entry, in P-ths of a window, for one lane
    surplus = np.cumsum(period * (table == sources) - counts[:, None], axis=1)
    surplus = np.concatenate([surplus[:, -1:], surplus[:, :-1]], axis=1)
    sums = np.cumsum(np.concatenate([0 * sources, surplus, surplus], axis=1), axis=1)
    some = lanes % period  # whole periods of lanes add the same to every entry
    total = sums[:, some : some + period] - sums[:, :period]
    highest, lowest = total.max(axis=1, keepdims=True), total.min(axis=1, keepdims=True)
    return int(np.maximum(highest - total, total - lowest).max(axis=0).argmin())


@lru_cache(maxsize=64)
def _table(counts: tuple[int, ...]) -> list[int]:
    period, drawn = sum(counts), [0] * len(counts)
    sources = [s for s, c in enumerate(counts) if c]
    scale = max(1, 2 * (len(sources) - 1))
    common = lcm(*(counts[s] for s in sources))  # so that deadlines are compared as integers
    table = []
    for t in range(1, period + 1):
        behind = {s: scale * (counts[s] * t - period * drawn[s]) for s in sources}
        due = [s for s in sources if behind[s] >= period] if len(sources) > 1 else sources
        first = min(due, key=lambda s: (period * (scale - 1) - behind[s]) * (common // counts[s]))
        drawn[first] += 1
        table.append(first)
    return table
