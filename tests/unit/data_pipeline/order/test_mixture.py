"""Several sources: missing, duplicate and misplaced windows against the twin that deals by hand; shares; resuming."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from data_pipeline.order.ledger import Ledger, Segment
from data_pipeline.order.mixture import Mixture, quantise
from data_pipeline.order.plan import Plan
from tests.helpers.order_twin import Leg, Window, deal, dealt_to, first_entry, served, table, zipped
from tests.helpers.seeds import seeded

LANES, N_CTX, STEPS, PER_STEP, SEED = 12, 4, 24, 24, 7
DPS = [1, 2, 3, 4, 6, 12]
NAMES = ["books", "code", "web"]
SHAPES = {
    "uneven": {"web": [201, 37, 90, 5], "code": [93, 65, 80], "books": [61, 30]},
    "fewer_shards_than_ranks": {"web": [401], "code": [241], "books": [57, 40]},
    "shorter_than_a_window": {"web": [190, 4, 205, 0], "code": [3, 241], "books": [4, 5, 81, 2]},
}
FIRST, THEN = {"web": 3, "code": 2, "books": 1}, {"web": 2, "code": 1, "books": 3}
GRID = [
    pytest.param(shape, sources, changes, dp, id=f"{shape}-{sources}_sources-{'changed' if changes else 'same'}-dp{dp}")
    for shape in SHAPES
    for sources in (1, 2, 3)
    for changes in (False, True)
    for dp in DPS
]
counts = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


def plan_of(tokens: Mapping[str, Sequence[int]], legs: Sequence[Leg], lanes: int, seed: int = SEED) -> Plan:
    return Plan(tokens, Ledger(tuple(Segment(*leg) for leg in legs)), lanes=lanes, seed=seed)


def run_of(shape: str, sources: int, changes: bool) -> tuple[dict[str, list[int]], list[Leg]]:
    names = ["web", "code", "books"][:sources]
    legs = [Leg(0, 0, PER_STEP, N_CTX, {name: FIRST[name] for name in names}, {})]
    if changes:
        legs.append(Leg(12, 12 * PER_STEP, PER_STEP, N_CTX, {name: THEN[name] for name in names}, {}))
    return {name: SHAPES[shape][name] for name in names}, legs


@cache
def expected(shape: str, sources: int, changes: bool) -> tuple[list[Window], list[list[int]]]:
    tokens, legs = run_of(shape, sources, changes)
    return deal(tokens, legs, lanes=LANES, seed=SEED, steps=STEPS)


@cache
def given_out(shape: str, sources: int, changes: bool, dp: int) -> list[list[list[Window]]]:
    tokens, legs = run_of(shape, sources, changes)
    return served(plan_of(tokens, legs, LANES), range(STEPS), dp)


def epochs_of(shape: str, sources: int, changes: bool, dp: int) -> dict[tuple[str, int], list[tuple[int, int]]]:
    """(source, epoch) -> the windows given out in it: a lane's j-th of a source is position j lanes + lane of it."""
    tokens, _ = run_of(shape, sources, changes)
    each = LANES // dp
    total = [sum(max(0, t - 1) // N_CTX for t in tokens[name]) for name in sorted(tokens)]
    drawn: Counter[tuple[int, int]] = Counter()
    epochs: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for step in given_out(shape, sources, changes, dp):
        for rank, windows in enumerate(step):
            for n, (source, shard, start) in enumerate(windows):
                lane = rank * each + n % each
                epoch = (drawn[source, lane] * LANES + lane) // total[source]
                epochs.setdefault((sorted(tokens)[source], epoch), []).append((shard, start))
                drawn[source, lane] += 1
    return epochs


def every_window(tokens: Sequence[int]) -> list[tuple[int, int]]:
    return [(shard, start) for shard, t in enumerate(tokens) for start in range(0, t - N_CTX, N_CTX)]


@pytest.mark.parametrize(("shape", "sources", "changes", "dp"), GRID)
def test_no_window_is_missing(shape: str, sources: int, changes: bool, dp: int) -> None:
    windows, taken = expected(shape, sources, changes)
    for step, ranks in enumerate(given_out(shape, sources, changes, dp)):
        assert Counter(windows[p] for p in taken[step]) - Counter(w for rank in ranks for w in rank) == Counter()
    tokens, _ = run_of(shape, sources, changes)
    epochs = epochs_of(shape, sources, changes, dp)
    for name in tokens:
        for epoch in (0, 1):  # each source goes through two epochs whole
            assert set(every_window(tokens[name])) - set(epochs[name, epoch]) == set(), (name, epoch)


@pytest.mark.parametrize(("shape", "sources", "changes", "dp"), GRID)
def test_no_window_is_a_duplicate(shape: str, sources: int, changes: bool, dp: int) -> None:
    windows, taken = expected(shape, sources, changes)
    for step, ranks in enumerate(given_out(shape, sources, changes, dp)):
        assert Counter(w for rank in ranks for w in rank) - Counter(windows[p] for p in taken[step]) == Counter()
    for where, given_in in epochs_of(shape, sources, changes, dp).items():
        assert len(given_in) == len(set(given_in)), where


@pytest.mark.parametrize(("shape", "sources", "changes", "dp"), GRID)
def test_no_window_is_in_an_incorrect_order(shape: str, sources: int, changes: bool, dp: int) -> None:
    windows, taken = expected(shape, sources, changes)
    for step, ranks in enumerate(dealt_to(taken, windows, LANES, dp)):
        assert given_out(shape, sources, changes, dp)[step] == ranks, step


@given(counts, st.sampled_from([1, 2, 3, 12, 64]))
@settings(max_examples=60, deadline=None)
def test_the_table_is_the_one_dealt_by_hand(weights: list[int], lanes: int) -> None:
    assert Mixture(tuple(weights), lanes).table.tolist() == table(weights, lanes)


@given(counts, st.integers(0, 11))
@settings(max_examples=60, deadline=None)
def test_a_period_holds_each_source_exactly(weights: list[int], lane: int) -> None:
    """Every period of a lane holds each source exactly; inside it, each is within one window of its share."""
    period = sum(weights)
    entries = sources_of_lanes(weights, columns=3 * period)[lane]
    begins = -(lane + first_entry(weights, LANES)) % period  # where the lane has Tijdeman's first entry
    for source, weight in enumerate(weights):
        drawn = [0, *accumulate(entry == source for entry in entries)]
        assert {drawn[i + period] - drawn[i] for i in range(2 * period + 1)} == {weight}
        for i in range(period + 1):  # Tijdeman: at most 1 - 1 / (2 k - 2) from the share
            assert abs(drawn[begins + i] - drawn[begins] - Fraction(weight * i, period)) < 1
        for i in range(len(entries)):  # a lane that begins inside a period is the difference of two such
            assert abs(drawn[i] - Fraction(weight * i, period)) < 2


@given(counts, st.sampled_from([1, 2, 3, 4, 6, 12, 64]))
@settings(max_examples=60, deadline=None)
def test_a_column_is_within_two_windows_of_each_share(weights: list[int], lanes: int) -> None:
    """A column of lanes is within two windows of each share, so it is never of one source alone."""
    period = sum(weights)
    for column in zip(*sources_of_lanes(weights, columns=2 * period, lanes=lanes), strict=True):
        for source, weight in enumerate(weights):
            assert abs(column.count(source) - Fraction(lanes * weight, period)) < 2
        if lanes * (period - max(weights)) >= 2 * period:
            assert len(set(column)) > 1


SOME = random.Random(seeded())
MANY = [[SOME.randint(0, 12) for _ in range(SOME.randint(4, 9))] + [1] for _ in range(6)]  # fresh each time


@pytest.mark.parametrize(
    "weights", [[1], [3, 2, 1], [1, 1, 1], [5, 0, 2], [1, 90], [40, 9, 33], [5, 4, 4, 4, 4], *MANY]
)
@pytest.mark.parametrize("lanes", [1, 2, 3, 12])
def test_a_run_is_within_one_window_per_lane_of_each_share(weights: list[int], lanes: int) -> None:
    """At every step the run is within one window per lane of each share."""
    period, drawn = sum(weights), [0] * len(weights)
    columns = zip(*sources_of_lanes(weights, columns=2 * period + 1, lanes=lanes), strict=True)
    for n, column in enumerate(columns, start=1):
        for source, weight in enumerate(weights):
            drawn[source] += column.count(source)
            assert abs(drawn[source] - Fraction(n * lanes * weight, period)) <= lanes
            assert n % period or drawn[source] == n // period * lanes * weight


def sources_of_lanes(weights: Sequence[int], columns: int, lanes: int = LANES) -> list[list[int]]:
    """[lane][column]: the source that a plan draws there."""
    names = [f"s{n}" for n in range(len(weights))]
    leg = Leg(0, 0, lanes * columns, 1, dict(zip(names, weights, strict=True)), {})
    source = plan_of({name: [300] for name in names}, [leg], lanes).step(0)[1].source.tolist()
    return [source[lane::lanes] for lane in range(lanes)]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_changed_weights_take_effect_exactly_at_their_step(data: st.DataObject) -> None:
    weights = [dict(zip(NAMES, data.draw(st.tuples(*[st.integers(0, 6)] * 3).filter(any)), strict=True)) for _ in "ab"]
    step, lanes = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 4, 12]))
    legs = [Leg(0, 0, 2 * lanes, N_CTX, weights[0], {}), Leg(step, step * 2 * lanes, 2 * lanes, N_CTX, weights[1], {})]
    changed, same = plan_of(SHAPES["uneven"], legs, lanes), plan_of(SHAPES["uneven"], legs[:1], lanes)
    before, after = (table([weights[n][name] for name in NAMES], lanes) for n in (0, 1))
    for s in range(step + 5):
        cycle, column = (before, 2 * s) if s < step or weights[0] == weights[1] else (after, 2 * (s - step))
        drawn = [cycle[(c + lane) % len(cycle)] for c in (column, column + 1) for lane in range(lanes)]
        assert changed.step(s)[1].source.tolist() == drawn, s
        assert s >= step or served(changed, [s], 1) == served(same, [s], 1), s


def test_each_source_keeps_its_place_when_weights_change() -> None:
    tokens, weights = SHAPES["uneven"], [FIRST, THEN, {"web": 0, "code": 1, "books": 4}, FIRST]
    legs = [Leg(6 * n, 6 * n * PER_STEP, PER_STEP, N_CTX, w, {}) for n, w in enumerate(weights)]
    mixed = [w for step in range(30) for w in zipped(plan_of(tokens, legs, LANES).step(step)[1])]
    for source, name in enumerate(NAMES):
        alone = plan_of({name: tokens[name]}, [Leg(0, 0, PER_STEP, N_CTX, {name: 1}, {})], LANES)
        line = [w for step in range(30) for w in zipped(alone.step(step)[1])]
        for lane in range(LANES):
            drawn = [(shard, start) for s, shard, start in mixed[lane::LANES] if s == source]
            assert drawn == [(shard, start) for _, shard, start in line[lane::LANES]][: len(drawn)], (name, lane)


LEDGER = [
    Leg(0, 0, 24, 4, FIRST, {}),
    Leg(9, 216, 36, 4, THEN, {}),
    Leg(15, 468, 36, 6, THEN, {"web": (1,)}),
    Leg(22, 720, 12, 6, FIRST, {"web": (1,), "code": (0,)}),
]


def test_a_fresh_plan_at_any_step_equals_walking() -> None:
    walking = plan_of(SHAPES["uneven"], LEDGER, LANES)
    line = served(walking, range(30), 4)
    for step in range(30):
        assert served(plan_of(SHAPES["uneven"], LEDGER, LANES), [step], 4) == line[step : step + 1], step


def test_ten_stops_with_other_dp_give_the_same_stream() -> None:
    """Ten stops, each followed by another data-parallel size, give the same stream."""
    seed = seeded()
    rng = random.Random(seed)
    windows, taken = deal(SHAPES["uneven"], LEDGER, lanes=LANES, seed=SEED, steps=40)
    stops, stream, dp = [0, *sorted(rng.sample(range(1, 40), 10)), 40], [], 0
    for start, stop in pairwise(stops):
        dp = rng.choice([d for d in DPS if d != dp])
        plan = plan_of(SHAPES["uneven"], [leg for leg in LEDGER if leg.step < stop], LANES)  # what is known by then
        for step in range(start, stop):
            at = {p: w for r in range(dp) for p, w in zip(*parts(plan, step, r, dp), strict=True)}
            stream += [at[p] for p in sorted(at)]
    assert stream == [windows[p] for step in taken for p in step], f"seed {seed}"


def parts(plan: Plan, step: int, rank: int, dp: int) -> tuple[list[int], list[Window]]:
    positions, windows = plan.step(step, rank, dp)
    return positions.tolist(), zipped(windows)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=5).filter(any))
@settings(max_examples=60, deadline=None)
def test_hundredths_become_the_smallest_exact_integers(hundredths: list[int]) -> None:
    """Weights in hundredths become the smallest integers with the same shares."""
    exact = [Fraction(h, sum(hundredths)) for h in hundredths]
    period = next(p for p in range(1, 4097) if all((share * p).denominator == 1 for share in exact))
    said = quantise({f"s{n}": h / 100 for n, h in enumerate(hundredths)})
    assert list(said.values()) == [share * period for share in exact]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3))
@settings(max_examples=100, deadline=None)
def test_other_weights_become_parts_of_4096(weights: list[float]) -> None:
    """Other weights become parts of 4,096, and none above 0 becomes 0."""
    said = list(quantise({f"s{n}": w for n, w in enumerate(weights)}).values())
    assert sum(said) <= 4096
    assert [bool(n) for n in said] == [w > 0 for w in weights]
    for n, w in zip(said, weights, strict=True):
        share = Fraction(w) / sum(map(Fraction, weights)) * sum(said)
        assert abs(n - share) < 1 + len(weights), (said, weights)  # those lifted to 1 are taken from the others


@pytest.mark.parametrize("weights", [{}, {"web": 0.0}, {"web": -1.0, "code": 2.0}, {"web": float("nan"), "code": 1.0}])
def test_weights_that_draw_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match="weights"):
        quantise(weights)
