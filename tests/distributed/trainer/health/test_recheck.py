"""A micro step that is computed twice: equal on a sound machine, and one wrong number on one rank stops all of them."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch

from conf.errors import UserError
from tests.distributed import tiny_run as run
from tests.helpers.ranks import run_ranks
from trainer.config.health import GuardConfig
from trainer.plan.layout_rules import check_layout

CASES = {
    "fp32 zero1": {"precision": "fp32", "zero": 1},
    "fp32 zero2": {"precision": "fp32", "zero": 2},
    "bf16 zero1": {"precision": "bf16", "zero": 1},
    "bf16 zero2": {"precision": "bf16", "zero": 2},
    "bf16 zero2 offload": {"precision": "bf16", "zero": 2, "offload": "cpu"},
    "recompute": {"precision": "fp32", "recompute": "full"},
}


def on_two_ranks() -> dict[str, Any]:
    out = {}
    with run.layout() as mesh:
        for name, how in CASES.items():
            cfg = run.config(**how, model={"dropout": 0.1})
            cfg.guard = GuardConfig(recheck_every=2)
            out[name] = {"with": twice(cfg, mesh, True), "without": twice(cfg, mesh, False)}
            out[name]["error"] = one_wrong_number(run.build(cfg, mesh))
    return out


def twice(cfg: Any, mesh: Any, check: bool) -> Any:
    """Three steps, and what this rank owns after them; with `check`, steps 1 and 3 are made twice before."""
    from trainer.distributed.randomness import seed_dropout
    from trainer.health.recompute_check import recheck

    engine, calls = run.build(cfg, mesh), list[int]()
    engine.module.register_forward_hook(lambda *_: calls.append(1))
    curve = []
    for step in range(3):
        batches, _ = run.micro_batches(step, cfg, mesh)
        if check:
            calls.clear()
            recheck(engine, cfg.guard.recheck_every, cfg.seed, step, batches[0])
            assert len(calls) == (2 if step == 1 else 0), (step, calls)
        seed_dropout(mesh, cfg.seed, step, 0)
        curve.append(run.one_step(engine, step))
    return curve, run.digest(engine)


def one_wrong_number(engine: Any) -> str:
    """What rank 0 and 1 say where rank 1's second pass has one activation that is a hundredth more."""
    from trainer.health.recompute_check import recheck

    calls = []

    def wrong(module: Any, args: Any, out: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 and engine.mesh.world.rank == 1:
            off = torch.zeros_like(out)
            off.view(-1)[-1] = (out.view(-1)[-1] * 0.01).detach()  # of the last token, whose label counts
            out = out + off
        return out

    engine.module.ln_f.register_forward_hook(wrong)
    batches, _ = run.micro_batches(0, engine.cfg, engine.mesh)
    try:
        recheck(engine, engine.cfg.guard.recheck_every, engine.cfg.seed, 1, batches[0])
    except UserError as e:
        return str(e)
    return "none"


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(2, "tests.distributed.trainer.health.test_recheck:on_two_ranks")


@pytest.mark.parametrize("case", CASES)
def test_a_step_made_twice_is_the_same_and_disturbs_nothing(case: str, two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank[case]["with"] == rank[case]["without"]


@pytest.mark.parametrize("case", CASES)
def test_one_wrong_number_stops_all_and_names_the_rank(case: str, two: list[dict[str, Any]]) -> None:
    """With its host."""
    for rank in two:
        said = rank[case]["error"]
        assert "step 1 computed twice is not the same" in said and said.endswith("(rank 1)")
        assert f"host {socket.gethostname()}, device cpu: " in said and " tensors differ, the first is the " in said


def test_layouts_that_cannot_be_rechecked_are_refused() -> None:
    """Before any work: torch alone cannot compute them twice."""
    from trainer.health.recompute_check import check_recheck

    for how, why in (({"tp": 2}, "parallel.tp=2"), ({"zero": 3}, "parallel.zero_stage=3")):
        cfg = run.config(**how)
        check_layout(cfg, 2)
        cfg.guard = GuardConfig(recheck_every=5)
        with pytest.raises(UserError, match=f"guard.recheck_every=5 with {why}"):
            check_layout(cfg, 2)
    cfg = run.config()
    cfg.guard = GuardConfig(recheck_every=5)
    check_recheck(cfg.guard, cfg.deterministic, "cpu")
    with pytest.raises(UserError, match="deterministic=true"):
        check_recheck(cfg.guard, cfg.deterministic, "cuda")
    cfg.deterministic = True
    check_recheck(cfg.guard, cfg.deterministic, "cuda")
