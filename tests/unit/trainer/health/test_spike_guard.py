"""The guard's judgement, its history and its jumps in the ledger."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest

from conf.errors import TransientError, UserError
from data_pipeline.config import DataConfig, RampConfig, SourceConfig, StageConfig
from data_pipeline.order.ledger import Ledger, Segment
from data_pipeline.order.plan import Plan
from data_pipeline.order.stages import plan_ledger
from tests.helpers.seeds import seeded
from trainer.config.health import GuardConfig
from trainer.data.step_size import StepSize
from trainer.health.spike_guard import EVENTS, Guard

NAN, INF = math.nan, math.inf


def verdict(history: list[tuple[float, float]], cfg: GuardConfig, loss: float, norm: float) -> str | None:
    """The rule, written out in numpy."""
    if not np.isfinite([loss, norm]).all():
        return "non-finite"
    seen = np.array(history[-cfg.window :])
    if cfg.spike_z == 0 or len(seen) < cfg.min_steps:
        return None
    for what, x, values, floor in (
        ("loss spike", loss, seen[:, 0], 0.02),
        ("gradient spike", np.log(norm), np.log(seen[:, 1]), 0.2),
    ):
        scale = max(1.4826 * np.median(np.abs(values - np.median(values))), floor)
        if (x - np.median(values)) / scale > cfg.spike_z:
            return what
    return None


def test_steps_are_judged_by_a_robust_score() -> None:
    """The score of the accepted steps, against the rule written out in numpy."""
    rng = random.Random(seeded())
    found = set()
    for _ in range(60):
        cfg = GuardConfig(spike_z=rng.choice([0, 3, 6, 12]), window=rng.randrange(8, 40), min_steps=8)
        guard, accepted = Guard(cfg), list[tuple[float, float]]()
        for step in range(80):
            loss = 3 * 0.98**step + rng.gauss(0, 0.1) + 6 * (rng.random() < 0.05)
            norm = math.exp(rng.gauss(0, 0.3) + 5 * (rng.random() < 0.05))
            loss, norm = (rng.choice([NAN, INF, x]) if rng.random() < 0.03 else x for x in (loss, norm))
            want = verdict(accepted, cfg, loss, norm)
            assert guard.judge(loss, norm) == want, (accepted, cfg, loss, norm)
            assert guard.record(step, 8 * step, loss, norm) == want
            found.add(want)
            if want is None:
                accepted.append((loss, norm))
        assert list(guard.recent) == accepted[-cfg.window :]
    assert found == {None, "non-finite", "loss spike", "gradient spike"}


def test_noise_of_a_flat_history_is_no_spike() -> None:
    """Neither is a fall of the loss."""
    guard = Guard(GuardConfig())
    for step in range(64):
        guard.record(step, step, 2.0, 0.5)
    assert guard.judge(2.0, 0.5) is None and guard.judge(2.2, 4.0) is None
    assert guard.judge(0.1, 1e-9) is None and guard.judge(2.0, 0.0) is None
    assert guard.judge(2.3, 0.5) == "loss spike" and guard.judge(2.0, 6.0) == "gradient spike"


def test_only_non_finite_is_bad_in_the_first_steps() -> None:
    """A spike is judged from guard.min_steps on."""
    guard = Guard(GuardConfig(min_steps=4, window=8))
    for step in range(3):
        assert guard.record(step, step, 3.0, 1.0) is None
    assert guard.judge(1e9, 1e9) is None and guard.judge(NAN, 1.0) == "non-finite"
    assert guard.record(3, 3, 3.0, 1.0) is None and guard.judge(1e9, 1.0) == "loss spike"


def size_of(segment: Segment) -> StepSize:
    return StepSize(segment.windows_per_step, segment.n_ctx, 0, mixture=segment.weights)


def test_which_changes_of_a_step_begin_a_new_history() -> None:
    """Other windows, other weights or far fewer windows do; a ramp does not."""
    guard = Guard(GuardConfig(min_steps=2, window=8))
    ledger = Ledger.start(4, 16, {"a": 1}).then(3, windows_per_step=8).lose(5, "a", 0)
    ledger = ledger.then(8, n_ctx=32).then(11, weights={"a": 1, "b": 1}).then(13, windows_per_step=4)
    ledger = ledger.then(15, windows_per_step=12).then(17, windows_per_step=5)
    lengths = []
    for step in range(19):
        guard.enter(*(size_of(ledger.segment(s)) for s in (step, max(0, step - 1))))
        lengths.append(len(guard.recent))
        guard.record(step, ledger.position(step), 3.0, 1.0)
    assert lengths == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1]


def test_bad_steps_near_one_another_send_the_run_back() -> None:
    """Bad steps that lie far apart do not."""
    guard = Guard(GuardConfig(skips=3, within=10))
    for step in range(100):
        bad = step in {5, 10, 30, 41, 52, 60, 68, 69}
        guard.record(step, step, NAN if bad else 1.0, 1.0)
        assert guard.must_roll_back(step + 1) == (step == 69)
        if guard.must_roll_back(step + 1):
            assert guard.first_bad(step + 1) == 60
            break
        if step == 57:
            assert guard.first_bad(58) == 52
        if step == 25:
            assert guard.first_bad(26) == 26
    guard.roll_back({"recent": [[2.0, 3.0]]}, 58, (58, 70))
    assert list(guard.recent) == [(2.0, 3.0)]
    assert not guard.must_roll_back(58) and guard.first_bad(58) == 58, "what was gone back from is done with"
    assert guard.events[-1] == {
        **{"step": 69, "position": 69, "loss": None, "norm": 1.0, "why": "non-finite", "did": "rolled back"},
        **{"to": 58, "jumped": [58, 70]},
    }


def test_the_history_survives_json_and_stays_small() -> None:
    """Bit for bit."""
    rng = random.Random(seeded())
    cfg = GuardConfig(spike_z=6, window=16, min_steps=4, max_rollbacks=2000)
    guard = Guard(cfg)
    for step in range(3000):
        guard.record(step, 4 * step, rng.choice([NAN, rng.gauss(3, 0.1)]), rng.expovariate(1))
        if step in (700, 2900):
            guard.roll_back(guard.to_json(), step, (4 * step, 4 * step + 4))
    text = json.dumps(guard.to_json(), allow_nan=False)
    again = Guard(cfg, json.loads(text))
    assert again.to_json() == guard.to_json() and again.skipped == guard.skipped > 1000
    assert list(again.recent) == list(guard.recent) and len(guard.recent) == 16
    assert len(guard.events) == EVENTS + 2 and len(guard.rollbacks) == 2
    for step in range(3000, 3100):
        loss, norm = rng.choice([INF, rng.gauss(3, 0.1), rng.gauss(3, 2)]), rng.expovariate(1)
        assert again.record(step, step, loss, norm) == guard.record(step, step, loss, norm)
        assert again.must_roll_back(step + 1) == guard.must_roll_back(step + 1)


@pytest.mark.parametrize(
    "history",
    [{"recent": [[1]]}, {"recent": 3}, {"events": [3]}, {"events": [{"step": 1}]}, {"skipped": "many"}, [1]],
)
def test_a_damaged_history_is_refused(history: Any) -> None:
    with pytest.raises(UserError, match="guard's history in the checkpoint is damaged"):
        Guard(GuardConfig(), history)


def test_ranks_that_skipped_other_steps_are_an_error() -> None:
    """And the report of a run that ends names every event."""
    guard = Guard(GuardConfig(skips=1, within=1, max_rollbacks=1))
    guard.check(0, 4)
    guard.record(7, 56, NAN, 1.0)
    guard.check(4, 4)
    with pytest.raises(TransientError, match=r"1 on this one, so 4 over 4 ranks, but there are 3"):
        guard.check(3, 4)
    guard.refuse_another(8)
    guard.roll_back(None, 4, (32, 64))
    guard.record(5, 72, 2.0, INF)
    with pytest.raises(
        UserError, match=r"step 7 .* back to step 4, over windows 32 to 64; step 5 .*skipped.*steps=5:6"
    ):
        guard.refuse_another(6)


DATA = DataConfig(
    name="x",
    path=".",
    lanes=2,
    sources={"a": SourceConfig("a", 1.0), "b": SourceConfig("b", 2.0)},
    stages=[StageConfig(6, {"b": 0.5}), StageConfig(9, None, 8), StageConfig(20, {"a": 7.0})],
)
TOKENS = {"a": [4900, 4500, 333, 2100, 3000], "b": [3700, 4801, 190, 7000]}  # one epoch is enough


def planned(past: Ledger | None = None, step: int = 0) -> Ledger:
    return plan_ledger(DATA, n_ctx=16, tokens_per_step=128, ramp=RampConfig(64, 1500), past=past, step=step)


def tokens_of(ledger: Ledger, step: int) -> set[tuple[int, int, int]]:
    """(source, shard, token) of each input of a step."""
    _, found = Plan(TOKENS, ledger, lanes=2, seed=3).step(step)
    windows = zip(*(part.tolist() for part in found), strict=True)
    return {(source, shard, start + t) for source, shard, start in windows for t in range(ledger.segment(step).n_ctx)}


@pytest.mark.parametrize(("to", "end"), [(0, 1), (0, 11), (4, 5), (4, 8), (6, 12), (3, 12), (9, 10), (11, 14)])
def test_a_jump_keeps_the_plan_and_serves_nothing_bad(to: int, end: int) -> None:
    """No window of the steps that it gives up is served again."""
    plan = planned().lose(2, "b", 2)
    jumped = plan.jump(to, end)
    assert jumped.position(to) == plan.position(end)
    for step in range(40):
        here, there = jumped.segment(step), plan.segment(step)
        assert (here.n_ctx, here.weights, here.windows_per_step) == (there.n_ctx, there.weights, there.windows_per_step)
        assert jumped.tokens(step) == plan.tokens(step)
        assert step >= to or tokens_of(jumped, step) == tokens_of(plan, step)
    assert all(jumped.segment(step).lost == {"b": (2,)} for step in range(max(to, 2), 40))
    given_up = range(plan.position(to), plan.position(end))
    assert {jumped.step_of(p) for p in given_up} == {None}
    old, new = Plan(TOKENS, plan, lanes=2, seed=3), Plan(TOKENS, jumped, lanes=2, seed=3)
    for name in TOKENS:  # drawn as they were drawn, so that none of them comes again before the next epoch
        assert old.drawn(name, given_up.stop) == new.drawn(name, given_up.stop)
    bad = set().union(*(tokens_of(plan, step) for step in range(to, end)))
    assert all(bad.isdisjoint(tokens_of(jumped, step)) for step in range(to, to + 4))
    assert Ledger.from_json(json.loads(json.dumps(jumped.to_json()))) == jumped


@pytest.mark.parametrize(
    ("to", "end", "resumed"), [(0, 3, 0), (0, 3, 2), (4, 8, 4), (4, 8, 5), (6, 12, 6), (6, 12, 25)]
)
def test_a_run_resumed_after_a_jump_has_the_same_plan(to: int, end: int, resumed: int) -> None:
    """Also if it resumes at the very step of the jump."""
    jumped = planned().jump(to, end)
    assert planned(Ledger.from_json(jumped.to_json()), resumed) == jumped
    twice = jumped.jump(max(to, 5), end + 4)
    assert planned(Ledger.from_json(twice.to_json()), max(to, 5)) == twice
