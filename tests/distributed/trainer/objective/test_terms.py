"""Terms with different counts: the gradient is plain torch's on every layout, and a term that counts nothing adds 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import tiny_run as run
from tests.distributed import two_trunks
from tests.distributed.two_trunks import Both, Policy, PolicyAndValue, Unvalued, Value
from tests.helpers.ranks import run_ranks

TOLERANCE = 1e-5  # of each gradient's largest element
KINDS = {
    "both": [Both, Both],
    "two kinds": [Policy, Value],
    "one kind": [Policy, Policy],
    "no returns": [Unvalued, Unvalued],
}


def on_two_ranks() -> dict[str, Any]:
    out: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    with run.layout() as mesh:
        for name, kinds in KINDS.items():
            for dp in (1, 2):
                reference = two_trunks.PlainTorch(two_trunks.build(config(), mesh), config().optim, torch.float32)
                sums = reference.gradient(0, kinds, dp)
                plain[f"{name} dp{dp}"] = sums, reference.gradients()
        for zero in (1, 2, 3):
            for name, kinds in KINDS.items():
                out[f"dp2 zero{zero} {name}"] = compare(config(zero=zero), mesh, kinds, *plain[f"{name} dp2"])
        out["nan"] = poisoned(config(), mesh)
    with run.layout(tp=2) as mesh:
        for zero in (1, 3):
            for split in (False, True):
                cfg = config(zero=zero, tp=2, sequence_parallel=split)
                for name, kinds in KINDS.items():
                    out[f"tp2 split={split} zero{zero} {name}"] = compare(cfg, mesh, kinds, *plain[f"{name} dp1"])
    return out


def config(**how: Any) -> Any:
    return run.config(grad_clip=0.0, **how)


def compare(cfg: Any, mesh: Any, kinds: list[type], sums: list[float], grads: dict[str, Any]) -> dict[str, Any]:
    """Relative differences of each gradient; after one step AdamW's first moment is a share of it."""
    engine = run.TinyEngine(two_trunks.build(cfg, mesh), cfg, mesh, PolicyAndValue())
    got, _ = two_trunks.engine_step(engine, 0, kinds)
    moments = two_trunks.whole(engine, "exp_avg")
    engine.close()
    errors, zero = {}, []
    for name, grad in grads.items():
        mine, largest = moments[name] / (1 - cfg.optim.beta1), float(grad.abs().max())
        if largest == 0:
            zero.append((name, float(mine.abs().max())))
        else:
            errors[name] = float((mine - grad).abs().max()) / largest
    return {"sums": [got, sums], "errors": errors, "zero": zero}


def poisoned(cfg: Any, mesh: Any) -> str:
    """The error after one term's count is NaN."""
    from trainer.engine.engine import NonFiniteError

    engine = run.TinyEngine(two_trunks.build(cfg, mesh), cfg, mesh, PolicyAndValue())
    [batch] = two_trunks.micro_batches(0, [Both], cfg.model.vocab_size, mesh.dp, mesh.dp_rank)
    engine.backward(batch, run.counts(10, float("nan")), last=True)
    try:
        engine.step(1e-3)
    except NonFiniteError as e:
        return str(e)
    return "none"


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    return run_ranks(2, "tests.distributed.trainer.objective.test_terms:on_two_ranks")[0]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(
    "layout",
    [*(f"dp2 zero{z}" for z in (1, 2, 3)), *(f"tp2 split={s} zero{z}" for s in (False, True) for z in (1, 3))],
)
def test_each_gradient_equals_plain_torch(layout: str, kinds: str, two: dict[str, Any]) -> None:
    """Of both trunks and of the head, which under sequence parallelism reads gathered hidden states."""
    got = two[f"{layout} {kinds}"]
    ours, theirs = got["sums"]
    assert ours == pytest.approx(theirs, rel=TOLERANCE)
    assert {name: error for name, error in got["errors"].items() if not error <= TOLERANCE} == {}
    used = {name.partition(".")[0] for name in got["errors"]}
    assert ({"value", "head"} <= used) is (kinds in ("both", "two kinds")) and "wte" in used


@pytest.mark.parametrize("layout", ["dp2 zero1", "dp2 zero3", "tp2 split=True zero1"])
def test_a_term_that_counts_nothing_adds_zero(layout: str, two: dict[str, Any]) -> None:
    """The value's count is 0 in steps of the policy alone, and where the value is computed and no return counts."""
    for kinds in ("one kind", "no returns"):
        zero = two[f"{layout} {kinds}"]["zero"]
        assert len(zero) > 10 and all(largest == 0 for _, largest in zero), (kinds, zero)


def test_a_count_that_is_nan_refuses_the_step(two: dict[str, Any]) -> None:
    """DeepSpeed's wrappers report it as inf or as nan."""
    assert two["nan"] in {f"the gradient norm is {norm}: this step's update is not made" for norm in ("inf", "nan")}
