"""The windows of one source, pass after pass. No I/O; numpy only.

*Window* j of a shard is its tokens [j n, (j + 1) n], end inclusive, n = n_ctx. A *lane*'s j-th draw of the source has
the source's *position* q = j L + lane; L is the number of lanes. Positions 0 … W - 1 are epoch 0, the next W epoch 1,
and so on, W being the number of windows. In each epoch:

1.  The shards are shuffled by (seed, epoch) and laid end to end: a *line* of W places, each one window.
2.  The line is cut into L intervals, lane after lane; lane l's has as many places as the epoch has positions of l.
    Since these are every L-th of W consecutive integers, that is W div L, or one more for the W mod L lanes from the
    epoch's first position on (cyclically), so where an interval starts has a closed form.
3.  Lane l's j-th position of the epoch takes the j-th place of its interval, and within the part of one shard that lies
    in the interval, a *run*, the windows are shuffled by (seed, epoch, lane, shard).

Each epoch serves each window exactly once, for any shards and any L:
    The positions of the epoch are W consecutive integers. Lane l owns n_l of them; its j-th takes place j of an
    interval of n_l places: one to one. The n_l add up to W, so the intervals tile the line: positions and places, one
    to one. Permuting each run permutes the line: places and windows, one to one. No remainder is dropped, and a shard
    is cut only where an interval ends, so that it is read by one lane, or by neighbours.

An *event* (another n_ctx, a shard that is lost) ends an `Order` at some count of draws for each lane, and what no
lane has drawn of the epoch it stands in is the first pass of the next `Order` (`after`), cut into intervals like an
epoch. Windows once drawn are in runs used up or in the used part of one; all others are in the rest, once: so the
rest and what was drawn are the epoch. Only another n_ctx costs something: a run that was begun holds windows of the
old length here and there, which make none of the new, and waits for the next epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from conf.errors import UserError

_SHARDS, _RUN, _REST = 0, 1, 2  # what a permutation is for: the second part of its key


@dataclass(frozen=True)
class Line:
    """Segments end to end, each some windows of one shard. All [segments] int64, in line order.

    Segment k's windows start at the tokens base[k], base[k] + n_ctx, …, or, where list_at[k] is 0 or more, at
    starts[list_at[k]], starts[list_at[k] + 1], …; last[k]: it reaches the end of its shard.
    """

    shard: np.ndarray
    count: np.ndarray
    base: np.ndarray
    last: np.ndarray
    list_at: np.ndarray
    starts: np.ndarray  # [any]
    ends: np.ndarray  # the places before the end of each segment

    @classmethod
    def of(cls, shard: np.ndarray, count: np.ndarray, base: np.ndarray | None = None, **kept: np.ndarray) -> Line:
        zeros, none = np.zeros(len(shard), np.int64), np.full(len(shard), -1, np.int64)
        given = {"last": zeros == 0, "list_at": none, "starts": np.empty(0, np.int64), **kept}
        return cls(shard, count, zeros if base is None else base, ends=np.cumsum(count), **given)

    @property
    def windows(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def start(self, segment: np.ndarray, window: np.ndarray, n_ctx: int) -> np.ndarray:
        """The first token of each (segment, window in it): [n]."""
        at = self.base[segment] + window * n_ctx
        listed = self.list_at[segment] >= 0
        if listed.any():
            at[listed] = self.starts[self.list_at[segment[listed]] + window[listed]]
        return at


@dataclass(frozen=True)
class Rest:
    """What an event leaves of an epoch: `line` is the next pass, whole epochs go on from number `epoch`."""

    line: Line
    epoch: int
    era: int
    begun: int  # epochs that windows have been drawn of
    aside_tokens: int  # in windows of the old length that make none of the new: they wait for the next epoch

    @classmethod
    def none(cls, epoch: int = 0, era: int = 0, begun: int = 0) -> Rest:
        """Nothing is left over: whole epochs only."""
        nothing = np.empty(0, np.int64)
        return cls(Line.of(nothing, nothing), epoch, era, begun, 0)


class Order:
    """One source's windows between two events; see the top of the file.

    Args:
        shard_tokens: how many tokens each shard of the manifest holds.
        lanes: fixed for the run.
        seed: fixed for the run.
        lost: shards that are no more.
        rest: what the event before left, where there was one.

    Raises:
        UserError: no window at all, or no lane.
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
        self.shard_tokens, self.n_ctx, self.lanes, self.seed = np.asarray(shard_tokens, np.int64), n_ctx, lanes, seed
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
        """The pass that each position lies in: 0 is the rest of an epoch (it may be empty), 1 the next whole epoch."""
        after = q - self.rest.line.windows
        return np.where(after < 0, 0, 1 + after // self.windows)

    def first(self, number: int) -> int:
        """The first position of a pass."""
        return 0 if number == 0 else self.rest.line.windows + (number - 1) * self.windows

    def epoch(self, draws: float) -> float:
        """How often the source has been gone through after `draws` draws, what earlier orders served included."""
        return self.rest.epoch + (draws - self.rest.line.windows) / self.windows

    def begun(self, draws: np.ndarray) -> int:
        """In how many epochs windows have been drawn, when each lane has drawn `draws`, [lanes], of this order."""
        last = ((draws - 1) * self.lanes + np.arange(self.lanes))[draws > 0]
        return self.rest.epoch + int(self.pass_of(last).max()) if len(last) else self.rest.begun

    def windows_at(self, positions: np.ndarray | range) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers and first tokens of the windows at `positions`: [n] and [n] int64.

        Costs O(log shards) for each position, and O(windows of a shard) where a lane enters a shard.
        """
        q = np.asarray(positions, dtype=np.int64)
        shards, starts = np.empty_like(q), np.empty_like(q)
        passes = self.pass_of(q)
        for number in np.unique(passes):
            at = np.flatnonzero(passes == number)
            shards[at], starts[at] = self._in_pass(int(number), q[at])
        return shards, starts

    def _in_pass(self, number: int, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        line, lane = self.line(number), q % self.lanes
        start, stop = self.interval(number, lane), self.interval(number, lane + 1)
        place = start + (q - self.first(number)) // self.lanes
        k = np.searchsorted(line.ends, place, side="right")  # segments without windows are skipped
        begin = line.ends[k] - line.count[k]
        low, high = np.maximum(begin, start), np.minimum(line.ends[k], stop)  # the run
        window = low - begin
        for rows in _groups(lane * len(line.ends) + k):
            n = rows[0]
            shuffle = self._shuffle(number, int(lane[n]), int(k[n]), int(high[n] - low[n]))
            window[rows] += shuffle[place[rows] - low[n]]
        return line.shard[k], line.start(k, window, self.n_ctx)

    def interval(self, number: int, lane: np.ndarray) -> np.ndarray:
        """Where the interval of `lane` starts in a pass: the places of the lanes below it. Lane L starts at the end."""
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
        """The permutation of a run. A lane only walks on, so only its latest is kept."""
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
        """What an event leaves, when each lane has drawn `draws`, [lanes], windows of this order."""
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
        aside, starts, list_at = 0, np.empty(0, np.int64), np.full(len(shard), -1, np.int64)
        if n_ctx != self.n_ctx:
            end = np.where(last, self.shard_tokens[shard], base + count * self.n_ctx + 1)
            recut = np.where(base < 0, 0, (end - 1 - base) // n_ctx)
            aside = int(np.maximum(count * self.n_ctx - recut * n_ctx, 0)[keep].sum())
            keep, count = keep & (recut > 0), recut
        elif lists:
            starts = np.concatenate(lists)
            list_at[base < 0] = np.cumsum([0, *map(len, lists)])[:-1]
        line = Line.of(shard[keep], count[keep], base[keep], last=last[keep], list_at=list_at[keep], starts=starts)
        return Rest(line, self.rest.epoch + latest, self.rest.era + 1, self.begun(draws), aside)

    def _left(self, number: int, q: np.ndarray, beyond: np.ndarray) -> tuple:
        """The runs of a pass that lanes have not used up: shard, base (-1: listed), count, last [runs]; lists.

        q: [lanes], where each lane stands in the pass, -1 where it does not; beyond: [lanes], it has left the pass.
        """
        line, lanes = self.line(number), np.arange(self.lanes)
        start, stop = self.interval(number, lanes), self.interval(number, lanes + 1)
        used = np.where(beyond, stop, np.where(q < 0, start, start + (q - self.first(number)) // self.lanes))
        cuts = np.unique(np.concatenate([start, line.ends, [0]]))
        low, high = cuts[:-1], cuts[1:]
        lane, k = np.searchsorted(stop, low, side="right"), np.searchsorted(line.ends, low, side="right")
        left = high > used[lane]
        low, high, lane, k = low[left], high[left], lane[left], k[left]
        begin = line.ends[k] - line.count[k]
        listed = (used[lane] > low) | (line.list_at[k] >= 0)
        lists = []
        for r in np.flatnonzero(listed):
            window = np.arange(low[r], high[r]) - begin[r]
            if (from_place := int(used[lane[r]] - low[r])) > 0:
                shuffle = self._run_order(number, int(lane[r]), int(k[r]), int(high[r] - low[r]))
                window = low[r] - begin[r] + shuffle[from_place:]
            lists.append(line.start(np.full(len(window), k[r]), window, self.n_ctx))
        count = high - np.where(listed, np.maximum(low, used[lane]), low)
        base = np.where(listed, -1, line.base[k] + (low - begin) * self.n_ctx)
        return line.shard[k], base, count, line.last[k] & (high == line.ends[k]) & ~listed, lists


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n) that depends on `key` alone, on every machine and with every version of numpy: [n].

    The values sorted are all different, so that no sort can order them otherwise.
    """
    folded = 0
    for part in key:
        folded = int(splitmix64(folded ^ part, 1)[0])
    return np.argsort(splitmix64(folded, n)).astype(np.int32 if n < 2**31 else np.int64)


def splitmix64(seed: int, n: int) -> np.ndarray:
    """The first n outputs of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), all different: [n] uint64."""
    z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _groups(values: np.ndarray) -> list[np.ndarray]:
    """The rows of each distinct value, in ascending order of the values."""
    rows = np.argsort(values, kind="stable")
    return np.split(rows, np.flatnonzero(np.diff(values[rows])) + 1)
