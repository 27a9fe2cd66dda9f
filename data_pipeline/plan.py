"""The order of the data: pure functions from (seed, position) to windows. No I/O; numpy only.

*Window* j of a shard is its tokens [j n_ctx, (j + 1) n_ctx], end inclusive. W is the number of windows of the source,
L the number of lanes. A *position* p = 0, 1, 2, … counts the windows of the run; it lies in epoch e = p // W and is of
lane p % L. In epoch e:

1.  The shards are shuffled by (seed, e) and laid end to end: a line of W places, each one window.
2.  The line is cut into L intervals, lane after lane; lane l's has n(l, e) places, as many as the epoch has positions
    of l. Since these are every L-th of W consecutive integers, n(l, e) is W // L, or one more for the W % L lanes from
    e W % L on (cyclically), so where an interval starts has a closed form.
3.  Lane l's j-th position of the epoch takes the j-th place of its interval, and within the part of one shard that lies
    in the interval, the windows are shuffled by (seed, e, l, shard).

Each epoch serves each window exactly once, for any shards and any L:
    The positions of epoch e are W consecutive integers. Lane l owns n(l, e) of them; its j-th is the one with
    (p - e W) // L = j, and takes place j of an interval of n(l, e) places: one to one. The n(l, e) add up to W, so the
    intervals tile the line: positions and places, one to one. Lane interval and shard meet in one run of places, and
    permuting each run permutes the line: places and windows, one to one. No remainder is dropped, and a shard is cut
    only where an interval ends, so that it is read by one lane, or by neighbours.

The data-parallel size does not matter:
    `Order` has never heard of it. A step takes the positions [p, p + w) of the run, w a multiple of L, so as many from
    each lane; rank r of dp, which divides L, takes those of lanes [r L / dp, (r + 1) L / dp). These sets are disjoint
    and their union is the step's, whatever dp is.

Position is not step: the `Ledger` says where each step stands. A mixture draws, for each lane, a source by a table; the
lane's k-th draw of a source is that source's position k L + lane in an `Order` of its own, so that what is said here
holds for each source.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from data_pipeline.config import UserError

_SHARDS, _WINDOWS = 0, 1  # what a permutation is for: the second part of its key


@dataclass(frozen=True)
class Segment:
    """From `step` on, the run stands at `position` and each step takes `windows_per_step`."""

    step: int
    position: int
    windows_per_step: int

    def position_at(self, step: int) -> int:
        return self.position + (step - self.step) * self.windows_per_step


@dataclass(frozen=True)
class Ledger:
    """Which positions each step took: one segment for the start, one for each event since (a jump, another batch).

    Raises:
        UserError: segments that do not start at step 0, go back, or take no windows.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not self.segments or self.segments[0].step != 0 or self.segments[0].position < 0:
            raise UserError(f"ledger {self.segments}: the first segment starts at step 0 and a position of 0 or more")
        if any(s.windows_per_step < 1 for s in self.segments):
            raise UserError(f"ledger {self.segments}: each step takes at least 1 window")
        for a, b in pairwise(self.segments):
            if b.step < a.step or b.position < a.position_at(b.step):
                raise UserError(
                    f"ledger: step {b.step} at position {b.position} goes back: the step before it ends at position "
                    f"{a.position_at(b.step)} (segment from step {a.step}); windows are never served anew"
                )

    @classmethod
    def start(cls, windows_per_step: int) -> Ledger:
        return cls((Segment(0, 0, windows_per_step),))

    def then(self, step: int, position: int, windows_per_step: int) -> Ledger:
        """This ledger and one more event; raises UserError for one that goes back."""
        return Ledger((*self.segments, Segment(step, position, windows_per_step)))

    def position(self, step: int) -> int:
        """The first position of `step`."""
        return self._at(step).position_at(step)

    def windows_per_step(self, step: int) -> int:
        return self._at(step).windows_per_step

    def step_of(self, position: int) -> int | None:
        """The step that takes `position`; None where an event jumped over it."""
        n = bisect_right(self.segments, position, key=lambda s: s.position) - 1
        if n < 0:
            return None
        segment = self.segments[n]
        step = segment.step + (position - segment.position) // segment.windows_per_step
        jumped = n + 1 < len(self.segments) and step >= self.segments[n + 1].step
        return None if jumped else step

    def to_json(self) -> list[dict[str, int]]:
        return [asdict(s) for s in self.segments]

    @classmethod
    def from_json(cls, body: Any) -> Ledger:
        try:
            segments = tuple(Segment(**s) for s in body)
            if not all(type(v) is int for s in segments for v in asdict(s).values()):
                raise TypeError("segments hold integers")
        except TypeError as e:
            raise UserError(f"damaged ledger ({e}): resume from another checkpoint") from None
        return cls(segments)

    def _at(self, step: int) -> Segment:
        if step < 0:
            raise UserError(f"step={step}: steps count from 0")
        return self.segments[bisect_right(self.segments, step, key=lambda s: s.step) - 1]


class Order:
    """One source's windows, shuffled anew in each epoch; see the top of the file.

    Args:
        shard_windows: how many windows each shard of the manifest holds; 0 is allowed.
        lanes: fixed for the run.
        seed: fixed for the run.

    Raises:
        UserError: no window at all, or no lane.
    """

    def __init__(self, shard_windows: Sequence[int] | np.ndarray, lanes: int, seed: int) -> None:
        self.shard_windows = np.asarray(shard_windows, dtype=np.int64)
        self.windows = int(self.shard_windows.sum())
        self.lanes = lanes
        self.seed = seed
        if self.windows < 1 or lanes < 1:
            raise UserError(
                f"{self.windows} windows in {len(self.shard_windows)} shards, data.lanes={lanes}: give at least 1 each"
            )
        self._line = lru_cache(maxsize=2)(self._lay_line)  # a step may end one epoch and start the next
        self._shuffles: dict[
            int, tuple[tuple[int, int], np.ndarray]
        ] = {}  # lane -> its latest (epoch, shard), permutation

    def epoch(self, position: int) -> float:
        """How often the source has been served before `position`."""
        return position / self.windows

    def windows_at(self, positions: np.ndarray | range) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers and window numbers at `positions`: [n] and [n] int64.

        Costs O(log shards) for each position, and O(windows of a shard) where a lane enters a shard.
        """
        p = np.asarray(positions, dtype=np.int64)
        shards, indices = np.empty_like(p), np.empty_like(p)
        epochs = p // self.windows
        for epoch in np.unique(epochs):
            at = np.flatnonzero(epochs == epoch)
            shards[at], indices[at] = self._in_epoch(int(epoch), p[at])
        return shards, indices

    def _in_epoch(self, epoch: int, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        line, ends = self._line(epoch)
        lane = p % self.lanes
        start, stop = self._interval(epoch, lane), self._interval(epoch, lane + 1)
        place = start + p % self.windows // self.lanes
        k = np.searchsorted(ends, place, side="right")  # the k-th shard of the line; shards without windows are skipped
        shard = line[k]
        begin = ends[k] - self.shard_windows[shard]
        low, high = np.maximum(begin, start), np.minimum(ends[k], stop)  # the run of places of this lane in this shard
        index = low - begin
        for rows in _groups(lane * len(line) + k):
            n = rows[0]
            shuffle = self._shuffle(epoch, int(lane[n]), int(shard[n]), int(high[n] - low[n]))
            index[rows] += shuffle[place[rows] - low[n]]
        return shard, index

    def _interval(self, epoch: int, lane: np.ndarray) -> np.ndarray:
        """Where the interval of `lane` starts: the places of the lanes below it. Lane L starts at W."""
        first = epoch * self.windows % self.lanes  # the lane of the epoch's first position
        each, more = divmod(self.windows, self.lanes)  # lanes first … first + more - 1 (mod L) have one place more
        return lane * each + np.clip(lane - first, 0, more) + np.minimum(lane, max(0, first + more - self.lanes))

    def _lay_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        line = permutation(len(self.shard_windows), self.seed, _SHARDS, epoch)
        return line, np.cumsum(self.shard_windows[line])

    def _shuffle(self, epoch: int, lane: int, shard: int, n: int) -> np.ndarray:
        """The permutation of a lane's part of a shard. A lane only walks on, so only its latest is kept."""
        held, shuffle = self._shuffles.get(lane, (None, None))
        if shuffle is None or held != (epoch, shard):
            shuffle = permutation(n, self.seed, _WINDOWS, epoch, lane, shard)
            self._shuffles[lane] = (epoch, shard), shuffle
        return shuffle


def rank_positions(position: int, windows_per_step: int, lanes: int, dp_rank: int, dp: int) -> np.ndarray:
    """The positions, ascending, that one data-parallel rank takes of a step that starts at `position`: [windows / dp].

    Raises:
        UserError: windows_per_step is not a multiple of lanes, or dp does not divide lanes.
    """
    if windows_per_step % lanes or lanes % dp:
        raise UserError(
            f"windows per step={windows_per_step} must be a multiple of data.lanes={lanes}, and that of dp={dp}"
        )
    p = np.arange(position, position + windows_per_step, dtype=np.int64)
    return p[p % lanes // (lanes // dp) == dp_rank]


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
