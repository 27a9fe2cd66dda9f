"""What a plan says beside windows: places kept, epochs counted, windows set aside, positions found again."""

from __future__ import annotations

import random

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan

TOKENS = {"a": [21, 31], "b": [300]}


def plan_of(ledger: Ledger) -> Plan:
    return Plan(TOKENS, ledger, lanes=4, seed=1)


def test_a_source_without_windows_for_a_while_continues() -> None:
    """A source that has no window for some steps continues from its place; it does not start again."""
    start = Ledger.start(4, 4, {"a": 1, "b": 1})
    ledger = start.then(3, n_ctx=60, weights={"a": 0, "b": 1}).then(5, n_ctx=4, weights={"a": 1, "b": 0})
    plan, never = plan_of(ledger), plan_of(Ledger.start(4, 4, {"a": 1, "b": 0}))
    assert plan.epoch("a", ledger.position(5)) == plan.passes("a", ledger.position(5)) == 1
    assert plan.passes("a", ledger.position(6)) == 2
    assert [tokens for step, name, tokens in plan.unread() if (step, name) == (3, "a")] == [6 * 4]
    first = [plan.step(step)[1].start.tolist() for step in range(5, 10)]
    assert first != [never.step(step)[1].start.tolist() for step in range(5)]  # not epoch 0 once more


def test_a_drawn_source_needs_a_window() -> None:
    """A source that is drawn and has no window is refused, with the step."""
    with pytest.raises(UserError, match=r"source a at step 3: 0 windows of n_ctx=60 \+ 1 tokens in 2 shards"):
        plan_of(Ledger.start(4, 4, {"a": 1}).then(3, n_ctx=60))
    with pytest.raises(UserError, match=r"source c at step 0: 0 windows .* in 0 shards"):
        plan_of(Ledger.start(4, 4, {"c": 1}))
    with pytest.raises(UserError, match=r"source a at step 2: 0 windows .* in 2 shards, 2 of them lost"):
        plan_of(Ledger.start(4, 4, {"a": 1}).lose(1, "a", 0).lose(2, "a", 1))


def test_a_batch_that_lanes_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"with 6 windows per step: both must be multiples of data.lanes=4"):
        plan_of(Ledger.start(6, 4, {"a": 1}))


def test_positions_of_two_segments_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="positions 11 to 12 are in more than one segment"):
        plan_of(Ledger.start(4, 4, {"a": 1}).then(3, n_ctx=5)).windows_at(range(11, 13))


def test_positions_of_tokens_are_complete() -> None:
    """Every position whose window holds some tokens is found, up to any position."""
    seed = random.randrange(10**9)
    rng = random.Random(seed)
    ledger = Ledger.start(8, 4, {"a": 2, "b": 1}).then(6, n_ctx=7).then(9, position=200, weights={"a": 1, "b": 1})
    plan = plan_of(ledger)
    held = []  # (source, shard, start, n_ctx) at each position
    for p in range(400):
        source, shard, start = (part[0] for part in plan.windows_at(range(p, p + 1)))
        held.append((plan.names[source], shard, start, ledger.segments[ledger.number_at(p)].n_ctx))
    for _ in range(200):
        name, until = rng.choice("ab"), rng.randrange(401)
        shard = rng.randrange(len(TOKENS[name]))
        start = rng.randrange(TOKENS[name][shard])
        stop = rng.randint(start + 1, TOKENS[name][shard])
        wanted = [
            p
            for p, (n, s, at, n_ctx) in enumerate(held[:until])
            if (n, s) == (name, shard) and at < stop <= stop + at and at + n_ctx >= start
        ]
        assert plan.positions_of(name, shard, start, stop, until).tolist() == wanted, seed


def test_epochs_and_passes_are_draws_over_windows() -> None:
    """Epochs and passes of a source are its draws divided by its windows."""
    plan = plan_of(Ledger.start(4, 4, {"a": 1, "b": 0}))  # 5 + 7 windows
    assert [plan.epoch("a", p) for p in (0, 4, 12, 24, 40)] == [0, 4 / 12, 1, 2, 40 / 12]
    assert [plan.passes("a", p) for p in (0, 4, 12, 16, 24, 28)] == [0, 1, 1, 2, 2, 3]
    assert (plan.epoch("b", 40), plan.passes("b", 40), plan.drawn("a", 40)) == (0, 0, 40)


def test_sources_of_equal_shards_are_not_shuffled_alike() -> None:
    plan = Plan({"x": [900] * 4, "y": [900] * 4}, Ledger.start(8, 4, {"x": 1, "y": 1}), lanes=4, seed=1)
    _, windows = plan.step(0)
    walks = [
        [plan.windows_at(range(p, p + 1)) for p in range(400) if plan.windows_at(range(p, p + 1)).source[0] == source]
        for source in (0, 1)
    ]
    assert len(windows.source) == 8
    assert not np.array_equal(*([int(w.start[0]) for w in walk[:100]] for walk in walks))


def test_an_epoch_counts_from_its_first_window() -> None:
    """An epoch counts once a window of it is drawn, not once an event finds it next."""
    start = Ledger.start(12, 4, {"a": 1, "b": 0})  # 12 windows of a: exactly one epoch in step 0
    plan = plan_of(start.then(1, n_ctx=5, weights={"a": 0, "b": 1}))
    assert plan.passes("a", plan.ledger.position(9)) == 1
    assert plan_of(Ledger.start(4, 4, {"a": 0, "b": 1}).then(3, n_ctx=5)).passes("a", 400) == 0


def test_a_removed_source_with_a_lost_shard_is_ignored() -> None:
    """A source that lost a shard and was then removed does not stop the run."""
    ledger = Ledger.start(4, 4, {"a": 1, "b": 1}).lose(3, "b", 0).then(6, weights={"a": 1, "b": 0})
    plan = Plan({"a": TOKENS["a"]}, ledger, lanes=4, seed=1)
    assert plan.step(7)[1].source.tolist() == [0] * 4
    with pytest.raises(UserError, match=r"source b, drawn at position \d+, is not given: add it to data.sources"):
        plan.step(2)
    with pytest.raises(UserError, match=r"source b has lost shards \[7\] of 1"):
        plan_of(Ledger.start(4, 4, {"a": 1, "b": 1}).lose(3, "b", 7))
