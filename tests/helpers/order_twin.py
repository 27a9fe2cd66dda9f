"""The order of the data, dealt by hand: windows lie in queues and lanes take them out one by one. No formula, no numpy.

What `order/plan.py` finds by arithmetic is done here in the order of time, from position 0 on. A test that
compares the two is in `test_mixture.py` (shapes, mixtures) or `test_events.py` (events).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

Place = tuple[int, int]  # shard, first token
Window = tuple[int, int, int]  # source, shard, first token


class Leg(NamedTuple):
    """What `data_pipeline.order.ledger.Segment` says, in the order of its fields."""

    step: int
    position: int
    windows_per_step: int
    n_ctx: int
    weights: Mapping[str, int]
    lost: Mapping[str, Sequence[int]]


@dataclass
class Piece:
    """Windows of one shard that lie side by side in the line of a pass."""

    windows: list[Place]
    explicit: bool  # what was left of a run when an event came, as a list; else neighbours in the shard
    last: bool  # no window of the shard comes after these


@dataclass
class Run:
    """The part of a piece that lies in one lane's interval."""

    part: Piece
    queue: list[Place]  # what is left of it, in the order in which it is served


def mix(seed: int, n: int) -> list[int]:
    """SplitMix64."""
    out, mask = [], 2**64 - 1
    for _ in range(n):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((seed ^ seed >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        out.append(z ^ z >> 31)
    return out


def shuffled(things: Iterable, *key: int) -> list:
    things, folded = list(things), 0
    for part in key:
        folded = mix(folded ^ part, 1)[0]
    return [thing for _, thing in sorted(zip(mix(folded, len(things)), things, strict=True))]


def twin(shard_windows: list[int], lanes: int, seed: int, epochs: int) -> list[tuple[int, int]]:
    """One source without events: the (shard, window) of these many epochs in serial order."""
    total, out = sum(shard_windows), []
    for epoch in range(epochs):
        lane_of = [p % lanes for p in range(epoch * total, (epoch + 1) * total)]
        line = [(s, w) for s in shuffled(range(len(shard_windows)), seed, 0, epoch) for w in range(shard_windows[s])]
        queues: list[list[tuple[int, int]]] = []
        for lane in range(lanes):
            share, line = line[: lane_of.count(lane)], line[lane_of.count(lane) :]
            queue: list[tuple[int, int]] = []
            while share:
                shard = share[0][0]
                part = [w for w in share if w[0] == shard]
                queue += shuffled(part, seed, 1, epoch, lane, shard)
                share = share[len(part) :]
            queues.append(queue)
        out += [queues[lane].pop(0) for lane in lane_of]
    return out


def source_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "big") >> 1


def cut(shard: int, base: int, end: int, n_ctx: int) -> list[Place]:
    """Windows of n_ctx + 1 tokens, neighbours sharing one, from token `base` on; none goes beyond `end`."""
    out = []
    while base + n_ctx + 1 <= end:
        out.append((shard, base))
        base += n_ctx
    return out


class Source:
    """The windows of one source; `draw` deals the next of a lane, `event` begins another era.

    A pass is a line of windows cut into one interval for each lane: the rest of an earlier era, numbered `past`, and
    then whole epochs, numbered from past + 1. Era 0 has no rest.
    """

    def __init__(self, name: str, tokens: Sequence[int], lanes: int, seed: int, n_ctx: int, lost: Iterable[int]):
        self.tokens, self.lanes, self.seed = list(tokens), lanes, source_seed(seed, name)
        self.n_ctx, self.lost = n_ctx, set(lost)
        self.era = 0
        self._begin(-1, [])

    def draw(self, lane: int) -> Place:
        self._settle(lane)
        for run in self.passes[self.at[lane]][lane]:
            if run.queue:
                return run.queue.pop(0)
        raise LookupError("the source has no window")

    def event(self, n_ctx: int, lost: Iterable[int]) -> None:
        for lane in range(self.lanes):
            self._settle(lane)
        self.lost, rest = set(lost), []
        for number in range(min(self.at), max(self.at) + 1):
            for lane in range(self.lanes):
                if self.at[lane] <= number:
                    rest += [self._left(run, n_ctx) for run in self.passes[number][lane] if run.queue]
        self.era, self.n_ctx = self.era + 1, n_ctx
        self._begin(max(self.at), [piece for piece in rest if piece.windows])

    def _begin(self, past: int, rest: list[Piece]) -> None:
        self.past, self.rest, self.at = past, rest, [past] * self.lanes
        self.passes: dict[int, list[list[Run]]] = {}  # number -> the runs of each lane
        self.positions = 0  # of the era, dealt so far
        self._deal(past, rest)

    def _settle(self, lane: int) -> None:
        """Take the lane to the pass in which its next window lies."""
        while not any(run.queue for run in self.passes[self.at[lane]][lane]):
            if self.at[lane] > self.past and not self._epoch(0):
                return  # nothing, ever
            self.at[lane] += 1
            if self.at[lane] not in self.passes:
                self._deal(self.at[lane], self._epoch(self.at[lane]))

    def _epoch(self, number: int) -> list[Piece]:
        order = [shard for shard in shuffled(range(len(self.tokens)), self.seed, 0, number) if shard not in self.lost]
        line = [Piece(cut(shard, 0, self.tokens[shard], self.n_ctx), False, True) for shard in order]
        return [piece for piece in line if piece.windows]

    def _deal(self, number: int, line: list[Piece]) -> None:
        """Cut the line into intervals, a place for each of the lane's positions, and shuffle each run."""
        total = sum(len(piece.windows) for piece in line)
        lane_of = [q % self.lanes for q in range(self.positions, self.positions + total)]
        places = [(k, window) for k, piece in enumerate(line) for window in piece.windows]
        self.passes[number], self.positions = [], self.positions + total
        for lane in range(self.lanes):
            share, places = places[: lane_of.count(lane)], places[lane_of.count(lane) :]
            runs = []
            for k, piece in enumerate(line):
                part = [window for at, window in share if at == k]
                if part:
                    epoch = (1, number, lane, part[0][0])
                    key = epoch if number > self.past else (2, self.era, lane, k)
                    last = piece.last and part[-1] == piece.windows[-1]
                    runs.append(Run(Piece(part, piece.explicit, last), shuffled(part, self.seed, *key)))
            self.passes[number].append(runs)

    def _left(self, run: Run, n_ctx: int) -> Piece:
        """What the next era has of a run that is not used up; no windows where it has nothing of it."""
        part, whole = run.part, len(run.queue) == len(run.part.windows)
        (shard, base), (_, final) = part.windows[0], part.windows[-1]
        if shard in self.lost:
            return Piece([], True, False)
        if n_ctx == self.n_ctx:
            return part if whole else Piece(run.queue, True, False)
        if part.explicit or not whole:
            return Piece([], True, False)  # set aside until the next epoch
        end = self.tokens[shard] if part.last else final + self.n_ctx + 1
        return Piece(cut(shard, base, end, n_ctx), False, part.last)


def first_entry(weights: Sequence[int], lanes: int) -> int:
    """The first entry from which the lanes' draws together stray least from the shares."""
    cycle, period = tijdeman(weights), sum(weights)
    best, least = 0, None
    for r in range(period):
        drawn, worst = [0] * len(weights), 0
        for column in range(period):
            for lane in range(lanes):
                drawn[cycle[(column + lane + r) % period]] += 1
            strayed = (abs(period * drawn[s] - weights[s] * lanes * (column + 1)) for s in range(len(weights)))
            worst = max(worst, *strayed)
        if least is None or worst < least:
            best, least = r, worst
    return best


def table(weights: Sequence[int], lanes: int) -> list[int]:
    """Which source each draw of a period takes; lane l's draws begin at entry l."""
    cycle, r = tijdeman(weights), first_entry(weights, lanes)
    return cycle[r:] + cycle[:r]


def tijdeman(weights: Sequence[int]) -> list[int]:
    """A period by Tijdeman's rule for the chairman assignment problem (1980)."""
    period, taken, out = sum(weights), [0] * len(weights), []
    some = [s for s, weight in enumerate(weights) if weight]
    for t in range(1, period + 1):
        owed = {s: Fraction(weights[s] * t, period) - taken[s] for s in some}  # windows by which s is behind its share
        chosen = some[0]
        if len(some) > 1:
            least = Fraction(1, 2 * (len(some) - 1))
            eligible = [s for s in some if owed[s] >= least]
            # the first that would be more than 1 - least behind
            chosen = min(eligible, key=lambda s: ((1 - least - owed[s]) * Fraction(period, weights[s]), s))
        taken[chosen] += 1
        out.append(chosen)
    return out


def deal(
    tokens: Mapping[str, Sequence[int]], legs: Sequence[Leg], *, lanes: int, seed: int, steps: int
) -> tuple[list[Window], list[list[int]]]:
    """The window at every position up to the end of the last step, and the positions that each step takes."""
    first, names = legs[0], sorted(tokens)
    sources = [Source(name, tokens[name], lanes, seed, first.n_ctx, first.lost.get(name, ())) for name in names]
    windows: list[Window] = []
    taken: list[list[int]] = []

    cycle: list[int] = []
    column_of: list[int] = []  # of each lane: its draws since these weights began

    def draw() -> None:
        lane = len(windows) % lanes
        source = cycle[(column_of[lane] + lane) % len(cycle)]
        column_of[lane] += 1
        windows.append((source, *sources[source].draw(lane)))

    for n, leg in enumerate(legs):
        if n:
            before = legs[n - 1]
            while len(windows) < leg.position:
                draw()  # jumped over: drawn, and of no step
            for source, name in zip(sources, names, strict=True):
                if leg.n_ctx != before.n_ctx or set(leg.lost.get(name, ())) != set(before.lost.get(name, ())):
                    source.event(leg.n_ctx, leg.lost.get(name, ()))
        if n == 0 or leg.weights != before.weights:
            cycle[:], column_of[:] = table([leg.weights.get(name, 0) for name in names], lanes), [0] * lanes
        until = min(steps, legs[n + 1].step) if n + 1 < len(legs) else steps
        for _ in range(leg.step, until):
            taken.append(list(range(len(windows), len(windows) + leg.windows_per_step)))
            for _ in taken[-1]:
                draw()
        if n + 1 < len(legs) and legs[n + 1].step >= steps:
            break
    return windows, taken


def dealt_to(taken: list[list[int]], windows: list[Window], lanes: int, dp: int) -> list[list[list[Window]]]:
    """[step][rank]: the windows of each rank, which takes a dp-th of the lanes, in their order."""
    lanes_of = [range(rank * lanes // dp, (rank + 1) * lanes // dp) for rank in range(dp)]
    return [[[windows[p] for p in step if p % lanes in own] for own in lanes_of] for step in taken]


def served(plan: Any, steps: Iterable[int], dp: int) -> list[list[list[Window]]]:
    """[step][rank]: what a `data_pipeline.order.plan.Plan` gives each rank."""
    return [[zipped(plan.step(step, rank, dp)[1]) for rank in range(dp)] for step in steps]


def zipped(windows: Any) -> list[Window]:
    return list(zip(*(part.tolist() for part in windows), strict=True))
