"""The order against a twin that lists every window and has no formula."""

from __future__ import annotations

import tracemalloc
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import UserError
from data_pipeline.plan import Ledger, Order, Segment, permutation, rank_positions, splitmix64

Windows = list[tuple[int, int]]

shapes = st.tuples(
    st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any),  # 0: a shard shorter than a window
    st.integers(1, 13),
    st.integers(0, 2**63),
)
EXAMPLES = [  # shards, lanes
    ([7, 7, 7, 7], 4),
    ([5, 1, 9, 0, 3], 6),  # uneven, one without a window
    ([17], 12),  # fewer shards than lanes
    ([2, 1], 12),  # fewer windows than lanes
    ([40, 3, 25, 11, 1, 0, 8], 12),
]


def mix(seed: int, n: int) -> list[int]:
    out, mask = [], 2**64 - 1
    for _ in range(n):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((seed ^ seed >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        out.append(z ^ z >> 31)
    return out


def shuffled(things: list, *key: int) -> list:
    folded = 0
    for part in key:
        folded = mix(folded ^ part, 1)[0]
    return [thing for _, thing in sorted(zip(mix(folded, len(things)), things, strict=True))]


def twin(shard_windows: list[int], lanes: int, seed: int, epochs: int) -> Windows:
    """The windows of these many epochs in serial order, by plain lists."""
    total, out = sum(shard_windows), []
    for epoch in range(epochs):
        lane_of = [p % lanes for p in range(epoch * total, (epoch + 1) * total)]
        line = [
            (s, w) for s in shuffled(list(range(len(shard_windows))), seed, 0, epoch) for w in range(shard_windows[s])
        ]
        queues: list[Windows] = []
        for lane in range(lanes):
            share, line = line[: lane_of.count(lane)], line[lane_of.count(lane) :]
            queue: Windows = []
            while share:
                shard = share[0][0]
                part = [w for w in share if w[0] == shard]
                queue += shuffled(part, seed, 1, epoch, lane, shard)
                share = share[len(part) :]
            queues.append(queue)
        out += [queues[lane].pop(0) for lane in lane_of]
    return out


def walk(order: Order, positions: np.ndarray | range) -> Windows:
    return list(zip(*(a.tolist() for a in order.windows_at(positions)), strict=True))


@given(shapes)
@settings(max_examples=80, deadline=None)
def test_no_window_is_missing_from_an_epoch(shape: tuple[list[int], int, int]) -> None:
    shards, lanes, seed = shape
    order, everything = Order(shards, lanes, seed), {(s, w) for s, n in enumerate(shards) for w in range(n)}
    for epoch in range(3):
        assert everything - set(walk(order, range(epoch * order.windows, (epoch + 1) * order.windows))) == set()


@given(shapes)
@settings(max_examples=80, deadline=None)
def test_no_window_is_a_duplicate_within_an_epoch(shape: tuple[list[int], int, int]) -> None:
    order = Order(*shape)
    for epoch in range(3):
        seen = Counter(walk(order, range(epoch * order.windows, (epoch + 1) * order.windows)))
        assert [window for window, times in seen.items() if times > 1] == []


@given(shapes)
@settings(max_examples=80, deadline=None)
def test_no_window_is_out_of_order(shape: tuple[list[int], int, int]) -> None:
    assert walk(Order(*shape), range(3 * sum(shape[0]))) == twin(*shape, epochs=3)


@pytest.mark.parametrize(("shards", "lanes"), EXAMPLES)
def test_named_shapes_are_in_order_over_several_epochs(shards: list[int], lanes: int) -> None:
    assert walk(Order(shards, lanes, 7), range(5 * sum(shards))) == twin(shards, lanes, 7, epochs=5)


@pytest.mark.parametrize(("shards", "lanes"), EXAMPLES)
def test_seek_equals_walking(shards: list[int], lanes: int) -> None:
    expected = twin(shards, lanes, 3, epochs=4)
    for p in range(len(expected)):
        assert walk(Order(shards, lanes, 3), np.array([p])) == [expected[p]]


def test_going_back_and_forth_serves_the_same_windows() -> None:
    order, expected = Order([40, 3, 25, 11], 4, 5), twin([40, 3, 25, 11], 4, 5, epochs=3)
    for p in np.random.default_rng(0).integers(0, len(expected), size=(50, 20)):
        assert walk(order, p) == [expected[q] for q in p]


@pytest.mark.parametrize("dp", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize(("shards", "lanes"), [(s, 12) for s, _ in EXAMPLES])
def test_every_dp_gives_the_same_global_batches(shards: list[int], lanes: int, dp: int) -> None:
    expected = twin(shards, lanes, 11, epochs=1 + 36 * 5 // sum(shards))
    orders = [Order(shards, lanes, 11) for _ in range(dp)]
    for step in range(5):
        ranks = [rank_positions(step * 36, 36, lanes, r, dp) for r in range(dp)]
        served = {int(p): w for r in range(dp) for p, w in zip(ranks[r], walk(orders[r], ranks[r]), strict=True)}
        assert [served[p] for p in sorted(served)] == expected[step * 36 : (step + 1) * 36]
        assert all(len(r) == 36 // dp and sorted(r) == r.tolist() for r in ranks)


@settings(deadline=None)
@given(st.integers(0, 10**12), st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_a_rank_serves_whole_lanes_and_each_lane_equally(position: int, rounds: int, dp: int) -> None:
    for rank in range(dp):
        lanes = Counter((rank_positions(position, 12 * rounds, 12, rank, dp) % 12).tolist())
        assert lanes == dict.fromkeys(range(rank * 12 // dp, (rank + 1) * 12 // dp), rounds)


def test_rank_positions_refuses_what_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"windows per step=20 must be a multiple of data.lanes=12"):
        rank_positions(0, 20, 12, 0, 1)
    with pytest.raises(UserError, match=r"data.lanes=12, and that of dp=5"):
        rank_positions(0, 24, 12, 0, 5)


def test_each_shard_is_read_by_at_most_two_ranks_in_an_epoch() -> None:
    order, dp = Order(np.random.default_rng(1).integers(50, 70, size=300), 64, 1), 16
    p = np.arange(order.windows, 2 * order.windows)
    shards, _ = order.windows_at(p)
    pairs = set(zip(shards.tolist(), (p % 64 // (64 // dp)).tolist(), strict=True))
    assert max(Counter(shard for shard, _ in pairs).values()) == 2
    assert len(pairs) <= 300 + dp


def test_epochs_and_seeds_give_other_orders() -> None:
    shards = [30] * 8
    first = walk(Order(shards, 4, 1), range(240))
    assert first != walk(Order(shards, 4, 1), range(240, 480))
    assert first != walk(Order(shards, 4, 2), range(240))
    assert first != sorted(first)


def test_the_order_of_a_run_never_changes_between_versions() -> None:
    shards, indices = Order([1000, 2000, 0, 3000, 17], 8, 1337).windows_at(range(20000))
    assert zlib.crc32(np.stack([shards, indices]).astype("<i8").tobytes()) == 1996099991  # what the twin gives


def test_splitmix64_gives_its_published_outputs() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, 4).tolist() == published  # Rosetta Code, "Pseudo-random numbers/Splitmix64"


def test_a_permutation_is_one_and_looks_like_chance() -> None:
    draws = np.stack([permutation(50, 1, epoch) for epoch in range(4000)])
    assert (np.sort(draws, axis=1) == np.arange(50)).all()
    counts = (draws[:, :, None] == np.arange(50)).sum(axis=0)  # [place, value], 80 expected in each
    chi2 = ((counts - 80.0) ** 2 / 80.0).sum()
    assert 2200 < chi2 < 2620  # 49 x 49 = 2401 degrees of freedom, standard deviation 69


def test_epoch_counts_passes_over_the_source() -> None:
    order = Order([6, 4], 2, 0)
    assert [order.epoch(p) for p in (0, 5, 10, 25)] == [0.0, 0.5, 1.0, 2.5]


def test_an_order_without_windows_or_lanes_is_refused() -> None:
    with pytest.raises(UserError, match="0 windows in 2 shards"):
        Order([0, 0], 4, 0)
    with pytest.raises(UserError, match="lanes=0"):
        Order([3], 0, 0)


def test_a_seek_among_a_hundred_thousand_shards_holds_megabytes_not_an_epoch() -> None:
    tracemalloc.start()
    order = Order(np.full(100_000, 4882), 1024, 1337)
    order.windows_at(rank_positions(order.windows * 9 // 10 // 1024 * 1024, 1024, 1024, 7, 1024))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20  # an epoch's order is 488 million windows, 4 GB


def test_the_ledger_gives_each_step_its_positions() -> None:
    ledger = (
        Ledger.start(4).then(10, 100, 4).then(20, 140, 8)
    )  # step 10 jumps from 40 to 100; step 20 doubles the batch
    assert [ledger.position(s) for s in (0, 9, 10, 11, 19, 20, 21, 1000)] == [0, 36, 100, 104, 136, 140, 148, 7980]
    assert [ledger.windows_per_step(s) for s in (0, 9, 10, 19, 20)] == [4, 4, 4, 4, 8]


def test_step_of_finds_the_step_of_each_position_and_none_for_those_jumped_over() -> None:
    ledger = Ledger.start(4).then(10, 100, 4).then(10, 120, 6).then(20, 180, 8)
    found = {
        p: s for s in range(40) for p in range(ledger.position(s), ledger.position(s) + ledger.windows_per_step(s))
    }
    last = max(found)
    assert [ledger.step_of(p) for p in range(last + 1)] == [found.get(p) for p in range(last + 1)]
    assert ledger.step_of(50) is None
    assert ledger.step_of(110) is None  # step 10 jumped twice


@pytest.mark.parametrize(("step", "position"), [(9, 200), (10, 99), (12, 107)])
def test_a_ledger_that_goes_back_is_refused(step: int, position: int) -> None:
    ledger = Ledger.start(4).then(10, 100, 4)
    with pytest.raises(UserError, match=f"step {step} at position {position} goes back"):
        ledger.then(step, position, 4)


def test_a_ledger_survives_json() -> None:
    ledger = Ledger.start(4).then(10, 100, 4)
    assert Ledger.from_json(ledger.to_json()) == ledger
    assert ledger.to_json()[1] == {"step": 10, "position": 100, "windows_per_step": 4}


@pytest.mark.parametrize(
    "body",
    [
        None,
        3,
        [],
        [3],
        [{"step": 0}],
        [{"step": 0, "position": 0, "windows_per_step": "4"}],
        [{"step": 1, "position": 0, "windows_per_step": 4}],
        [{"step": 0, "position": 0, "windows_per_step": 0}],
    ],
)
def test_a_damaged_ledger_is_refused(body: object) -> None:
    with pytest.raises(UserError, match="ledger"):
        Ledger.from_json(body)


def test_a_step_before_the_first_is_refused() -> None:
    with pytest.raises(UserError, match="step=-1"):
        Ledger((Segment(0, 0, 4),)).position(-1)
