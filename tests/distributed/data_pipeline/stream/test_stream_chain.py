"""Killed at any step and resumed on another number of ranks, the run is fed what the uninterrupted one is fed."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from unittest.mock import patch

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig, RampConfig, SourceConfig, StageConfig
from data_pipeline.order.ledger import Ledger, Segment
from data_pipeline.order.stages import plan_ledger
from data_pipeline.stream import loader as loader_module
from tests.distributed.stream_rank import Ranks, open_loader
from tests.helpers.fixtures import random_source
from tests.helpers.order_twin import Leg
from tests.helpers.seeds import seeded
from tests.helpers.stream_truth import Truth, legs_of, shards_of
from tests.unit.data_pipeline.order.test_events import Run, runs

LANES, STEPS = 12, 700
SHARDS = {"web": [2300, 37, 901, 5, 1500], "code": [930, 655, 80], "books": [611, 0, 300]}
DPS = [1, 2, 3, 4, 6]


def sources(root: Path, shards: dict[str, list[int]], seed: int) -> None:
    for n, (name, tokens) in enumerate(shards.items()):
        random_source(root / name / "train", tokens, seed=seed + n)


def ledger_of_stages() -> Ledger:
    """A batch that grows to 36 windows, another mixture from step 150 on, longer windows from step 250 on."""
    data = DataConfig(
        name="mix",
        path="unused",
        lanes=LANES,
        sources={"web": SourceConfig("web", 3), "code": SourceConfig("code", 2), "books": SourceConfig("books", 1)},
        stages=[StageConfig(150, {"web": 1, "code": 1, "books": 2}), StageConfig(250, None, 12, 36 * 12)],
    )
    return plan_ledger(data, n_ctx=8, tokens_per_step=36 * 8, ramp=RampConfig(12 * 12, 60_000))


def same(truth: Truth, step: int, rows: list[int], tokens: np.ndarray, labels: np.ndarray) -> bool:
    expected = truth.batch(step)[rows].astype(np.int64)
    return tokens.tobytes() == expected[:, :-1].tobytes() and labels.tobytes() == expected[:, 1:].tobytes()


def life(truth: Truth, ranks: Ranks, until: int, batches: dict[int, np.ndarray]) -> None:
    """Take what a life served before `until` into the global batches; what it served beyond must be right too."""
    for rank in range(ranks.dp):
        for step in range(ranks.step, ranks.done(rank)):
            rows = truth.rows_of(step, rank, ranks.dp)
            raw = np.frombuffer((ranks.out / f"rank-{rank}" / f"step-{step}").read_bytes(), np.int64)
            both = raw.reshape(2, len(rows), -1)
            assert same(truth, step, rows, *both), (step, rank, ranks.dp)
            if step < until:
                whole = batches.setdefault(step, np.full((2, len(truth.taken[step]), both.shape[2]), -1))
                whole[:, rows] = both


def test_ten_kills_with_other_dp_give_the_same_stream(
    tmp_path: Path,
) -> None:
    """Killed ten times and resumed each time on another dp, the stream is the uninterrupted one."""
    kills = 10
    seed = seeded()
    rng = random.Random(seed)
    sources(tmp_path / "data", SHARDS, seed)
    ledger = ledger_of_stages()
    assert len(ledger.segments) == 6 and ledger.segments[-1].step < STEPS * 0.6, ledger
    truth = Truth(
        {name: shards_of(tmp_path / "data" / name / "train") for name in SHARDS},
        legs_of(ledger.to_json()),
        lanes=LANES,
        seed=seed,
        steps=STEPS,
    )
    spec = tmp_path / "spec.json"
    told = {"root": str(tmp_path / "data"), "ledger": ledger.to_json(), "lanes": LANES, "seed": seed}
    spec.write_text(json.dumps(told))

    batches: dict[int, np.ndarray] = {}
    step, dp, kill_steps = 0, 0, sorted(rng.sample(range(1, STEPS - 50), kills))
    for n, target in enumerate([*kill_steps, STEPS]):
        dp = rng.choice([d for d in DPS if d != dp])
        ranks = Ranks(spec, tmp_path / str(n), dp=dp, step=step, steps=STEPS)
        for rank in range(dp) if n == kills else [rng.randrange(dp)]:
            ranks.wait(rank, max(target, step + 1))
        done = ranks.kill(rng)
        assert (done == STEPS) == (n == kills), f"life {n} ended at step {done}: the kill came too late"
        life(truth, ranks, done, batches)
        step = done
    assert sorted(batches) == list(range(STEPS))
    for number in range(STEPS):
        assert same(truth, number, list(range(len(truth.taken[number]))), *batches[number]), number


@st.composite
def chains(draw: Callable) -> tuple[Run, list[tuple[int, int, int]], int]:
    """A run with any events, and the lives that it is cut into: (dp, steps served, windows read at once) each."""
    run = draw(runs(sources=3, most=4))
    dps = [d for d in range(1, run[2] + 1) if run[2] % d == 0]
    lives = st.tuples(st.sampled_from(dps), st.integers(0, 6), st.sampled_from([1, 7, 20]))
    return run, draw(st.lists(lives, min_size=1, max_size=5)), draw(st.integers(0, 99))


@given(chains())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_chain_of_stops_is_fed_as_dealt_by_hand(
    chain: tuple[Run, list[tuple[int, int, int]], int],
) -> None:
    """Any chain of stops and resumes gets the windows that are dealt by hand."""
    (tokens, legs, lanes, seed), lives, salt = chain
    steps, step = sum(n for _, n, _ in lives), 0
    ledger = Ledger(tuple(Segment(*leg) for leg in legs))
    with tempfile.TemporaryDirectory() as tmp:
        sources(Path(tmp), tokens, salt)
        shards = {name: shards_of(Path(tmp) / name / "train") for name in tokens}
        truth = Truth(shards, legs, lanes=lanes, seed=seed, steps=steps)
        for dp, n, at_once in lives:
            unlink_lost(Path(tmp), legs, step)
            few = {"_READ_WINDOWS": at_once, "_PLAN_WINDOWS": 3 * at_once}  # lives are too short for more
            with patch.multiple(loader_module, **few), ExitStack() as stack:
                loaders = [
                    stack.enter_context(
                        closing(open_loader(Path(tmp), ledger, lanes=lanes, seed=seed, rank=rank, dp=dp, step=step))
                    )
                    for rank in range(dp)
                ]
                for number in range(step, step + n):
                    for rank, loader in enumerate(loaders):
                        batches = loader.next()
                        both = [np.concatenate([b[i].numpy() for b in batches]) for i in (0, 1)]  # type: ignore[union-attr]
                        assert same(truth, number, truth.rows_of(number, rank, dp), *both), (number, rank, dp)
            step += n


def unlink_lost(root: Path, legs: list[Leg], step: int) -> None:
    """A shard that the ledger has lost before `step` is not there any more."""
    for leg in legs:
        for name, lost in leg.lost.items() if leg.step <= step else ():
            for shard in lost:
                (root / name / "train" / f"{shard:05d}.tar").unlink(missing_ok=True)
