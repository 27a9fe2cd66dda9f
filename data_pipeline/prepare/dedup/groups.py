"""Groups of documents with the same key, in bounded memory, and groups joined to larger ones (union-find)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from data_pipeline.prepare.dedup.words import U64

Indices = npt.NDArray[np.int64]
MEMBER_BYTES = 160  # of memory that `settle` takes for each member that it holds: its columns, a copy, the sort
_STRIDE = 1 << 22  # documents at a time, where all are gone through


@dataclass
class Members:
    """Documents by key. The best of a key has the highest score, then the earliest date, then the lowest index."""

    key: U64
    index: Indices
    score: npt.NDArray[np.float32]  # -inf = none
    date: Indices
    size: Indices  # documents that it stands for: its own group's, as far as it is known

    def __len__(self) -> int:
        return len(self.key)

    def take(self, rows: np.ndarray) -> Members:
        return Members(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def plain(cls, key: U64, index: Indices) -> Members:
        """All of one rank, so that the lowest index is the best."""
        zeros = np.zeros(len(key), np.int64)
        return cls(key, index, zeros.astype(np.float32), zeros, zeros + 1)

    @classmethod
    def joined(cls, members: Iterable[Members]) -> Members:
        every = [cls.plain(np.empty(0, np.uint64), np.empty(0, np.int64)), *members]
        return cls(*(np.concatenate([getattr(m, f.name) for m in every]) for f in fields(cls)))


def settle(batches: Iterable[Members], most: int, lose: Callable[[Indices, Indices], None]) -> Members:
    """Of each key the best member; `lose(losers, to)` is told the others' indices, and to whom each lost by then.

    No more than `most` members are held, or twice the keys where that is more, however many share one key.
    """
    held, waiting, count = Members.joined([]), [], 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        if len(held) + count > max(most, 2 * len(held)):
            held, waiting, count = _best(Members.joined([held, *waiting]), lose), [], 0
    return _best(Members.joined([held, *waiting]), lose)


def _best(members: Members, lose: Callable[[Indices, Indices], None]) -> Members:
    order = np.argsort(members.key, kind="stable")
    first = _starts(members.key[order])
    alone = first & np.append(first[1:], True)
    twice = members.take(order[~alone])
    if not len(twice):
        return members
    ranked = twice.take(np.lexsort((twice.index, twice.date, -twice.score, twice.key)))
    starts = np.flatnonzero(_starts(ranked.key))
    best = ranked.take(starts)
    best.size = np.add.reduceat(ranked.size, starts)
    winners = np.repeat(best.index, np.diff(starts, append=len(ranked)))
    lost = ranked.index != winners
    lose(ranked.index[lost], winners[lost])
    return Members.joined([members.take(order[alone]), best])


def _starts(ordered: U64) -> npt.NDArray[np.bool_]:
    """Where a new key begins, [n]."""
    return np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]


class Forest:
    """n documents in sets that are joined pair by pair; a set is named by its lowest index. 8 bytes a document."""

    def __init__(self, n: int) -> None:
        self._parent = np.arange(n)

    def root(self, index: Indices) -> Indices:
        root = self._parent[index]
        while not np.array_equal(above := self._parent[root], root):
            root = above
        return root

    def join(self, one: Indices, other: Indices) -> None:
        """The sets of each pair become one."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        one, other = self.root(one), self.root(other)
        apart = one != other
        if not apart.any():
            return
        roots, at = np.unique(np.concatenate([one[apart], other[apart]]), return_inverse=True)
        pairs = at.reshape(2, -1)
        graph = coo_array((np.ones(pairs.shape[1], np.bool_), (pairs[0], pairs[1])), shape=(len(roots),) * 2)
        _, component = connected_components(graph, directed=False)
        _, lowest = np.unique(component, return_index=True)  # roots are sorted
        self._parent[roots] = roots[lowest][component]

    def flatten(self) -> None:
        """Shorten all ways to the root to one step."""
        for low in range(0, len(self._parent), _STRIDE):
            self._parent[low : low + _STRIDE] = self.root(self._parent[low : low + _STRIDE])

    def joined(self) -> npt.NDArray[np.bool_]:
        """Which documents are in a set of two or more, [n]."""
        found = np.zeros(len(self._parent), np.bool_)
        for low in range(0, len(self._parent), _STRIDE):
            parents = self._parent[low : low + _STRIDE]
            away = parents != np.arange(low, low + len(parents))
            found[low : low + len(parents)] |= away
            found[self.root(parents[away])] = True
        return found
