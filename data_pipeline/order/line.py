"""A pass over one source as a line of places, and the rest of an epoch that an event leaves. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Line:
    """Segments laid end to end, each some windows of one shard. Arrays of [segments] int64, in line order.

    The windows of segment k start at the tokens base[k], base[k] + n_ctx, …; but if list_at[k] is 0 or more, at
    starts[list_at[k]], starts[list_at[k] + 1], …. last[k] says that the segment reaches the end of its shard.
    """

    shard: np.ndarray
    count: np.ndarray
    base: np.ndarray
    last: np.ndarray
    list_at: np.ndarray
    starts: np.ndarray  # [any]
    ends: np.ndarray  # for each segment, the number of places up to its end

    @classmethod
    def of(cls, shard: np.ndarray, count: np.ndarray, base: np.ndarray | None = None, **kept: np.ndarray) -> Line:
        """A line of segments that reach the end of their shards and have no lists, unless `kept` says otherwise."""
        zeros = np.zeros(len(shard), np.int64)
        lists = {"list_at": zeros - 1, "starts": np.empty(0, np.int64)}
        ends = np.cumsum(count)
        return cls(shard, count, zeros if base is None else base, ends=ends, **({"last": zeros == 0} | lists | kept))

    @property
    def windows(self) -> int:
        """The number of windows, which is the number of places."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def start(self, segment: np.ndarray, window: np.ndarray, n_ctx: int) -> np.ndarray:
        """The first token of each window, given by segment and number in the segment: [n]."""
        token = self.base[segment] + window * n_ctx
        listed = self.list_at[segment] >= 0
        if listed.any():
            token[listed] = self.starts[self.list_at[segment[listed]] + window[listed]]
        return token


@dataclass(frozen=True)
class Rest:
    """The windows that an event leaves of an epoch: `line` is the next pass; whole epochs continue from `epoch`."""

    line: Line
    epoch: int
    era: int
    begun: int  # number of epochs of which windows are drawn
    waiting_tokens: int  # in windows of the old length that make none of the new: they wait for the next epoch

    @classmethod
    def none(cls, epoch: int = 0, era: int = 0, begun: int = 0) -> Rest:
        """An empty rest: whole epochs only."""
        nothing = np.empty(0, np.int64)
        return cls(Line.of(nothing, nothing), epoch, era, begun, 0)
