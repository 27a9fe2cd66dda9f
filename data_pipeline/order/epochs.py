"""The windows of one source, pass after pass. No I/O; numpy only. docs/order.md has the definitions and a picture.

*Window* j of a shard is its tokens [j n, (j + 1) n], end inclusive, n = n_ctx. A *lane*'s j-th draw of the source has
the source's *position* q = j L + lane; L is the number of lanes. Positions 0 … W - 1 are epoch 0, the next W epoch 1,
and so on; W is the number of windows. In each epoch:

1.  The shards are shuffled by (seed, epoch) and laid end to end: a *line* of W places, each one window.
2.  The line is cut into L intervals, lane after lane; lane l's interval has as many places as the epoch has positions
    of l. These positions are every L-th of W consecutive integers: W div L of them, and one more for each of the
    W mod L lanes that follow the epoch's first position (cyclically). So the start of an interval has a closed form.
3.  Lane l's j-th position of the epoch takes the j-th place of its interval. A *run* is the part of one shard that is
    in one interval; its windows are shuffled by (seed, epoch, lane, shard).

Each epoch serves each window exactly once, for any shards and any L:
    The positions of the epoch are W consecutive integers. Lane l owns n_l of them; its j-th takes place j of an
    interval of n_l places: one to one. The n_l add up to W, so the intervals tile the line: positions and places, one
    to one. Permuting each run permutes the line: places and windows, one to one. No remainder is dropped, and a shard
    is cut only at the end of an interval, so one lane, or neighbouring lanes, read it.

An *event* (another n_ctx, a lost shard) ends an `Order` at some count of draws for each lane. The windows of the
current epoch that no lane has drawn are the first pass of the next `Order` (`after`), cut into intervals like an
epoch. A drawn window is in a run that is used up, or in the used part of one; every other window is in the rest, once:
so the rest and the drawn windows are the epoch. Only another n_ctx costs something: the rest of a run that had begun
is scattered windows of the old length, which make none of the new length and wait for the next epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from conf.errors import UserError
from data_pipeline.order.line import Line, Rest
from data_pipeline.order.permutation import groups, permutation

_SHARDS, _RUN, _REST = 0, 1, 2  # the use of a permutation: the second part of its key


class Order:
    """One source's windows between two events; see the top of the file.

    Args:
        shard_tokens: how many tokens each shard of the manifest holds.
        lanes: fixed for the run.
        seed: fixed for the run.
        lost: numbers of the shards that are lost.
        rest: the rest of an epoch that the event before left, if there was one.

    Raises:
        UserError: no window, or no lane.
    """

    def __init__(
        self,
        shard_tokens: Sequence[int] | np.ndarray,
        n_ctx: int,
        lanes: int,
        seed: int,
        lost: Sequence[int] = (),
        rest: Rest | None = None,
    ) -> None:
        self.shard_tokens = np.asarray(shard_tokens, np.int64)
        self.n_ctx = n_ctx
        self.lanes = lanes
        self.seed = seed
        self.shard_windows = np.maximum(self.shard_tokens - 1, 0) // n_ctx
        self.shard_windows[list(lost)] = 0
        self.windows = int(self.shard_windows.sum())
        self.rest = rest or Rest.none()
        if self.windows < 1 or lanes < 1:
            raise UserError(
                f"{self.windows} windows of n_ctx={n_ctx} + 1 tokens in {len(self.shard_tokens)} shards, "
                f"{len(lost)} of them lost, data.lanes={lanes}: give at least 1 each"
            )
        self.line = lru_cache(maxsize=2)(self._lay_line)  # a step may end one pass and start the next
        # lane -> its latest (pass, segment), permutation
        self._shuffles: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    def pass_of(self, q: np.ndarray) -> np.ndarray:
        """The pass of each position: 0 is the rest of an epoch (it may be empty), 1 the next whole epoch."""
        after = q - self.rest.line.windows
        return np.where(after < 0, 0, 1 + after // self.windows)

    def first(self, number: int) -> int:
        """The first position of a pass."""
        return 0 if number == 0 else self.rest.line.windows + (number - 1) * self.windows

    def epoch(self, draws: float) -> float:
        """Epochs served after `draws` draws, a fraction; those of earlier orders count too."""
        return self.rest.epoch + (draws - self.rest.line.windows) / self.windows

    def begun(self, draws: np.ndarray) -> int:
        """The number of epochs of which windows are drawn, if each lane has drawn `draws`, [lanes], of this order."""
        last = ((draws - 1) * self.lanes + np.arange(self.lanes))[draws > 0]
        return self.rest.epoch + int(self.pass_of(last).max()) if len(last) else self.rest.begun

    def windows_at(self, positions: np.ndarray | range) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers and first tokens of the windows at `positions`: [n] and [n] int64.

        Costs O(log shards) for each position, and O(windows of a shard) each time a lane enters a shard.
        """
        q = np.asarray(positions, dtype=np.int64)
        shards, starts = np.empty_like(q), np.empty_like(q)
        passes = self.pass_of(q)
        for number in np.unique(passes):
            rows = np.flatnonzero(passes == number)
            shards[rows], starts[rows] = self._in_pass(int(number), q[rows])
        return shards, starts

    def _in_pass(self, number: int, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        line, lane = self.line(number), q % self.lanes
        start, stop = self.interval(number, lane), self.interval(number, lane + 1)
        place = start + (q - self.first(number)) // self.lanes
        k = np.searchsorted(line.ends, place, side="right")  # segments without windows are skipped
        segment_start = line.ends[k] - line.count[k]
        low, high = np.maximum(segment_start, start), np.minimum(line.ends[k], stop)  # the run
        window = low - segment_start
        for rows in groups(lane * len(line.ends) + k):
            n = rows[0]
            shuffle = self._shuffle(number, int(lane[n]), int(k[n]), int(high[n] - low[n]))
            window[rows] += shuffle[place[rows] - low[n]]
        return line.shard[k], line.start(k, window, self.n_ctx)

    def interval(self, number: int, lane: np.ndarray) -> np.ndarray:
        """The first place of a lane's interval in a pass: the places of lower lanes. Lane L starts at the end."""
        first = self.first(number) % self.lanes  # the lane of the pass's first position
        each, more = divmod(self.windows if number else self.rest.line.windows, self.lanes)
        # lanes first … first + more - 1 (mod L) have one place more
        return lane * each + np.clip(lane - first, 0, more) + np.minimum(lane, max(0, first + more - self.lanes))

    def _lay_line(self, number: int) -> Line:
        if number == 0:
            return self.rest.line
        line = permutation(len(self.shard_windows), self.seed, _SHARDS, self.rest.epoch + number - 1)
        return Line.of(line, self.shard_windows[line])

    def _shuffle(self, number: int, lane: int, segment: int, n: int) -> np.ndarray:
        """The permutation of a run. A lane only moves forward, so only its latest is kept."""
        held, shuffle = self._shuffles.get(lane, (None, None))
        if shuffle is None or held != (number, segment):
            shuffle = self._run_order(number, lane, segment, n)
            self._shuffles[lane] = (number, segment), shuffle
        return shuffle

    def _run_order(self, number: int, lane: int, segment: int, n: int) -> np.ndarray:
        if number == 0:
            return permutation(n, self.seed, _REST, self.rest.era, lane, segment)
        shard = int(self.line(number).shard[segment])
        return permutation(n, self.seed, _RUN, self.rest.epoch + number - 1, lane, shard)

    def after(self, draws: np.ndarray, n_ctx: int, lost: Sequence[int]) -> Rest:
        """The rest that an event leaves, if each lane has drawn `draws`, [lanes], windows of this order.

        Args:
            n_ctx: of the next order.
            lost: shards that the next order does not have.
        """
        q = draws * self.lanes + np.arange(self.lanes)
        passes = self.pass_of(q)
        begun, latest = int(passes.min()), int(passes.max())
        parts = [
            self._left(number, np.where(passes == number, q, -1), passes > number)
            for number in range(begun, latest + 1)
        ]
        shard, base, count, last = (np.concatenate([p[i] for p in parts]) for i in range(4))
        lists = [p for part in parts for p in part[4]]
        keep = ~np.isin(shard, list(lost))
        waiting, starts, list_at = 0, np.empty(0, np.int64), np.full(len(shard), -1, np.int64)
        if n_ctx != self.n_ctx:
            end = np.where(last, self.shard_tokens[shard], base + count * self.n_ctx + 1)
            recut = np.where(base < 0, 0, (end - 1 - base) // n_ctx)
            waiting = int(np.maximum(count * self.n_ctx - recut * n_ctx, 0)[keep].sum())
            keep, count = keep & (recut > 0), recut
        elif lists:
            starts = np.concatenate(lists)
            list_at[base < 0] = np.cumsum([0, *map(len, lists)])[:-1]
        line = Line.of(shard[keep], count[keep], base[keep], last=last[keep], list_at=list_at[keep], starts=starts)
        return Rest(line, self.rest.epoch + latest, self.rest.era + 1, self.begun(draws), waiting)

    def _left(self, number: int, q: np.ndarray, beyond: np.ndarray) -> tuple:
        """The runs of a pass that lanes have not used up: shard, base (-1: listed), count, last [runs]; lists.

        Args:
            q: the next position of each lane in the pass, -1 for a lane that is in another pass: [lanes].
            beyond: the lanes that have left the pass: [lanes].
        """
        line, lanes = self.line(number), np.arange(self.lanes)
        start, stop = self.interval(number, lanes), self.interval(number, lanes + 1)
        used = np.where(beyond, stop, np.where(q < 0, start, start + (q - self.first(number)) // self.lanes))
        cuts = np.unique(np.concatenate([start, line.ends, [0]]))
        low, high = cuts[:-1], cuts[1:]
        lane, k = np.searchsorted(stop, low, side="right"), np.searchsorted(line.ends, low, side="right")
        left = high > used[lane]
        low, high, lane, k = low[left], high[left], lane[left], k[left]
        segment_start = line.ends[k] - line.count[k]
        listed = (used[lane] > low) | (line.list_at[k] >= 0)
        lists = []
        for r in np.flatnonzero(listed):
            window = np.arange(low[r], high[r]) - segment_start[r]
            if (from_place := int(used[lane[r]] - low[r])) > 0:
                shuffle = self._run_order(number, int(lane[r]), int(k[r]), int(high[r] - low[r]))
                window = low[r] - segment_start[r] + shuffle[from_place:]
            lists.append(line.start(np.full(len(window), k[r]), window, self.n_ctx))
        count = high - np.where(listed, np.maximum(low, used[lane]), low)
        base = np.where(listed, -1, line.base[k] + (low - segment_start) * self.n_ctx)
        return line.shard[k], base, count, line.last[k] & (high == line.ends[k]) & ~listed, lists

    def positions_of(self, shard: int, limit: int) -> np.ndarray:
        """The positions below `limit` whose window is of `shard`, pass after pass: [n]."""
        lanes = np.arange(self.lanes)
        parts = [np.empty(0, np.int64)]
        for number in range(int(self.pass_of(np.array([max(limit - 1, 0)]))[0]) + 1):
            line, first = self.line(number), self.first(number)
            start = self.interval(number, lanes)
            for k in np.flatnonzero(line.shard == shard):
                place = np.arange(line.ends[k] - line.count[k], line.ends[k])
                lane = np.searchsorted(self.interval(number, lanes + 1), place, side="right")
                parts.append(first + (lane - first) % self.lanes + (place - start[lane]) * self.lanes)
        q = np.concatenate(parts)
        return q[q < limit]
