"""The order of examples and their packing, beside a naive twin and by counting."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.config import IGNORE
from data_pipeline.examples.rows import RowOrder, pack, packed
from data_pipeline.examples.templates import Example
from tests.helpers.seeds import seeded


def lognormal(rng: np.random.Generator, n: int, n_ctx: int, median: int = 100) -> list[int]:
    lengths = np.clip(rng.lognormal(np.log(median), 1.0, n), 2, n_ctx).astype(int)
    return [int(length) for length in lengths]


def some_examples(rng: np.random.Generator, lengths: list[int]) -> list[Example]:
    """Examples that take `lengths` tokens of a row: an id more each; every id of all is another one."""
    ids = iter(range(sum(lengths) + len(lengths)))
    return [
        Example(np.array([next(ids) for _ in range(n + 1)], np.int32), np.append(False, rng.random(n) < 0.5))
        for n in lengths
    ]


def naive(order: list[int], lengths: list[int], n_ctx: int, buffer: int) -> list[list[int]]:
    """Best fit, by looking through the whole buffer each time."""
    rows, left, waiting = [], list(order), list[int]()
    while left or waiting:
        while left and len(waiting) < buffer:
            waiting.append(left.pop(0))
        row = [waiting.pop(0)]
        while fitting := [i for i in waiting if lengths[i] <= n_ctx - sum(lengths[j] for j in row)]:
            best = max(fitting, key=lambda i: lengths[i])  # the first of equally long ones
            waiting.remove(best)
            row.append(best)
        rows.append(row)
    return rows


def test_packing_equals_a_naive_twin() -> None:
    rng = np.random.default_rng(seeded())
    for _ in range(60):
        n, n_ctx, buffer = int(rng.integers(1, 80)), int(rng.integers(4, 60)), int(rng.integers(1, 30))
        lengths = lognormal(rng, n, n_ctx, int(rng.integers(2, n_ctx)))
        order = rng.permutation(n).tolist()
        assert pack(order, lengths, n_ctx, buffer) == naive(order, lengths, n_ctx, buffer)


def test_rows_are_full() -> None:
    rng = np.random.default_rng(seeded())
    for median in (50, 100, 200):
        lengths = lognormal(rng, 3000, 1024, median)
        rows = pack(rng.permutation(3000).tolist(), lengths, 1024)
        assert sum(lengths) / (1024 * len(rows)) >= 0.97  # 0.99 to 0.999 seen


@pytest.mark.parametrize("packed", [True, False])
def test_every_epoch_has_each_example_once(packed: bool) -> None:
    rng = np.random.default_rng(seeded())
    n_ctx, step = 64, int(rng.integers(1, 9))
    lengths = lognormal(rng, 101, n_ctx, 15)
    order = RowOrder(lengths, rows_per_step=step, seed=7, n_ctx=n_ctx if packed else None)
    orders = []
    for epoch in range(4):
        start, end = order.start(epoch), order.start(epoch + 1)
        rows = [order.members(position) for position in range(start, end)]
        assert start % step == 0 and end % step == 0
        assert Counter(i for row in rows for i in row) == Counter(range(101))
        assert all(sum(lengths[i] for i in row) <= n_ctx and (packed or len(row) <= 1) for row in rows)
        filled = [bool(row) for row in rows]
        assert filled == sorted(filled, reverse=True) and filled.count(False) < step  # only the last step is filled up
        assert order.epoch(start) == epoch and order.epoch(end - 1) <= epoch + 1
        orders.append([i for row in rows for i in row])
    assert len(set(map(tuple, orders))) == 4


def test_a_row_depends_on_seed_and_position_alone() -> None:
    rng = np.random.default_rng(seeded())
    lengths, how = lognormal(rng, 200, 64, 10), {"rows_per_step": 6, "n_ctx": 64}
    whole = RowOrder(lengths, seed=3, **how)
    rows = [whole.members(position) for position in range(3 * whole.start(1))]
    for position in rng.permutation(len(rows))[:40].tolist():  # resumed anywhere, on any rank
        assert RowOrder(lengths, seed=3, **how).members(position) == rows[position]
    other = RowOrder(lengths, seed=4, **how)
    assert [other.members(position) for position in range(len(rows))] != rows
    for dp in (1, 2, 3, 6):  # the ranks' parts of a step are the step
        ranks = [RowOrder(lengths, seed=3, **how) for _ in range(dp)]
        each = 6 // dp
        steps = [
            [ranks[rank].members(6 * step + rank * each + i) for rank in range(dp) for i in range(each)]
            for step in range(len(rows) // 6)
        ]
        assert [row for step in steps for row in step] == rows[: 6 * len(steps)]


def test_a_row_holds_its_examples_side_by_side() -> None:
    rng = np.random.default_rng(seeded())
    n_ctx = 40
    examples = some_examples(rng, lognormal(rng, 120, n_ctx, 9))
    order = RowOrder([len(example.ids) - 1 for example in examples], rows_per_step=4, seed=1, n_ctx=n_ctx)
    learnt, inputs = Counter[int](), Counter[int]()
    filled, used = 0, 0
    for position in range(order.start(1)):
        members = order.members(position)
        tokens, labels, segments = packed([examples[i] for i in members], n_ctx)
        assert (tokens.dtype, labels.dtype, segments.dtype) == (np.int64, np.int64, np.int32)
        assert tokens.shape == labels.shape == segments.shape == (n_ctx,) and (np.diff(segments) >= 0).all()
        for k, i in enumerate(members):
            ids, mask = examples[i]
            at = segments == k
            assert tokens[at].tolist() == ids[:-1].tolist()
            assert labels[at].tolist() == [
                i if is_label else IGNORE for i, is_label in zip(ids[1:].tolist(), mask[1:].tolist(), strict=True)
            ]
        rest = segments == len(members)
        assert (segments <= len(members)).all() and (labels[rest] == IGNORE).all()
        learnt.update(labels[labels != IGNORE].tolist())
        inputs.update(tokens[~rest].tolist())
        used += int((~rest).sum())
        filled += n_ctx * bool(members)
    assert order.fill(0) == pytest.approx(used / filled)
    assert learnt == Counter(i for ids, mask in examples for i in ids[mask].tolist())
    assert inputs == Counter(i for ids, _ in examples for i in ids[:-1].tolist())


def test_the_longest_example_fills_a_row() -> None:
    [example] = some_examples(np.random.default_rng(0), [16])
    row = packed([example], 16)
    assert row.tokens.tolist() == example.ids[:-1].tolist() and not row.segment_ids.any()
    with pytest.raises(ValueError, match="17 tokens does not fit into n_ctx=16"):
        RowOrder([3, 17], rows_per_step=1, seed=0, n_ctx=16)


def test_no_example_is_an_error() -> None:
    with pytest.raises(UserError, match="0 examples in steps of 4 rows"):
        RowOrder([], rows_per_step=4, seed=0)
