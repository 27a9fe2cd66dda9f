"""Groups of documents with the same key, in bounded memory, and groups joined to larger ones (union-find)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from data_pipeline.text.hashing import U64

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
    size: Indices  # documents in its own group, as far as they are known

    def __len__(self) -> int:
        return len(self.key)

    def take(self, rows: np.ndarray) -> Members:
        return Members(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def plain(cls, key: U64, index: Indices) -> Members:
        """Members of one rank, so that the lowest index is the best."""
        zeros = np.zeros(len(key), np.int64)
        return cls(key, index, zeros.astype(np.float32), zeros, zeros + 1)

    @classmethod
    def joined(cls, batches: Iterable[Members]) -> Members:
        every = [cls.plain(np.empty(0, np.uint64), np.empty(0, np.int64)), *batches]
        return cls(*(np.concatenate([getattr(m, f.name) for m in every]) for f in fields(cls)))


def settle(batches: Iterable[Members], limit: int, lose: Callable[[Indices, Indices], None]) -> Members:
    """The best member of each key; `lose(losers, winners)` gets the indices of the others and of whom each lost to.

    It holds up to `limit` members, or twice the keys if that is more, however many share one key.
    """
    held, waiting, count = Members.joined([]), [], 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        if len(held) + count > max(limit, 2 * len(held)):
            held, waiting, count = _best(Members.joined([held, *waiting]), lose), [], 0
    return _best(Members.joined([held, *waiting]), lose)


def _best(every: Members, lose: Callable[[Indices, Indices], None]) -> Members:
    order = np.argsort(every.key, kind="stable")
    first = _starts(every.key[order])
    alone = first & np.append(first[1:], True)
    shared = every.take(order[~alone])
    if not len(shared):
        return every
    ranked = shared.take(np.lexsort((shared.index, shared.date, -shared.score, shared.key)))
    starts = np.flatnonzero(_starts(ranked.key))
    best = ranked.take(starts)
    best.size = np.add.reduceat(ranked.size, starts)
    winners = np.repeat(best.index, np.diff(starts, append=len(ranked)))
    lost = ranked.index != winners
    lose(ranked.index[lost], winners[lost])
    return Members.joined([every.take(order[alone]), best])


def _starts(ordered: U64) -> npt.NDArray[np.bool_]:
    """Marks of the first row of each key, [n]."""
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
        roots, numbers = np.unique(np.concatenate([one[apart], other[apart]]), return_inverse=True)
        pairs = numbers.reshape(2, -1)
        graph = coo_array((np.ones(pairs.shape[1], np.bool_), (pairs[0], pairs[1])), shape=(len(roots),) * 2)
        _, component = connected_components(graph, directed=False)
        _, lowest = np.unique(component, return_index=True)  # roots are sorted
        self._parent[roots] = roots[lowest][component]

    def flatten(self) -> None:
        """Shorten each path to its root to one step."""
        for low in range(0, len(self._parent), _STRIDE):
            self._parent[low : low + _STRIDE] = self.root(self._parent[low : low + _STRIDE])

    def joined(self) -> npt.NDArray[np.bool_]:
        """Marks of the documents that are in a set of two or more, [n]."""
        marks = np.zeros(len(self._parent), np.bool_)
        for low in range(0, len(self._parent), _STRIDE):
            parents = self._parent[low : low + _STRIDE]
            linked = parents != np.arange(low, low + len(parents))
            marks[low : low + len(parents)] |= linked
            marks[self.root(parents[linked])] = True
        return marks
