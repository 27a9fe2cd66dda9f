"""The order against a twin that lists every window and has no formula."""

from __future__ import annotations

import tracemalloc
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from data_pipeline.order import epochs
from data_pipeline.order.permutation import permutation, splitmix64
from data_pipeline.order.plan import rank_positions
from tests.helpers.order_twin import twin

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


def Order(shard_windows: Sequence[int] | np.ndarray, lanes: int, seed: int) -> epochs.Order:
    """Shards of these many windows, n_ctx 1: a window's first token is then its number."""
    return epochs.Order([n + (n > 0) for n in shard_windows], 1, lanes, seed)


def walk(order: epochs.Order, positions: np.ndarray | range) -> Windows:
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
    with pytest.raises(UserError, match=r"0 windows of n_ctx=1 \+ 1 tokens in 2 shards"):
        Order([0, 0], 4, 0)
    with pytest.raises(UserError, match="lanes=0"):
        Order([3], 0, 0)


def test_a_seek_in_100_000_shards_takes_megabytes() -> None:
    """A seek among a hundred thousand shards takes megabytes of memory, not an epoch."""
    tracemalloc.start()
    order = Order(np.full(100_000, 4882), 1024, 1337)
    order.windows_at(rank_positions(order.windows * 9 // 10 // 1024 * 1024, 1024, 1024, 7, 1024))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20  # an epoch's order is 488 million windows, 4 GB
