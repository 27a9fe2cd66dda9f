"""The ledger: positions, steps and tokens of a run with events, and what it refuses."""

from __future__ import annotations

import pytest

from conf.errors import UserError
from data_pipeline.order.ledger import Ledger


def test_the_ledger_gives_each_step_its_positions() -> None:
    ledger = (
        Ledger.start(4, 16, {"a": 1})
        .then(10, position=100, windows_per_step=4)
        .then(20, position=140, windows_per_step=8)
    )  # step 10 jumps from 40 to 100; step 20 doubles the batch
    assert [ledger.position(s) for s in (0, 9, 10, 11, 19, 20, 21, 1000)] == [0, 36, 100, 104, 136, 140, 148, 7980]
    assert [ledger.segment(s).windows_per_step for s in (0, 9, 10, 19, 20)] == [4, 4, 4, 4, 8]


def test_step_of_each_position() -> None:
    """`step_of` gives the step of each position, and None for those jumped over."""
    ledger = (
        Ledger.start(4, 16, {"a": 1})
        .then(10, position=100, windows_per_step=4)
        .then(10, position=120, windows_per_step=6)
        .then(20, position=180, windows_per_step=8)
    )
    found = {
        p: s
        for s in range(40)
        for p in range(ledger.position(s), ledger.position(s) + ledger.segment(s).windows_per_step)
    }
    last = max(found)
    assert [ledger.step_of(p) for p in range(last + 1)] == [found.get(p) for p in range(last + 1)]
    assert ledger.step_of(50) is None
    assert ledger.step_of(110) is None  # step 10 jumped twice


@pytest.mark.parametrize(("step", "position"), [(9, 30), (10, 39), (12, 107)])
def test_a_ledger_that_goes_back_is_refused(step: int, position: int) -> None:
    ledger = Ledger.start(4, 16, {"a": 1}).then(10, position=100, windows_per_step=4)
    with pytest.raises(UserError, match=f"step {step} at position {position} goes back"):
        ledger.then(step, position=position, windows_per_step=4)


def test_a_ledger_survives_json() -> None:
    ledger = Ledger.start(4, 16, {"a": 1}).then(10, position=100, windows_per_step=4)
    assert Ledger.from_json(ledger.to_json()) == ledger
    assert ledger.to_json()[1] == {
        "step": 10,
        "position": 100,
        "windows_per_step": 4,
        "n_ctx": 16,
        "weights": {"a": 1},
        "lost": {},
    }


GOOD = {"step": 0, "position": 0, "windows_per_step": 4, "n_ctx": 16, "weights": {"a": 1}, "lost": {}}


@pytest.mark.parametrize(
    "body",
    [
        None,
        3,
        [],
        [3],
        [{"step": 0}],
        [{**GOOD, "windows_per_step": "4"}],
        [{**GOOD, "windows_per_step": 0}],
        [{**GOOD, "step": 1}],
        [{**GOOD, "n_ctx": 0}],
        [{**GOOD, "weights": {}}],
        [{**GOOD, "weights": {"a": 0}}],
        [{**GOOD, "weights": {"a": -1, "b": 2}}],
        [{**GOOD, "weights": {"a": 0.5}}],
        [{**GOOD, "weights": None}],
        [{**GOOD, "lost": {"a": 3}}],
        [{**GOOD, "lost": {"a": ["3"]}}],
        [{**GOOD, "lost": {"a": [3]}}, {**GOOD, "step": 5, "position": 20}],  # found again
        [{**GOOD, "more": 1}],
    ],
)
def test_a_damaged_ledger_is_refused(body: object) -> None:
    with pytest.raises(UserError, match="ledger"):
        Ledger.from_json(body)


def test_a_step_before_the_first_is_refused() -> None:
    with pytest.raises(UserError, match="step=-1"):
        Ledger.from_json([GOOD]).position(-1)


def test_tokens_count_steps_and_no_jumps() -> None:
    """Tokens count the steps that were made, not the windows jumped over."""
    ledger = Ledger.start(4, 16, {"a": 1}).then(10, position=100).then(12, n_ctx=8, windows_per_step=8)
    expected = [0]
    for step in range(30):
        here = ledger.segment(step)
        expected.append(expected[-1] + here.windows_per_step * here.n_ctx)
    assert [ledger.tokens(step) for step in range(31)] == expected


def test_a_lost_shard_is_lost_from_its_step_on() -> None:
    """A lost shard is lost in every planned segment, and in none before its step."""
    ledger = Ledger.start(4, 16, {"a": 1, "b": 1}).then(10, weights={"a": 1, "b": 3}).lose(6, "b", 2).lose(8, "b", 1)
    assert [(s.step, s.position, dict(s.lost)) for s in ledger.segments] == [
        (0, 0, {}),
        (6, 24, {"b": (2,)}),
        (8, 32, {"b": (1, 2)}),
        (10, 40, {"b": (1, 2)}),
    ]
    assert Ledger.from_json(ledger.to_json()) == ledger


def test_an_event_drops_later_plans() -> None:
    """An event drops the plans after its step; an event without a change adds nothing."""
    ledger = Ledger.start(4, 16, {"a": 1}).then(10, windows_per_step=8)
    assert [s.step for s in ledger.then(5, n_ctx=8).segments] == [0, 5]
    assert ledger.then(20) == ledger
    assert ledger.then(0, windows_per_step=12) == Ledger.start(12, 16, {"a": 1})
    assert ledger.until(10) == Ledger.start(4, 16, {"a": 1})
