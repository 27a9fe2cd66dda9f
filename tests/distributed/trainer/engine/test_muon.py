"""Muon is plain Muon in every ZeRO stage and on any dp; it resumes exactly, and a refused step changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import tiny_run as run
from tests.distributed.trainer.checkpoint.test_checkpoint import AT, going_on, save
from tests.distributed.trainer.engine.test_zero import STEPS, assert_same_curve, vetoed
from tests.helpers.ranks import run_ranks
from trainer.config.optim import Kind
from trainer.objective.language_model import lm_loss

MUON = {"kind": Kind.muon, "muon_lr": 0.02, "momentum": 0.95}
# Newton-Schulz multiplies what is small beside a matrix' norm by 3.4445 in each of its 5 steps: 485 times fp32's 6e-8.
TOLERANCE = 5e-5
FAST = [("fp32", 3), ("bf16", 1)]
SLOW = [("fp32", 1), ("fp32", 2), ("bf16", 2), ("bf16", 3)]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


def newton_schulz(g: torch.Tensor) -> torch.Tensor:
    """As on Jordan's page, in fp64, by the matrix' singular values: the quintic acts on each of them alone."""
    u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / (s.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return ((u * s) @ v * max(1.0, g.shape[0] / g.shape[1]) ** 0.5).float()


def plain_muon(cfg: Any, mesh: Any) -> list[tuple[float, float]]:
    """Autograd, clipping, Muon by hand for the blocks' matrices and torch's AdamW for the rest, all on one rank."""
    from trainer.model.gpt import GPT
    from trainer.model.init import initialise

    model = GPT(cfg.model, mesh)
    initialise(model, cfg.model, 7)
    named = dict(model.named_parameters())
    hidden = {n: p for n, p in named.items() if p.dim() == 2 and n not in ("wte.weight", "wpe.weight")}
    assert len(hidden) == 4 * cfg.model.n_layer
    buffers = {n: torch.zeros_like(p) for n, p in hidden.items()}
    groups = [
        {"params": [named["wte.weight"], named["wpe.weight"]], "weight_decay": cfg.optim.weight_decay},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(cfg.optim.beta1, cfg.optim.beta2), eps=cfg.optim.eps)
    d, out = cfg.model.head_dim, []
    for step in range(STEPS):
        batch = run.windows(step, cfg.model.vocab_size)
        loss = model(lm_loss, *batch[:2]) / int((batch.labels != -100).sum())
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.grad_clip)
        lr = run.lr(step)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        with torch.no_grad():
            for n, p in hidden.items():
                buffers[n].mul_(0.95).add_(p.grad, alpha=0.05)
                direction = 0.05 * p.grad + 0.95 * buffers[n]
                update = torch.empty_like(p)
                rows = torch.arange(len(p))
                # c_attn's rows are, head by head, D of queries, D of keys, D of values: three matrices
                for kind in range(3) if "c_attn" in n else [None]:
                    mine = rows if kind is None else rows[rows // d % 3 == kind]
                    update[mine] = newton_schulz(direction[mine])
                p.mul_(1 - lr * 4 * cfg.optim.weight_decay).sub_(update, alpha=lr * 4)  # muon_lr = 4 x lr
        out.append((loss.item(), norm.item()))
    return out


def on_two_ranks(folder: str, cases: list[tuple[str, int]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    with run.layout() as mesh:
        out["plain"] = plain_muon(run.config(optim=MUON), mesh)
        for precision, zero in cases:
            cfg = run.config(zero=zero, precision=precision, optim=MUON, micro_batch_size=2)
            out[f"{precision} zero{zero}"] = one_case(cfg, mesh, Path(folder) / f"{precision}{zero}")
        if "fp32 zero1" in out:
            source = Path(out["fp32 zero1"]["path"])
            loaded = run.build(run.config(zero=3, optim=MUON), mesh, seed=1, load=source)
            out["zero1 -> zero3"] = run.curve(loaded, range(AT, STEPS))
    return out


def one_case(cfg: Any, mesh: Any, folder: Path) -> dict[str, Any]:
    engine = run.build(cfg, mesh)
    out: dict[str, Any] = {"curve": run.curve(engine, range(AT)), "path": save(engine, folder)}
    out["saved"] = run.digest(engine)
    bits = run.owned_bits(engine)
    out["kinds"] = sorted(
        {k.partition("/")[0] for k in bits if k.endswith("c_fc.weight") or k.endswith("c_attn.weight")}
    )
    out["going on"] = going_on(engine)
    out["curve"] += out["going on"]["curve"] + run.curve(engine, range(2 * AT, STEPS))
    again = run.build(cfg, mesh, seed=1, load=Path(out["path"]))
    out["loaded"], out["resumed"] = run.digest(again), going_on(again)
    out["veto"] = vetoed(again)
    return out


def on_one_rank(path: str) -> dict[str, Any]:
    with run.layout() as mesh:
        loaded = run.build(run.config(optim=MUON), mesh, seed=1, load=Path(path))
        return {"reshaped": run.curve(loaded, range(AT, STEPS))}


@pytest.fixture(scope="module")
def launched() -> dict[str, Any]:
    return {}


@pytest.fixture
def two(
    launched: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, precision: str, zero: int
) -> dict[str, Any]:
    """The fast cases share one launch, the slow ones another."""
    if f"{precision} zero{zero}" not in launched:
        cases = FAST if (precision, zero) in FAST else SLOW
        folder = str(tmp_path_factory.mktemp("muon"))
        launched.update(
            run_ranks(2, "tests.distributed.trainer.engine.test_muon:on_two_ranks", folder=folder, cases=cases)[0]
        )
    return launched


@pytest.mark.parametrize(("precision", "zero"), CASES)
def test_muon_equals_plain_muon(precision: str, zero: int, two: dict[str, Any]) -> None:
    got, want = two[f"{precision} zero{zero}"]["curve"], two["plain"]
    if precision == "fp32":
        return assert_same_curve(got, want, TOLERANCE)
    loss, norm = ((torch.tensor(got) - torch.tensor(want)).abs() / torch.tensor(want)).amax(0).tolist()
    assert 0 < loss < 1e-2 and norm < 1e-1, f"losses differ by {loss}, gradient norms by {norm}: more than bf16 rounds"


@pytest.mark.parametrize(("precision", "zero"), CASES)
def test_muon_resumes_exactly(precision: str, zero: int, two: dict[str, Any]) -> None:
    got = two[f"{precision} zero{zero}"]
    assert got["loaded"] == got["saved"] and got["resumed"] == got["going on"]
    assert got["kinds"] == ["master", "momentum_buffer"]


@pytest.mark.parametrize(("precision", "zero"), CASES)
def test_a_refused_step_changes_no_momentum(precision: str, zero: int, two: dict[str, Any]) -> None:
    """A gradient that is nan, and one that is finite and not accepted."""
    veto = two[f"{precision} zero{zero}"]["veto"]
    assert "the gradient norm is" in veto["error"] and veto["changed"] == [] and veto["owned"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "zero"), [("fp32", 1)])
def test_a_muon_checkpoint_loads_on_other_layouts(precision: str, zero: int, two: dict[str, Any]) -> None:
    """On another stage and another dp."""
    want = two["plain"][AT:]
    assert_same_curve(two["zero1 -> zero3"], want, TOLERANCE)
    path = two[f"{precision} zero{zero}"]["path"]
    [one] = run_ranks(1, "tests.distributed.trainer.engine.test_muon:on_one_rank", path=path)
    assert_same_curve(one["reshaped"], want, TOLERANCE)
