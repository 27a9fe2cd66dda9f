"""The order of the data: pure functions from (seed, ledger, position) to windows. No I/O; numpy only.

A *position* p = 0, 1, 2, … counts the windows of the run; its *lane* is p mod L, its *column* p div L. The number of
lanes L is fixed for the run. docs/order.md has the definitions and a picture.

1.  The ledger gives the positions of a step, and the weights by which they are drawn (`ledger.py`).
2.  The mixture gives the source of lane l's draw in a column (`mixture.py`), and with it the number k of windows of
    that source that the lane has drawn before.
3.  The source gives the lane's k-th window (`epochs.py`): each epoch in another order, each window once.

The data-parallel size does not matter:
    `Plan` does not know it. A step takes the positions [p, p + w), w a multiple of L, so as many from each lane;
    rank r of dp, which divides L, takes those of lanes [r L / dp, (r + 1) L / dp). These sets are disjoint and their
    union is the step's, for every dp.

Events keep each source's place:
    The windows of a source that a lane has drawn are a sum of closed forms over the ledger's segments. A change of
    weights starts a new table and changes no count; a jump draws the windows that it jumps over; another n_ctx or a
    lost shard starts a new `Order` of the source with the rest of the old one's epoch. All of it is computed from the
    ledger when a plan is made: there is no state to save, and any position is a look-up away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from conf.errors import UserError
from data_pipeline.order.epochs import Order
from data_pipeline.order.ledger import Ledger, Segment
from data_pipeline.order.line import Rest
from data_pipeline.order.mixture import Mixture


class Windows(NamedTuple):
    """Windows by source (a number in `Plan.names`), shard (in its manifest) and first token in it: [n] int64 each."""

    source: np.ndarray
    shard: np.ndarray
    start: np.ndarray

    def rows(self, rows: slice) -> Windows:
        return Windows(*(part[rows] for part in self))


@dataclass(frozen=True, eq=False)
class _Weights:
    """From `column` on, lanes draw by `mixture`; `base[s, l]` counts the windows of s that lane l has drawn before."""

    column: int
    mixture: Mixture
    base: np.ndarray

    def drawn(self, source: int, column: int) -> np.ndarray:
        """The number of windows of a source that each lane has drawn before `column`: [lanes]."""
        lanes = np.arange(self.base.shape[1])
        return self.base[source] + self.mixture.drawn(source, lanes, column - self.column)


@dataclass(frozen=True)
class _Era:
    """From segment number `segment` on, `order` serves a source; lane l had drawn `base[l]` of its windows before."""

    segment: int
    base: np.ndarray
    rest: Rest  # left by the era before
    order: Order | None  # None: there is no window, and nothing is drawn


class Plan:
    """The windows of every step of a run, for any number of data-parallel ranks.

    Args:
        shard_tokens: for each source, the number of tokens of each shard of its manifest.
        ledger: past events and planned ones.
        lanes: fixed for the run.
        seed: fixed for the run.

    Raises:
        UserError: a source that is drawn but not given or without a window, or positions that lanes do not divide. A
            source that is not given, and that the last segment does not draw, is refused only when its windows are
            asked for.
    """

    def __init__(
        self, shard_tokens: Mapping[str, Sequence[int] | np.ndarray], ledger: Ledger, *, lanes: int, seed: int
    ) -> None:
        self.ledger = ledger
        self.lanes = lanes
        self.seed = seed
        self.names = tuple(sorted({*shard_tokens, *(n for s in ledger.segments for n in s.weights)}))
        self._tokens = [np.asarray(shard_tokens.get(name, ()), np.int64) for name in self.names]
        self._weights: list[_Weights] = []  # of each segment
        self._eras: list[list[_Era]] = [[] for _ in self.names]
        for number, segment in enumerate(ledger.segments):
            if segment.position % lanes or segment.windows_per_step % lanes:
                raise UserError(
                    f"step {segment.step} at position {segment.position} with {segment.windows_per_step} windows per "
                    f"step: both must be multiples of data.lanes={lanes}"
                )
            self._weights.append(self._weights_of(number, segment))
            for source in range(len(self.names)):
                self._open_era(number, segment, source)

    def windows_at(self, positions: np.ndarray | range) -> Windows:
        """The windows at `positions`, all in one segment of the ledger: [n]."""
        p = np.asarray(positions, dtype=np.int64)
        if not len(p):
            return Windows(p, p, p)
        number = self.ledger.number_at(int(p.min()))
        if self.ledger.number_at(int(p.max())) != number:
            raise ValueError(f"positions {p.min()} to {p.max()} are in more than one segment of the ledger")
        weights, lane = self._weights[number], p % self.lanes
        source, drawn = weights.mixture.draw(p // self.lanes - weights.column, lane)
        drawn += weights.base[source, lane]
        out = Windows(source, np.empty_like(p), np.empty_like(p))
        for s in np.unique(source):
            rows = np.flatnonzero(source == s)
            era = self._era(int(s), number)
            q = (drawn[rows] - era.base[lane[rows]]) * self.lanes + lane[rows]
            if era.order is None:
                raise UserError(
                    f"source {self.names[s]}, drawn at position {p.min()}, is not given: add it to data.sources"
                )
            out.shard[rows], out.start[rows] = era.order.windows_at(q)
        return out

    def positions(self, step: int, dp_rank: int = 0, dp: int = 1) -> np.ndarray:
        """The positions, ascending, that one data-parallel rank takes in a step: [windows per step / dp]."""
        return rank_positions(
            self.ledger.position(step), self.ledger.segment(step).windows_per_step, self.lanes, dp_rank, dp
        )

    def step(self, step: int, dp_rank: int = 0, dp: int = 1) -> tuple[np.ndarray, Windows]:
        """Positions and windows of one rank in a step, in the order in which it gets them."""
        positions = self.positions(step, dp_rank, dp)
        return positions, self.windows_at(positions)

    def drawn(self, name: str, position: int) -> int:
        """The number of windows of a source that the run has drawn before `position`."""
        return int(self._drawn(self.names.index(name), position).sum())

    def epoch(self, name: str, position: int) -> float:
        """Epochs of a source that the run has drawn before `position`, a fraction."""
        source = self.names.index(name)
        era = self._era(source, self.ledger.number_at(position))
        draws = float((self._drawn(source, position) - era.base).sum())
        return era.order.epoch(draws) if era.order else float(era.rest.epoch)

    def passes(self, name: str, position: int) -> int:
        """The number of epochs of a source of which windows are drawn before `position`: 1 while none is repeated."""
        source = self.names.index(name)
        era = self._era(source, self.ledger.number_at(position - 1))
        return era.order.begun(self._drawn(source, position) - era.base) if era.order else era.rest.begun

    def unread(self) -> list[tuple[int, str, int]]:
        """(step, source, tokens) of each event that makes tokens wait for the source's next epoch."""
        return [
            (self.ledger.segments[era.segment].step, name, era.rest.waiting_tokens)
            for name, eras in zip(self.names, self._eras, strict=True)
            for era in eras
            if era.rest.waiting_tokens
        ]

    def positions_of(self, name: str, shard: int, start: int, stop: int, until: int) -> np.ndarray:
        """The positions before `until`, ascending, whose window holds a token of [start, stop) of a shard: [n]."""
        source = self.names.index(name)
        eras = self._eras[source]
        parts = [np.empty(0, np.int64)]
        for era, after in zip(eras, [*eras[1:], None], strict=True):
            end = min(until, self.ledger.segments[after.segment].position) if after else until
            if era.order is not None and end > self.ledger.segments[era.segment].position:
                columns = -(-end // self.lanes) * self.lanes  # whole columns; positions from `end` on are dropped below
                limit = int((self._drawn(source, columns) - era.base).max()) * self.lanes
                q = era.order.positions_of(shard, limit)
                _, token = era.order.windows_at(q)
                q = q[(token < stop) & (token + era.order.n_ctx >= start)]
                lane = q % self.lanes
                parts.append(self._position_of(source, lane, era.base[lane] + q // self.lanes, end))
        return np.sort(np.concatenate(parts))

    def _position_of(self, source: int, lane: np.ndarray, draw: np.ndarray, until: int) -> np.ndarray:
        """The run's positions of each lane's draw number `draw` of a source, without those from `until` on."""
        parts = []
        runs = list(dict.fromkeys(self._weights))
        for weights, after in zip(runs, [*runs[1:], None], strict=True):
            end = min(until, after.column * self.lanes) if after else until
            since = (draw >= weights.base[source, lane]) & (weights.mixture.counts[source] > 0)
            number = draw[since] - weights.base[source, lane[since]]
            column = weights.column + weights.mixture.column_of(source, lane[since], number)
            position = column * self.lanes + lane[since]
            parts.append(position[position < end])
        return np.concatenate(parts)

    def _drawn(self, source: int, position: int) -> np.ndarray:
        """The windows of a source that each lane has drawn before `position`, a multiple of lanes: [lanes]."""
        return self._weights[self.ledger.number_at(max(0, position - 1))].drawn(source, position // self.lanes)

    def _era(self, source: int, number: int) -> _Era:
        return next(era for era in reversed(self._eras[source]) if era.segment <= number)

    def _weights_of(self, number: int, segment: Segment) -> _Weights:
        counts = tuple(segment.weights.get(name, 0) for name in self.names)
        column = segment.position // self.lanes
        if not number:
            return _Weights(column, Mixture(counts, self.lanes), np.zeros((len(self.names), self.lanes), np.int64))
        before = self._weights[-1]
        if counts == tuple(before.mixture.counts.tolist()):
            return before
        return _Weights(
            column, Mixture(counts, self.lanes), np.stack([before.drawn(s, column) for s in range(len(self.names))])
        )

    def _open_era(self, number: int, segment: Segment, source: int) -> None:
        """Start a new order of the source if this segment needs one."""
        name, eras = self.names[source], self._eras[source]
        lost, n_ctx = segment.lost.get(name, ()), segment.n_ctx
        if number:
            before = self.ledger.segments[number - 1]
            if (before.n_ctx, before.lost.get(name, ())) == (n_ctx, lost) and eras[-1].order is not None:
                return
        drawn = self._weights[number].drawn(source, segment.position // self.lanes)
        rest = Rest.none()
        if eras and (old := eras[-1].order):
            rest = old.after(drawn - eras[-1].base, n_ctx, lost)
        elif eras:
            rest = Rest.none(eras[-1].rest.epoch, eras[-1].rest.era + 1, eras[-1].rest.begun)
        order, tokens = None, self._tokens[source]
        if any(not 0 <= shard < len(tokens) for shard in lost) and len(tokens):
            raise UserError(f"ledger: source {name} has lost shards {list(lost)} of {len(tokens)}: of another source?")
        if len(tokens) or (segment.weights.get(name) and not self._was_removed(source)):
            try:
                order = Order(tokens, n_ctx, self.lanes, _source_seed(self.seed, name), lost, rest)
            except UserError as e:
                if segment.weights.get(name):
                    raise UserError(f"source {name} at step {segment.step}: {e}") from None
        eras.append(_Era(number, drawn, rest, order))

    def _was_removed(self, source: int) -> bool:
        """The run has drawn a source that is gone, and continues without it."""
        return not len(self._tokens[source]) and not self.ledger.segments[-1].weights.get(self.names[source])


def rank_positions(position: int, windows_per_step: int, lanes: int, dp_rank: int, dp: int) -> np.ndarray:
    """The positions, ascending, that one data-parallel rank takes of a step that starts at `position`: [windows / dp].

    Raises:
        UserError: windows_per_step is not a multiple of lanes, or dp does not divide lanes.
    """
    if windows_per_step % lanes or lanes % dp:
        raise UserError(
            f"windows per step={windows_per_step} must be a multiple of data.lanes={lanes}, and that of dp={dp}"
        )
    each = lanes // dp
    columns = position + lanes * np.arange(windows_per_step // lanes, dtype=np.int64)
    first = columns[:, None] + (np.arange(each) + dp_rank * each - position) % lanes
    return np.sort(first, axis=1).ravel()


def _source_seed(seed: int, name: str) -> int:
    """A seed of 63 bits of (seed, name), so that sources of equal shards are not shuffled alike."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "big") >> 1
