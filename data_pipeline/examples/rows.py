"""The order of examples: those of each row of a run, as a pure function of (seed, position). Numpy only.

A *position* counts the rows that a run draws, `rows_per_step` for each step. In each epoch

1.  the examples are shuffled by (seed, epoch);
2.  packed: a row takes the first example that waits, then again and again the longest of the next `BUFFER` that still
    fits; of equally long ones the first. An example is in one row, whole. Without packing each makes a row;
3.  rows without an example fill the last step up.

So every epoch has each example once, whatever the number of ranks: a rank takes its part of a step's positions. An
epoch's rows follow from the lengths alone. A run that starts at a position computes the rows of the epochs before it
too, for their number, in a few seconds for a million examples, and keeps none of them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from conf.errors import UserError
from data_pipeline.config import IGNORE
from data_pipeline.examples.templates import Example
from data_pipeline.order.permutation import permutation

BUFFER = 1024  # examples that a row is chosen from
_EXAMPLES = 3  # the use of the permutation, beside those of data_pipeline/order/epochs.py


class Row(NamedTuple):
    """One row of a batch. labels[t] follows tokens[t] in its example, or is IGNORE.

    Example k of a row is its segment k; behind the last one tokens of a segment of their own fill the row.
    """

    tokens: np.ndarray  # [n_ctx] int64
    labels: np.ndarray  # [n_ctx] int64
    segment_ids: np.ndarray  # [n_ctx] int32


class RowOrder:
    """The numbers of the examples in each row of a run.

    Args:
        lengths: tokens of a row that each example takes.
        rows_per_step: of all ranks together; fixed for the run.
        n_ctx: tokens of a row, as many as the longest example or more; None: each example makes a row.
    """

    def __init__(self, lengths: Sequence[int], *, rows_per_step: int, seed: int, n_ctx: int | None = None) -> None:
        if not len(lengths) or rows_per_step < 1:
            raise UserError(f"{len(lengths)} examples in steps of {rows_per_step} rows: give at least 1 each")
        if n_ctx is not None and max(lengths) > n_ctx:
            raise ValueError(f"an example of {max(lengths)} tokens does not fit into n_ctx={n_ctx}")
        self.rows_per_step = rows_per_step
        self._lengths = list(map(int, lengths))
        self._seed = seed
        self._n_ctx = n_ctx
        self._starts = [0]  # the first position of each epoch whose predecessor's rows are known
        self._rows = lru_cache(maxsize=2)(self._lay_out)  # a step may end one epoch and start the next

    def members(self, position: int) -> list[int]:
        """The examples of the row at a position, in their order within it; empty where a last step is filled up."""
        epoch = self._epoch_of(position)
        rows, at = self._rows(epoch), position - self._starts[epoch]
        return rows[at] if at < len(rows) else []

    def epoch(self, position: int) -> float:
        """Epochs drawn before a position, a fraction."""
        epoch = self._epoch_of(position)
        return epoch + min(1.0, (position - self._starts[epoch]) / len(self._rows(epoch)))

    def start(self, epoch: int) -> int:
        """The first position of an epoch: that of a step."""
        while len(self._starts) <= epoch:
            rows = len(self._rows(len(self._starts) - 1))
            steps = -(-rows // self.rows_per_step)
            self._starts.append(self._starts[-1] + steps * self.rows_per_step)
        return self._starts[epoch]

    def fill(self, epoch: int) -> float:
        """The share of the tokens of an epoch's packed rows that are of examples, without rows that fill a step up."""
        rows = self._rows(epoch)
        return sum(self._lengths[i] for row in rows for i in row) / (len(rows) * (self._n_ctx or 1))

    def _epoch_of(self, position: int) -> int:
        while self.start(len(self._starts) - 1) <= position:
            self.start(len(self._starts))
        return bisect_right(self._starts, position) - 1

    def _lay_out(self, epoch: int) -> list[list[int]]:
        order = permutation(len(self._lengths), self._seed, _EXAMPLES, epoch).tolist()
        return [[i] for i in order] if self._n_ctx is None else pack(order, self._lengths, self._n_ctx)


def pack(order: Sequence[int], lengths: Sequence[int], n_ctx: int, buffer: int = BUFFER) -> list[list[int]]:
    """Rows of at most n_ctx tokens, each a list of the examples in it; `order` lists the examples, see the top."""
    rows: list[list[int]] = []
    waiting: list[tuple[int, int]] = []  # (length, -place in `order`), sorted
    taken = [False] * len(order)
    first = read = 0  # places in `order`: of the first example that waits, of the next to join the buffer
    while first < len(order):
        while read < len(order) and len(waiting) < buffer:
            insort(waiting, (lengths[order[read]], -read))
            read += 1
        at, room, row = bisect_left(waiting, (lengths[order[first]], -first)), n_ctx, []
        while at >= 0:
            length, place = waiting.pop(at)  # the place is negative
            taken[-place] = True
            row.append(order[-place])
            room -= length
            at = bisect_right(waiting, (room, 0)) - 1  # the longest that fits; -1: none
        rows.append(row)
        while first < len(order) and taken[first]:
            first += 1
    return rows


def packed(examples: Sequence[Example], n_ctx: int) -> Row:
    """Examples side by side in one row; the last id of each is a label alone."""
    tokens = np.zeros(n_ctx, np.int64)
    labels = np.full(n_ctx, IGNORE, np.int64)
    segments = np.full(n_ctx, len(examples), np.int32)
    ends = np.cumsum([0, *(len(example.ids) - 1 for example in examples)]).tolist()
    for k, ((start, end), (ids, mask)) in enumerate(zip(pairwise(ends), examples, strict=True)):
        tokens[start:end] = ids[:-1]
        labels[start:end] = np.where(mask[1:], ids[1:], IGNORE)
        segments[start:end] = k
    return Row(tokens, labels, segments)
