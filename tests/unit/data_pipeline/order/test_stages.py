"""Stages, the batch ramp and what a resumed run changes, against a walk step by step."""

from __future__ import annotations

import random

import pytest

from conf.errors import UserError
from data_pipeline.config import DataConfig, RampConfig, SourceConfig, StageConfig
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.mixture import quantise
from data_pipeline.order.stages import describe, plan_ledger, rounding

NO_RAMP = RampConfig()


def data(lanes: int = 4, stages: tuple[StageConfig, ...] = (), **weights: float) -> DataConfig:
    sources = {name: SourceConfig(name, weight=w) for name, w in (weights or {"a": 1.0}).items()}
    return DataConfig("mix", "data", sources, lanes, list(stages))


@pytest.mark.parametrize("case", range(60))
def test_every_step_has_the_size_of_its_stage_and_ramp(case: int) -> None:
    """Every step has the size that its stage and the tokens so far give."""
    seed = random.randrange(10**9)
    rng = random.Random(seed)
    lanes, n_ctx = rng.randint(1, 5), rng.randint(1, 9)
    at, stages = 0, []
    for _ in range(rng.randint(0, 4)):
        at += rng.randint(1, 40)
        weights = {"a": rng.randint(0, 3) + 0.5} if rng.random() < 0.5 else None
        new_ctx = rng.choice([None, n_ctx, 2 * n_ctx])
        stages.append(StageConfig(at, weights, new_ctx, lanes * n_ctx * 2 * rng.randint(1, 9)))
    full, start, over = lanes * n_ctx * 2 * rng.randint(4, 9), 0, 0
    if ramp := rng.random() < 0.7:
        start, over = rng.randint(lanes * n_ctx * 2, lanes * n_ctx * 2), rng.randint(1, 4000)
    config = data(lanes, tuple(stages), a=1, b=2)
    ledger = plan_ledger(config, n_ctx=n_ctx, tokens_per_step=full, ramp=RampConfig(start, over) if ramp else NO_RAMP)
    tokens, weights, ctx, size = 0, {"a": 1.0, "b": 2.0}, n_ctx, full
    for step in range(200):
        for stage in stages:
            if stage.step == step:
                weights |= stage.weights or {}
                ctx, size = stage.n_ctx or ctx, stage.tokens_per_step or size
        wanted = int(start + (size - start) * min(tokens / over, 1)) if ramp else size
        windows = wanted // (lanes * ctx) * lanes
        here = ledger.segment(step)
        assert (here.n_ctx, here.windows_per_step, dict(here.weights)) == (ctx, windows, quantise(weights)), seed
        assert ledger.tokens(step) == tokens, seed
        tokens += windows * ctx


def test_gpt3s_ramp_grows_from_32k_to_half_a_million() -> None:
    """Brown et al. 2020, section 2.3 of the appendix: linearly from 32k tokens, over the first 4 to 12 billion."""
    ledger = plan_ledger(data(16), n_ctx=2048, tokens_per_step=524288, ramp=RampConfig(32768, 4_000_000_000))
    sizes = [s.windows_per_step for s in ledger.segments]
    assert sizes == list(range(16, 257, 16))
    for segment in ledger.segments:
        line = 32768 + (524288 - 32768) * min(1, ledger.tokens(segment.step) / 4e9)
        assert 0 <= line - segment.tokens_per_step < 524288 / 4e9 * 524288 + 1  # it steps up as soon as it may
    assert len(describe(ledger, 10**9, 2, 12)) == len(sizes)
    assert describe(ledger, 8140, 2, 12)[1] == (
        "from step 8139 (266,698,752 tokens): 32 windows of 2048 tokens a step = dp 2 x micro batch 8 x 2; a 1"
    )


def test_a_resumed_run_that_changes_nothing_has_the_same_ledger() -> None:
    config = data(4, (StageConfig(30, {"a": 3}), StageConfig(50, None, 8, 256)), a=1, b=1)
    plan = {"n_ctx": 16, "tokens_per_step": 1280, "ramp": RampConfig(64, 20_000)}
    ledger = plan_ledger(config, **plan)
    for step in (0, 1, 17, 30, 31, 49, 50, 500):
        assert plan_ledger(config, **plan, past=ledger, step=step) == ledger


def test_a_resumed_runs_changes_are_events_at_its_step() -> None:
    """Changes of a resumed run are events at its step; the rest is planned again."""
    config = data(4, (StageConfig(30, {"a": 3}),), a=1, b=1)
    ledger = plan_ledger(config, n_ctx=16, tokens_per_step=64, ramp=NO_RAMP)
    other = plan_ledger(data(4, a=1, b=1, c=2), n_ctx=16, tokens_per_step=128, ramp=NO_RAMP, past=ledger, step=20)
    assert [(s.step, s.position, s.windows_per_step, dict(s.weights)) for s in other.segments] == [
        (0, 0, 4, {"a": 1, "b": 1}),
        (20, 80, 8, {"a": 1, "b": 1, "c": 2}),
    ]
    assert other.until(20) == ledger.until(20)


def test_a_lost_shard_stays_lost_when_a_run_is_resumed() -> None:
    config = data(4, (StageConfig(30, {"a": 3}),), a=1, b=1)
    plan = {"n_ctx": 16, "tokens_per_step": 64, "ramp": NO_RAMP}
    ledger = plan_ledger(config, **plan).lose(10, "b", 2)
    assert plan_ledger(config, **plan, past=ledger, step=12) == ledger
    assert plan_ledger(config, **plan, past=Ledger.from_json(ledger.to_json()), step=40) == ledger


@pytest.mark.parametrize(
    ("tokens_per_step", "ramp", "message"),
    [
        (100, NO_RAMP, "tokens_per_step=100 from step 0 on .*data.lanes=4 windows of n_ctx=16 .*=64 or 128"),
        (32, NO_RAMP, "give tokens_per_step=64"),
        (
            128,
            RampConfig(63, 10),
            "batch_ramp.start=63 makes a batch of 63 .*data.lanes=4 x n_ctx=16 = 64.* give batch_ramp.start=64",
        ),
        (128, RampConfig(129, 10), "batch_ramp.start=129 .*tokens_per_step=128"),
    ],
)
def test_a_batch_that_lanes_cannot_share_is_refused(tokens_per_step: int, ramp: RampConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_ledger(data(4), n_ctx=16, tokens_per_step=tokens_per_step, ramp=ramp)


def test_a_ramp_that_is_over_binds_no_later_stage() -> None:
    stages = (StageConfig(100_000, None, 1024), StageConfig(200_000, None, None, 65536))
    ledger = plan_ledger(data(64, stages), n_ctx=512, tokens_per_step=131072, ramp=RampConfig(32768, 1_000_000))
    assert [(s.n_ctx, s.tokens_per_step) for s in ledger.segments][-2:] == [(1024, 131072), (1024, 65536)]


def test_weights_rounded_by_over_a_hundredth_are_reported() -> None:
    """Weights that rounding changes by more than a hundredth are reported."""
    assert rounding(data(4, a=0.6, b=0.22, c=0.08, d=0.08, e=0.03)) == []
    [line] = rounding(data(4, a=1, b=1e-6))
    assert line.startswith("from step 0: b is drawn for 0.000244 of the windows, 1e-06 is asked for")
    [later] = rounding(data(4, (StageConfig(7, {"b": 1e-6}),), a=1, b=1))
    assert later.startswith("from step 7: b is drawn")
