"""Events (other weights, another batch, a jump, another n_ctx, lost shards): against the twin, and against counting."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from data_pipeline.order.ledger import Ledger, Segment
from data_pipeline.order.plan import Plan
from tests.helpers.order_twin import Leg, Source, Window, deal, dealt_to, served, zipped
from tests.helpers.seeds import seeded

Run = tuple[dict[str, list[int]], list[Leg], int, int]  # tokens of each source's shards, legs, lanes, seed
LANES = [1, 2, 3, 4, 6, 12]
EVENTS = ("weights", "batch", "jump", "n_ctx", "lost")
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def runs(draw: Callable, events: tuple[str, ...] = EVENTS, sources: int = 4, most: int = 5) -> Run:
    """Sources, and up to `most` events, each of one or more kinds. Each source keeps its last shard."""
    lanes, names = draw(st.sampled_from(LANES)), [f"s{n}" for n in range(draw(st.integers(1, sources)))]
    shard = st.one_of(st.integers(0, 12), st.integers(0, 90))
    tokens = {name: [*draw(st.lists(shard, max_size=5)), draw(st.integers(9, 60))] for name in names}
    weights = st.tuples(*[st.integers(0, 5)] * len(names)).filter(any)
    given_weights = dict(zip(names, draw(weights), strict=True))
    leg = Leg(0, 0, lanes * draw(st.integers(1, 3)), draw(st.integers(1, 8)), given_weights, {})
    legs = [leg]
    for _ in range(draw(st.integers(0, most))):
        kinds = draw(st.sets(st.sampled_from(events), min_size=1))
        step = leg.step + draw(st.integers(0, 5))
        position = leg.position + (step - leg.step) * leg.windows_per_step
        leg = leg._replace(step=step, position=position + lanes * draw(st.integers(0, 9)) * ("jump" in kinds))
        if "weights" in kinds:
            leg = leg._replace(weights=dict(zip(names, draw(weights), strict=True)))
        if "batch" in kinds:
            leg = leg._replace(windows_per_step=lanes * draw(st.integers(1, 4)))
        if "n_ctx" in kinds:
            leg = leg._replace(n_ctx=draw(st.integers(1, 8)))
        if "lost" in kinds:
            name = draw(st.sampled_from(names))
            more = draw(st.sets(st.integers(0, max(0, len(tokens[name]) - 2)), max_size=3)) if tokens[name][1:] else ()
            leg = leg._replace(lost={**leg.lost, name: tuple(sorted({*leg.lost.get(name, ()), *more}))})
        legs.append(leg)
    return tokens, legs, lanes, draw(st.integers(0, 2**31))


def plan_of(run: Run, known: int | None = None) -> Plan:
    tokens, legs, lanes, seed = run
    return Plan(tokens, Ledger(tuple(Segment(*leg) for leg in legs[:known])), lanes=lanes, seed=seed)


def dealt(run: Run, steps: int) -> tuple[list[Window], list[list[int]]]:
    tokens, legs, lanes, seed = run
    return deal(tokens, legs, lanes=lanes, seed=seed, steps=steps)


@given(runs(), st.data())
@settings(quick, max_examples=80)
def test_every_rank_gets_the_windows_dealt_by_hand(run: Run, data: st.DataObject) -> None:
    """Whatever the events, every rank gets the windows that are dealt by hand."""
    steps, lanes = run[1][-1].step + 4, run[2]
    dp = data.draw(st.sampled_from([d for d in LANES if lanes % d == 0]))
    windows, taken = dealt(run, steps)
    assert served(plan_of(run), range(steps), dp) == dealt_to(taken, windows, lanes, dp)


@pytest.mark.parametrize("keeps_n_ctx", [True, False])
def test_events_before_the_rest_is_read(keeps_n_ctx: bool) -> None:
    """One source, small steps: runs that were begun are cut again, and left over again, before a lane comes to them."""
    seed = seeded()
    rng = random.Random(seed)
    for _ in range(25):
        lanes, shards = rng.choice([2, 3, 4]), rng.randint(5, 9)
        tokens, order = {"s0": [rng.randint(9, 80) for _ in range(shards)]}, rng.sample(range(shards), shards)
        legs = [Leg(0, 0, lanes, 2, {"s0": 1}, {"s0": ()})]
        for n in range(1, shards - 1):
            step = legs[-1].step + rng.randint(1, 6)
            n_ctx = 2 if keeps_n_ctx else rng.randint(2, 4)
            legs.append(Leg(step, step * lanes, lanes, n_ctx, {"s0": 1}, {"s0": tuple(sorted(order[:n]))}))
        run = (tokens, legs, lanes, rng.randrange(2**31))
        windows, _ = dealt(run, legs[-1].step + 60)
        plan, line = plan_of(run), []
        for leg, after in zip(legs, [*(leg.position for leg in legs[1:]), len(windows)], strict=True):
            line += zipped(plan.windows_at(range(leg.position, after)))
        assert line == windows, f"seed {seed}: {run}"


@given(runs())
@settings(quick, max_examples=30)
def test_no_window_is_missing_or_served_twice(run: Run) -> None:
    """Whatever the events, no window of a step is missing or served twice."""
    steps = run[1][-1].step + 4
    windows, taken = dealt(run, steps)
    plan = plan_of(run)
    for step in range(steps):
        assert Counter(served(plan, [step], 1)[0][0]) == Counter(windows[p] for p in taken[step]), step


@given(runs())
@quick
def test_jumped_positions_are_drawn_as_before(run: Run) -> None:
    """Positions jumped over are drawn by the weights and the window length before the jump."""
    windows, taken = dealt(run, run[1][-1].step + 1)
    plan = plan_of(run)
    for position in sorted(set(range(len(windows))) - {p for step in taken for p in step}):
        assert zipped(plan.windows_at(range(position, position + 1))) == [windows[position]]


@given(runs(), st.data())
@quick
def test_steps_before_an_event_are_as_if_it_were_never_known(run: Run, data: st.DataObject) -> None:
    known = data.draw(st.integers(1, len(run[1])))
    until = run[1][known].step if known < len(run[1]) else run[1][-1].step + 3
    assert served(plan_of(run, known), range(until), 1) == served(plan_of(run), range(until), 1)


@given(runs(), st.data())
@quick
def test_a_fresh_plan_equals_walking_with_any_events(run: Run, data: st.DataObject) -> None:
    """Whatever the events, a fresh plan at any step equals walking there."""
    steps = run[1][-1].step + 4
    step = data.draw(st.integers(0, steps - 1))
    walking = plan_of(run)
    assert served(walking, range(step + 1), 1)[step:] == served(plan_of(run), [step], 1)


@given(runs(("batch", "jump", "lost"), sources=1))
@settings(quick, max_examples=60)
def test_a_lost_shard_costs_its_own_windows_and_no_other(run: Run) -> None:
    """After each event, the rest of the epoch brings every window that is still there to the same count.

    No twin: with one source the lanes draw in turn, so that each pass is a range of positions.
    """
    (tokens,), legs, lanes, seed = run[0].values(), [leg._replace(weights={"s0": 1}) for leg in run[1]], *run[2:]
    plan, n_ctx = plan_of((run[0], legs, lanes, seed)), legs[0].n_ctx
    end = legs[-1].position + 3 * sum(t // n_ctx for t in tokens) + lanes  # two epochs, and what is left of one
    line: list[Window] = []  # all positions
    for leg, after in zip(legs, [*(leg.position for leg in legs[1:]), end], strict=True):
        line += zipped(plan.windows_at(range(leg.position, after)))
    times: Counter[tuple[int, int]] = Counter()
    past = -1  # the pass that an era begins in
    eras = [leg for n, leg in enumerate(legs) if n == 0 or leg.lost.get("s0", ()) != legs[n - 1].lost.get("s0", ())]
    for era, until in zip(eras, [*(leg.position for leg in eras[1:]), end], strict=True):
        gone = set(era.lost.get("s0", ()))
        there = [(s, i) for s, t in enumerate(tokens) if s not in gone for i in range(0, t - n_ctx, n_ctx)]
        rest = sum(past + 1 - times[window] for window in there)
        for drawn, (_, *window) in enumerate(line[era.position : until]):
            if drawn >= rest and (drawn - rest) % len(there) == 0:
                passes = past + 1 + (drawn - rest) // len(there)
                assert {times[w] for w in there} == {passes}, era.position + drawn
            assert window[0] not in gone, era.position + drawn
            times[window[0], window[1]] += 1
        following = until - era.position + lanes - 1 - rest  # where the furthest lane's next window lies
        past += 0 if following < 0 else 1 + following // len(there)


@given(runs(), st.data())
@quick
def test_reads_of_a_token_and_counts_of_a_source(run: Run, data: st.DataObject) -> None:
    """The windows of a token and the draws of a source equal those counted over all windows."""
    tokens, legs, lanes, _ = run
    windows, _ = dealt(run, legs[-1].step + 4)
    plan, name = plan_of(run), data.draw(st.sampled_from(sorted(tokens)))
    until = data.draw(st.integers(0, len(windows) // lanes)) * lanes
    shard, start = data.draw(st.integers(0, len(tokens[name]) - 1)), data.draw(st.integers(0, 60))
    stop, source = start + data.draw(st.integers(1, 40)), sorted(tokens).index(name)
    n_ctx = [leg.n_ctx for p in range(until) for leg in [next(leg for leg in legs[::-1] if leg.position <= p)]]
    holds = [
        p
        for p, (s, at, first) in enumerate(windows[:until])
        if (s, at) == (source, shard) and not {*range(first, first + n_ctx[p] + 1)}.isdisjoint(range(start, stop))
    ]
    assert plan.positions_of(name, shard, start, stop, until).tolist() == holds
    assert plan.drawn(name, until) == sum(s == source for s, _, _ in windows[:until])


@given(st.lists(st.integers(0, 90), max_size=5), st.sampled_from(LANES), st.data())
@quick
def test_another_n_ctx_reads_no_token_twice_in_an_epoch(tokens: list[int], lanes: int, data: st.DataObject) -> None:
    """Another n_ctx reads no token twice in an epoch; only runs that were begun wait for the next."""
    tokens, columns = [*tokens, data.draw(st.integers(9, 60))], data.draw(st.integers(0, 20))
    old, new = data.draw(st.lists(st.integers(1, 8), min_size=2, max_size=2, unique=True))
    legs = [Leg(0, 0, lanes, old, {"s0": 1}, {}), Leg(columns, columns * lanes, lanes, new, {"s0": 1}, {})]
    plan = plan_of(({"s0": tokens}, legs, lanes, 3))
    left = rest_of(tokens, lanes, columns, old, old).rest  # as it lies, in windows of the old length
    begun = [piece for piece in left if piece.explicit]
    source = rest_of(tokens, lanes, columns, old, new)
    end, epochs = columns * lanes + sum(len(piece.windows) for piece in source.rest), source.past + 1
    labels: Counter[tuple[int, int]] = Counter()  # (shard, token): how often it was to be predicted
    for leg, positions in zip(legs, (range(columns * lanes), range(columns * lanes, end)), strict=True):
        for _, shard, start in zipped(plan.windows_at(positions)):
            labels.update((shard, start + i) for i in range(1, leg.n_ctx + 1))
    assert max(labels.values(), default=0) <= epochs
    lacking = sum(
        epochs - labels[shard, token] for shard, t in enumerate(tokens) for token in range(1, 1 + (t - 1) // old * old)
    )
    aside = sum(len(piece.windows) for piece in begun)
    assert lacking <= aside * old + (len(left) - len(begun)) * (new - 1)
    assert sum(tokens for _, _, tokens in plan.unread()) == lacking
    everything = [(0, s, i) for s, t in enumerate(tokens) for i in range(0, t - new, new)]
    for epoch in range(2):  # and from there on everything comes once an epoch
        start = end + epoch * len(everything)
        assert sorted(zipped(plan.windows_at(range(start, start + len(everything))))) == everything


def rest_of(tokens: list[int], lanes: int, columns: int, old: int, new: int) -> Source:
    source = Source("s0", tokens, lanes, 3, old, ())
    for position in range(columns * lanes):
        source.draw(position % lanes)
    source.event(new, ())
    return source


def test_a_source_without_windows_is_refused_once_drawn() -> None:
    """A source that has lost all its windows is refused once it is drawn, not before."""
    tokens = {"a": [50, 60], "b": [40]}
    legs = [Leg(0, 0, 4, 4, {"a": 1, "b": 1}, {}), Leg(5, 20, 4, 4, {"a": 0, "b": 1}, {"a": (0, 1)})]
    assert len(served(plan_of((tokens, legs, 4, 1)), range(9), 1)) == 9
    with pytest.raises(UserError, match="source a"):
        plan_of((tokens, [legs[0], legs[1]._replace(weights={"a": 1, "b": 1})], 4, 1))
