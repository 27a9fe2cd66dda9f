"""Rows of a batch in which texts lie together that begin alike, so that what they share is computed once.

A row is a trunk, the tokens that all of its texts begin with, and for each text a branch, the rest of it. With the
segments and positions given here (`GPT.hidden`) a token sees the trunk and its own branch, as in its text alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Request:
    """One pair to be scored, as much of it as n_ctx has room for."""

    index: int  # in the caller's list
    context: list[int]
    continuation: list[int]
    cut: int  # tokens that the context has lost

    @property
    def ids(self) -> list[int]:
        return self.context + self.continuation

    @property
    def length(self) -> int:
        """Tokens that the model reads: the last one is a label alone."""
        return len(self.context) + len(self.continuation) - 1


class Row:
    """Requests of one context. A branch holds requests whose texts begin the next one's: it is the last one's text."""

    def __init__(self, branches: list[list[Request]]) -> None:
        self.branches = branches
        self.trunk = _common(branches[0][-1], branches[-1][-1])  # of all, as they are sorted
        self.width = self.trunk + sum(branch[-1].length - self.trunk for branch in branches)

    @property
    def is_plain(self) -> bool:
        """One text from the left to the right."""
        return len(self.branches) == 1

    @property
    def requests(self) -> list[Request]:
        return [r for branch in self.branches for r in branch]

    def joined(self, r: Request) -> Row:
        """The row with a request that comes after its own in `rows`' order."""
        last = self.branches[-1]
        if _common(last[-1], r) == last[-1].length:
            return Row([*self.branches[:-1], [*last, r]])
        return Row([*self.branches, [r]])

    def lay_out(self) -> tuple[list[int], list[int], list[int], list[list[int]]]:
        """Tokens, segments and positions, and for each request the columns that its continuation comes after."""
        tokens = self.branches[0][-1].ids[: self.trunk]
        segments, positions, columns = [0] * self.trunk, list(range(self.trunk)), []
        for segment, branch in enumerate(self.branches, 1):
            end = branch[-1].length
            column = [*range(self.trunk), *range(len(tokens), len(tokens) + end - self.trunk)]
            columns += [column[len(r.context) - 1 : r.length] for r in branch]
            tokens += branch[-1].ids[self.trunk : end]
            segments += [segment] * (end - self.trunk)
            positions += range(self.trunk, end)
        return tokens, segments, positions, columns


def rows(requests: Iterable[Request], n_embd: int, widest: int) -> list[Row]:
    """All requests in rows of at most `widest` tokens, or of one request; a function of the set of them.

    Requests of one context share a row where that costs less than rows of their own: in a layer 12 C² products for a
    token, and 2 C for a pair of tokens, as attention looks at the branches of others before it masks them. So a short
    trunk is not shared by any number of long branches.
    """

    def cost(row: Row) -> int:
        return row.width * (6 * n_embd + row.width)

    out: list[Row] = []
    for r in sorted(requests, key=_order):  # neighbours have most in common
        alone = Row([[r]])
        if out and out[-1].branches[0][0].context == r.context:
            joined = out[-1].joined(r)
            if joined.width <= widest and cost(joined) <= cost(out[-1]) + cost(alone):
                out[-1] = joined
                continue
        out.append(alone)
    return out


def _order(r: Request) -> tuple[list[int], list[int], int]:
    """A text comes right before those that it begins; what is scored of equal texts differs in the last id at most."""
    return r.context, r.continuation[:-1], r.continuation[-1]


def _common(a: Request, b: Request) -> int:
    """Tokens that the model reads at the beginning of both, whose contexts are equal."""
    pairs = zip(a.continuation[:-1], b.continuation[:-1], strict=False)
    least = min(len(a.continuation), len(b.continuation)) - 1
    return len(a.context) + next((i for i, (x, y) in enumerate(pairs) if x != y), least)


def batches(rows: Iterable[Row], batch_size: int, n_ctx: int) -> Iterator[list[Row]]:
    """Batches of no more than `batch_size` rows, or than that number x `n_ctx` tokens, padding included.

    Rows with branches come first, those without after them, as they need no mask; of each the longest first.
    """
    ordered = sorted(rows, key=lambda row: (row.is_plain, -row.width))
    for _, alike in groupby(ordered, key=lambda row: row.is_plain):
        left = list(alike)
        while left:
            n = min(batch_size, batch_size * n_ctx // left[0].width)
            yield left[:n]
            left = left[n:]
