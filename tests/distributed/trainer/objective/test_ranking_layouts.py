"""A reward model on two ranks is plain torch on one, and its zero bias is set in every stage of ZeRO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_pipeline.examples.read import Preference
from tests.distributed import tiny_run as run
from tests.distributed.trainer.engine.test_zero import TOLERANCE, assert_same_curve
from tests.helpers.ranked import random_preferences
from tests.helpers.ranks import run_ranks
from tests.helpers.seeds import seeded
from trainer.data.comparisons import comparisons
from trainer.distributed.mesh import Mesh
from trainer.engine.fragments import owned
from trainer.model.init import initialise
from trainer.objective.heads import WithHead
from trainer.objective.ranking import Comparisons, Ranking
from trainer.tuning.zero_bias import Scored, set_zero_bias

STEPS, PROMPTS, SIZE = 10, 8, 2  # a step's comparisons, and a micro batch's
OBJECTIVE = Ranking()
LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"dp2 zero{zero}": {"zero": zero} for zero in (1, 2, 3)},
    **{f"tp2 split zero{zero}": {"zero": zero, "tp": 2, "sequence_parallel": True} for zero in (1, 3)},
}
BF16 = {f"bf16 zero{zero}": {"zero": zero, "precision": "bf16"} for zero in (1, 2, 3)}


def build(cfg: Any, mesh: Mesh) -> WithHead:
    std = 1 / math.sqrt(cfg.model.n_embd + 1)
    module = WithHead(cfg.model, mesh, n_out=1, std=std, sequence_parallel=cfg.parallel.sequence_parallel)
    initialise(module, cfg.model, 7)
    return module


def examples(seed: int, step: int) -> list[Preference]:
    rng = np.random.default_rng((seed, step))
    return random_preferences(rng, PROMPTS, vocab_size=run.model_config().vocab_size, longest=run.N_CTX)


def batch_of(some: Sequence[Preference], rows: Sequence[Sequence[int]]) -> Comparisons:
    batch = comparisons(some, run.N_CTX, 2)(rows)
    assert isinstance(batch, Comparisons)
    return batch


def plain_torch(cfg: Any, mesh: Mesh, seed: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of torch's own AdamW, autograd and clipping, with all comparisons in one batch."""
    module, out = build(cfg, mesh), []
    adam = run.plain_adamw(module.parameters(), cfg.optim)
    for step in range(STEPS):
        batch = batch_of(examples(seed, step), [[i] for i in range(PROMPTS)])
        loss = OBJECTIVE.sums(module, batch)[0] / PROMPTS
        loss.backward()
        out.append((loss.item(), run.plain_step(adam, step, cfg.optim.grad_clip)))
    return out


def one_step(engine: run.TinyEngine, seed: int, step: int, lr: float) -> tuple[float, float]:
    some, mesh = examples(seed, step), engine.mesh
    counts = torch.tensor(OBJECTIVE.counts(batch_of(some, [[i] for i in range(PROMPTS)])), dtype=torch.float64)
    share = PROMPTS // mesh.dp
    starts = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share, SIZE)
    batches = [batch_of(some, [[i] for i in range(start, start + SIZE)]) for start in starts]
    sums = torch.stack([engine.backward(b, counts, last=b is batches[-1]) for b in batches]).sum(0)
    dist.all_reduce(sums, group=mesh.dp_group)
    return float(sums[0] / counts[0]), engine.step(lr)


def zeroed(engine: run.TinyEngine, seed: int) -> dict[str, Any]:
    """The mean score of some demonstrations after the bias is set, and after a step of rate 0 on top of that."""
    rng, mesh = np.random.default_rng((seed, 99)), engine.mesh
    lone = random_preferences(rng, 5, vocab_size=engine.cfg.model.vocab_size, longest=run.N_CTX)
    lone = [item._replace(answers=item.answers[:1], ranks=np.zeros(1, np.int32)) for item in lone]
    scored = Scored(len(lone), comparisons(lone, run.N_CTX, 2))
    touched: list[int] = []
    first = set_zero_bias(engine, scored, scored, SIZE, lambda: touched.append(1))
    master = torch.zeros(())
    for fragment in owned(engine.module, engine.adam):
        if fragment.name == "head.bias":
            master += fragment.views["master"].sum()
    dist.all_reduce(master, group=mesh.dp_group)
    one_step(engine, seed, 0, 0.0)  # the weights are made of the masters
    again = set_zero_bias(engine, scored, scored, SIZE, lambda: None)
    return {"first": first, "master": float(master), "again": again, "touched": len(touched)}


def on_two_ranks(seed: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for tp in (1, 2):
        with run.layout(tp=tp) as mesh:
            if tp == 1:
                out["plain"] = plain_torch(run.config(optim=run.STEADY), mesh, seed)
            for name, how in {**LAYOUTS, **BF16}.items():
                if how.get("tp", 1) == tp:
                    cfg = run.config(**how, optim=run.STEADY)
                    engine = run.TinyEngine(build(cfg, mesh), cfg, mesh, OBJECTIVE)
                    steps = range(STEPS if name in LAYOUTS else 2)
                    out[name] = {
                        "curve": [one_step(engine, seed, step, run.lr(step)) for step in steps],
                        **zeroed(engine, seed),
                    }
                    engine.close()
    return out


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(2, "tests.distributed.trainer.objective.test_ranking_layouts:on_two_ranks", seed=seeded())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_as_one_plain_process(layout: str, two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert_same_curve(rank[layout]["curve"], rank["plain"], TOLERANCE)


@pytest.mark.parametrize("layout", [*LAYOUTS, *BF16])
def test_demonstrations_score_zero_in_every_layout(layout: str, two: list[dict[str, Any]]) -> None:
    """By the weights and by the masters, which are equal on both ranks; in bf16 as near as it has numbers."""
    for rank in two:
        got = rank[layout]
        bias = got["first"]["reward/zero_bias"]
        near = abs(bias) * 2**-8 if layout in BF16 else 1e-6
        assert got["master"] == pytest.approx(bias, rel=1e-6) and abs(bias) > 1e-3
        assert abs(got["first"]["reward/score_mean"]) <= near
        assert got["again"]["reward/zero_bias"] == pytest.approx(bias, abs=2 * near)
        assert got["first"]["reward/score_std"] > 0 and got["touched"] > 1
    assert [rank[layout]["first"] for rank in two] == [two[0][layout]["first"]] * 2
