"""Jumps to one step, again and again, in plans with stages: against what is drawn step by step, by hand."""

from __future__ import annotations

import json
import random

import pytest

from data_pipeline.config import DataConfig, RampConfig, SourceConfig, StageConfig
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan
from data_pipeline.order.stages import plan_ledger
from tests.helpers.order_twin import Leg, deal, dealt_to, served

STEPS = 36


def legs_of(plan: Ledger, to: int, ends: list[int]) -> list[Leg]:
    """What a run draws that goes back to `to` from each of `ends`, walked step by step: a leg for each.

    The steps that it gives up are legs of no step.
    """
    legs, position = [], 0
    done = [(step, step) for step in range(to)]
    given_up = [(to, step) for end in ends for step in range(to, end)]
    for step, like in [*done, *given_up, *((step, step) for step in range(to, STEPS))]:
        here = plan.segment(like)
        legs.append(Leg(step, position, here.windows_per_step, here.n_ctx, here.weights, here.lost))
        position += here.windows_per_step
    return legs


def random_data(rng: random.Random, lanes: int) -> tuple[DataConfig, int, RampConfig]:
    names = ["a", "b", "c"][: rng.randint(1, 3)]
    stages = [
        StageConfig(
            step,
            {name: rng.choice([0.5, 1.0, 3.0]) for name in names} if rng.random() < 0.7 else None,
            rng.choice([None, 4, 8, 16]),
            rng.choice([None, lanes * 16, lanes * 48]),
        )
        for step in sorted(rng.sample(range(1, 20), rng.randint(0, 4)))
    ]
    sources = {name: SourceConfig(name, rng.choice([1.0, 2.0])) for name in names}
    size = lanes * 16 * rng.randint(1, 3)
    ramp = RampConfig(lanes * 16, rng.randint(1, 1500)) if size > lanes * 16 and rng.random() < 0.5 else RampConfig()
    return DataConfig(name="x", path=".", lanes=lanes, sources=sources, stages=stages), size, ramp


@pytest.mark.parametrize("jumps", [1, 2, 3])
def test_jumps_serve_no_window_twice_and_lose_none(jumps: int) -> None:
    """No window that a jump gave up is served, none is lost, and every order continues."""
    seed = random.randrange(10**9)
    rng = random.Random(seed)
    for _ in range(25):
        lanes = rng.choice([1, 2, 3])
        data, size, ramp = random_data(rng, lanes)
        plan = plan_ledger(data, n_ctx=16, tokens_per_step=size, ramp=ramp)
        to = rng.choice([0, *range(12), *(stage.step for stage in data.stages)])
        ends = [to + rng.randint(1, 9) for _ in range(jumps)]
        ledger = plan
        for end in ends:
            ledger = ledger.jump(to, end)
        told = f"seed {seed}: {data.stages}, to {to} from {ends}, lanes {lanes}"
        tokens = {name: [rng.randint(300, 900) for _ in range(60)] for name in data.sources}  # one epoch is enough
        legs = legs_of(plan, to, ends)
        windows, taken = deal(tokens, legs, lanes=lanes, seed=3, steps=STEPS)
        jumped = Plan(tokens, ledger, lanes=lanes, seed=3)
        assert all(jumped.passes(name, ledger.position(STEPS)) <= 1 for name in tokens), told
        assert served(jumped, range(STEPS), 1) == dealt_to(taken, windows, lanes, 1), told
        lengths = [leg.n_ctx for leg in legs for _ in range(leg.windows_per_step)]
        given_up = {p for p in range(len(windows)) if ledger.step_of(p) is None}
        assert given_up == set(range(ledger.position(STEPS))) - {p for step in taken for p in step}, told
        bad = {each for p in given_up for each in inputs(windows[p], lengths[p])}
        fed = [
            each
            for step in range(STEPS)
            for window in served(jumped, [step], 1)[0][0]
            for each in inputs(window, ledger.segment(step).n_ctx)
        ]
        assert len(set(fed)) == len(fed) == ledger.tokens(STEPS) and bad.isdisjoint(fed), told
        assert len(ledger.segments) <= len(plan.segments) * (jumps + 1) + jumps, told
        assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger, told
        for resumed in (to, to + 1, STEPS):
            how = {"n_ctx": 16, "tokens_per_step": size, "ramp": ramp, "past": ledger, "step": resumed}
            assert plan_ledger(data, **how) == ledger, told


def inputs(window: tuple[int, int, int], n_ctx: int) -> list[tuple[int, int, int]]:
    """(source, shard, token) of each input of a window."""
    source, shard, start = window
    return [(source, shard, start + t) for t in range(n_ctx)]
