"""ZeRO 1-3 with tensor parallelism is plain training: same losses and gradient norms as torch alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_pipeline.config import IGNORE
from data_pipeline.stream.loader import Batch
from tests.distributed import tiny_run as run
from tests.helpers.ranks import run_ranks
from trainer.config.parallel import Recompute
from trainer.objective.language_model import lm_loss

STEPS = 10
TOLERANCE = 1e-5  # fp32; relative, per curve
ZERO = (1, 2, 3)
Curves = dict[str, Any]  # case -> [(loss, gradient norm) of each step], or facts about it
FEW = range(4)  # steps where a whole curve would show nothing more


def plain_torch(cfg: Any, mesh: Any, grad_clip: float) -> list[tuple[float, float]]:
    """Hugging Face's GPT-2, torch's own AdamW, autograd and clipping: nothing of ours but the initial weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from trainer.hf.weights import hf_config, to_hf
    from trainer.model.gpt import GPT
    from trainer.model.init import initialise
    from trainer.model.specs import from_local, specs

    ours = GPT(cfg.model, mesh)
    initialise(ours, cfg.model, 7)
    true = {n: from_local([p.detach()], specs(cfg.model, 1)[n]) for n, p in ours.named_parameters()}
    theirs = GPT2LMHeadModel(GPT2Config(**hf_config(cfg.model)))
    theirs.load_state_dict(to_hf(true, cfg.model), strict=False)
    theirs.tie_weights()
    adam = run.plain_adamw(theirs.parameters(), cfg.optim)
    out = []
    for step in range(STEPS):
        tokens, labels, _ = run.windows(step, cfg.model.vocab_size)
        loss = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        out.append((loss.item(), run.plain_step(adam, step, grad_clip)))
    return out


def on_one_rank() -> dict[str, Any]:
    with run.layout() as mesh:
        return {
            "plain": plain_torch(run.config(), mesh, 1.0),
            "plain, no clipping": plain_torch(run.config(), mesh, 0.0),
            "zero1": run.curve(run.build(run.config(), mesh)),
            "zero1 accumulating": run.curve(run.build(run.config(micro_batch_size=1), mesh)),
            "bf16 not clipped": clipped_to(run.build(run.config(precision="bf16", grad_clip=99.0), mesh)),
            "zero1 at once": run.curve(run.build(run.config(micro_batch_size=8), mesh)),
        }


def on_two_ranks() -> dict[str, Any]:
    out: dict[str, Any] = {}
    with run.layout() as mesh:
        for zero in ZERO:
            out[f"zero{zero}"] = run.curve(run.build(run.config(zero=zero), mesh))
            out[f"zero{zero}, no clipping"] = run.curve(run.build(run.config(zero=zero, grad_clip=0.0), mesh), FEW)
            for recompute in (Recompute.selective, Recompute.full):
                cfg = run.config(zero=zero)
                cfg = replace(cfg, parallel=replace(cfg.parallel, recompute=recompute))
                out[f"zero{zero} recompute={recompute.value}"] = run.curve(run.build(cfg, mesh), FEW)
            out[f"zero{zero} with evaluation"] = with_evaluation(run.build(run.config(zero=zero), mesh))
            for precision in ("fp32", "bf16"):
                out[f"{precision} zero{zero} ramp"] = ramped(run.config(zero=zero, precision=precision), mesh)
            out[f"bf16 zero{zero}"] = run.curve(run.build(run.config(zero=zero, precision="bf16"), mesh))
            for precision in ("fp32", "bf16"):
                how = {"zero": zero, "precision": precision, "grad_clip": 0.25}
                out[f"{precision} zero{zero} clipped"] = clipped_to(run.build(run.config(**how), mesh))
                out[f"{precision} zero{zero} veto"] = vetoed(
                    run.build(run.config(zero=zero, precision=precision), mesh)
                )
    with run.layout(tp=2) as mesh:
        for zero in ZERO:
            for split in (False, True):
                engine = run.build(run.config(tp=2, sequence_parallel=split, zero=zero), mesh)
                out[f"tp2 split={split} zero{zero}"] = run.curve(engine)
                out[f"tp2 split={split} zero{zero} replicas differ"] = replicas_differ(engine)
        out["tp2 bf16"] = run.curve(run.build(run.config(tp=2, sequence_parallel=True, precision="bf16"), mesh))
    return out


def on_four_ranks() -> dict[str, Any]:
    with run.layout(tp=2) as mesh:
        return both_parallel(mesh, 1)


def on_four_ranks_more() -> dict[str, Any]:
    with run.layout(tp=2) as mesh:
        out = both_parallel(mesh, 2) | both_parallel(mesh, 3) | {"dp2 tp2 bf16": bf16_both_parallel(mesh)}
    with run.layout() as mesh:  # dp 4 does not divide most of the parameters
        for zero in ZERO:
            out[f"dp4 zero{zero}"] = run.curve(run.build(run.config(zero=zero), mesh))
    return out


def both_parallel(mesh: Any, zero: int) -> dict[str, Any]:
    engine = run.build(run.config(tp=2, sequence_parallel=zero != 2, zero=zero), mesh)
    return {f"dp2 tp2 zero{zero}": run.curve(engine), f"dp2 tp2 zero{zero} replicas differ": replicas_differ(engine)}


def bf16_both_parallel(mesh: Any) -> list[tuple[float, float]]:
    return run.curve(run.build(run.config(tp=2, sequence_parallel=True, precision="bf16"), mesh))


def with_evaluation(engine: Any) -> list[tuple[float, float]]:
    """The curve of a run that evaluates before each step."""
    out = []
    for step in FEW:
        batches, _ = run.micro_batches(100 + step, engine.cfg, engine.mesh)
        first, again = (engine.evaluate(batches[0]) for _ in range(2))
        assert torch.equal(first, again) and not first.requires_grad
        assert engine.module.training
        out.append(run.one_step(engine, step))
    return out


RAMP = ((4, 1), (1, 3), (3, 2), (1, 4), (2, 1))  # (micro steps, micro batch size) of each rank, step after step


def ramp(step: int, vocab_size: int, dp: int) -> Batch:
    """All windows of a step whose size differs from the last one's; two documents in each."""
    micro_steps, size = RAMP[step]
    tokens, labels, _ = run.windows(step, vocab_size, dp * micro_steps * size)
    ids = (torch.arange(run.N_CTX) >= torch.arange(len(tokens))[:, None] % run.N_CTX).int()
    return Batch(tokens, labels, ids - ids[:, :1])


def ramped(cfg: Any, mesh: Any) -> dict[str, Any]:
    """Curves of the engine and of torch alone over steps of RAMP's sizes, and how far their weights are apart."""
    import deepspeed

    cfg = replace(cfg, optim=replace(cfg.optim, eps=1e-3))  # Adam makes a step of lr of a gradient that is but rounding
    engine, plain = run.build(cfg, mesh), PlainAdamW(cfg, mesh)
    out: dict[str, Any] = {"engine": [], "plain": []}
    for step, (micro_steps, size) in enumerate(RAMP):
        batch = ramp(step, cfg.model.vocab_size, mesh.dp)
        valid = int((batch.labels != IGNORE).sum())
        mine = [t.chunk(mesh.dp)[mesh.dp_rank].split(size) for t in batch if t is not None]
        batches = [Batch(*parts) for parts in zip(*mine, strict=True)]
        assert len(batches) == micro_steps and {len(b.tokens) for b in batches} == {size}
        losses = [engine.backward(b, run.counts(valid), last=b is batches[-1]) for b in batches]
        loss = torch.stack(losses).sum() / valid
        dist.all_reduce(loss, group=mesh.dp_group)
        out["engine"].append((loss.item(), engine.step(run.lr(step))))
        out["plain"].append(plain.step(batch, valid, run.lr(step)))
    errors = {}
    for (name, ours), theirs in zip(engine.module.named_parameters(), plain.model.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([ours]):
            errors[name] = float((ours - theirs).abs().max() / theirs.abs().max())
    return out | {"weights": errors, "too early": step_too_early(engine, batches[0])}


class PlainAdamW:
    """The model with torch's own autograd, clipping and AdamW: all windows of a step in one forward."""

    def __init__(self, cfg: Any, mesh: Any) -> None:
        from trainer.model.gpt import GPT
        from trainer.model.init import initialise

        self.model = GPT(cfg.model, mesh)
        initialise(self.model, cfg.model, 7)
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        other = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": decay, "weight_decay": cfg.optim.weight_decay}, {"params": other, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, betas=(cfg.optim.beta1, cfg.optim.beta2), eps=cfg.optim.eps)

    def step(self, batch: Batch, valid: int, lr: float) -> tuple[float, float]:
        loss = self.model(lm_loss, *batch) / valid
        self.adam.zero_grad()
        loss.backward()
        # In fp64: torch's fp32 norm of 100,000 numbers is off by 1e-5 on a CPU; what it clips by is off by no more.
        norm = torch.stack([p.grad.double().norm() for p in self.model.parameters() if p.grad is not None]).norm()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        return loss.item(), norm.item()


def step_too_early(engine: Any, batch: Batch) -> list[str]:
    """What the engine says to a step that nothing ended, and to a backward after the end."""
    said = []
    for last, then in (
        (False, lambda: engine.step(1.0)),
        (True, lambda: engine.backward(batch, run.counts(1), last=True)),
    ):
        engine.backward(batch, run.counts(1), last=last)
        try:
            then()
        except RuntimeError as e:
            said.append(str(e))
    return said


def vetoed(engine: Any) -> dict[str, Any]:
    """A step whose gradient is nan, and one that is finite and not accepted, between good ones."""
    from trainer.engine.engine import NonFiniteError

    losses = [run.one_step(engine, 0)]
    before = run.owned_bits(engine)
    batches, _ = run.micro_batches(50, engine.cfg, engine.mesh)
    for batch in batches:
        engine.backward(batch, run.counts(float("nan")), last=batch is batches[-1])
    try:
        engine.step(1.0)
        error = "none"
    except NonFiniteError as e:
        error = str(e)
    after, changed = run.owned_bits(engine), []
    changed += [k for k in before if not torch.equal(before[k], after[k])]
    batches, valid = run.micro_batches(60, engine.cfg, engine.mesh)
    for batch in batches:
        engine.backward(batch, run.counts(valid), last=batch is batches[-1])
    asked: list[float] = []
    norm = engine.step(1.0, lambda norm: asked.append(norm) is not None)  # no
    assert asked == [norm] and 0 < norm < float("inf"), (asked, norm)
    after = run.owned_bits(engine)
    changed += [f"{k}, not accepted" for k in before if not torch.equal(before[k], after[k])]
    losses += run.curve(engine, range(1, 3))
    zero = engine.deepspeed.optimizer
    return {
        "wrapper": type(zero).__name__,
        "has norm": hasattr(zero, "_global_grad_norm"),
        "error": error,
        "changed": changed,
        "owned": len(before),
        "curve": losses,
    }


def clipped_to(engine: Any) -> tuple[float, float]:
    """(norm reported, norm of the gradient that reached Adam: after one step its first moment is a tenth of it)"""
    _, norm = run.one_step(engine, 0)
    moments = [t.double() for name, t in run.owned_bits(engine).items() if name.startswith("exp_avg/")]
    squares = torch.stack([m.square().sum() for m in moments]).sum()
    dist.all_reduce(squares)
    return norm, float(squares.sqrt()) / (1 - engine.cfg.optim.beta1)


def replicas_differ(engine: Any) -> float:
    """The largest difference of a replicated weight between the tp ranks."""
    import deepspeed

    worst = 0.0
    for p in engine.module.parameters():
        if not getattr(p, "tensor_model_parallel", False):
            with deepspeed.zero.GatheredParameters([p]):
                low, high = p.detach().clone(), p.detach().clone()
            dist.all_reduce(low, op=dist.ReduceOp.MIN, group=engine.mesh.tp_group)
            dist.all_reduce(high, op=dist.ReduceOp.MAX, group=engine.mesh.tp_group)
            worst = max(worst, float((high - low).max()))
    return worst


def launch(world_size: int, name: str) -> Curves:
    return run_ranks(world_size, f"tests.distributed.trainer.engine.test_zero:{name}")[0]


@pytest.fixture(scope="module")
def one() -> Curves:
    return launch(1, "on_one_rank")


@pytest.fixture(scope="module")
def two() -> Curves:
    return launch(2, "on_two_ranks")


@pytest.fixture(scope="module")
def four() -> Curves:
    return launch(4, "on_four_ranks")


@pytest.fixture(scope="module")
def four_more() -> Curves:
    return launch(4, "on_four_ranks_more")


def assert_same_curve(a: list[list[float]], b: list[list[float]], tolerance: float = TOLERANCE) -> None:
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b[: len(a)], dtype=torch.float64)
    assert x.shape == y.shape and len(a) >= len(FEW)
    worst = ((x - y).abs().amax(0) / y.abs().amax(0)).tolist()
    assert max(worst) <= tolerance, f"loss and gradient norm differ by {worst} of their size"


@pytest.mark.parametrize("case", ["zero1", "zero1 accumulating", "zero1 at once"])
def test_one_rank_equals_plain_torch_however_the_batch_is_cut(case: str, one: Curves) -> None:
    assert_same_curve(one[case], one["plain"])


def test_the_loss_falls(one: Curves) -> None:
    losses = [loss for loss, _ in one["plain"]]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("zero", ZERO)
def test_two_data_parallel_ranks_equal_plain_torch(zero: int, one: Curves, two: Curves) -> None:
    assert_same_curve(two[f"zero{zero}"], one["plain"])


@pytest.mark.parametrize("zero", ZERO)
def test_without_clipping_the_norm_is_still_reported(zero: int, one: Curves, two: Curves) -> None:
    assert_same_curve(two[f"zero{zero}, no clipping"], one["plain, no clipping"])


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_reaches_adam_is_clipped(precision: str, zero: int, two: Curves) -> None:
    norm, reached = two[f"{precision} zero{zero} clipped"]
    assert norm > 1 and reached == pytest.approx(0.25, rel=1e-4)


def test_a_gradient_below_its_limit_reaches_adam_as_it_is(one: Curves) -> None:
    norm, reached = one["bf16 not clipped"]
    assert 1 < norm < 99 and reached == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("zero", ZERO)
def test_evaluation_does_not_disturb_training(zero: int, two: Curves) -> None:
    assert two[f"zero{zero} with evaluation"] == two[f"zero{zero}"][: len(FEW)]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("zero", ZERO)
def test_recompute_changes_no_bit(zero: int, recompute: str, two: Curves) -> None:
    assert two[f"zero{zero} recompute={recompute}"] == two[f"zero{zero}"][: len(FEW)]


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("split", [False, True])
def test_tensor_parallel_equals_plain_torch(split: bool, zero: int, one: Curves, two: Curves) -> None:
    """With a number of heads that tp does not divide."""
    assert_same_curve(two[f"tp2 split={split} zero{zero}"], one["plain"])
    assert two[f"tp2 split={split} zero{zero} replicas differ"] == 0.0


def test_data_and_tensor_parallel_together_equal_plain_torch(one: Curves, four: Curves) -> None:
    assert_same_curve(four["dp2 tp2 zero1"], one["plain"])
    assert four["dp2 tp2 zero1 replicas differ"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_dp_and_tp_equal_plain_torch_at_higher_stages(zero: int, one: Curves, four_more: Curves) -> None:
    assert_same_curve(four_more[f"dp2 tp2 zero{zero}"], one["plain"])
    assert four_more[f"dp2 tp2 zero{zero} replicas differ"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZERO)
def test_four_dp_ranks_equal_plain_torch(zero: int, one: Curves, four_more: Curves) -> None:
    """Four ranks, which do not divide most parameters."""
    assert_same_curve(four_more[f"dp4 zero{zero}"], one["plain"])


@pytest.mark.parametrize("case", ["bf16 zero1", "bf16 zero2", "bf16 zero3", "tp2 bf16"])
def test_bf16_stays_within_its_own_rounding_of_fp32(case: str, one: Curves, two: Curves) -> None:
    """bf16 rounds to 2^-9: losses, which average, to a few thousandths; norms to a few hundredths."""
    got, want = torch.tensor(two[case]), torch.tensor(one["plain"])
    loss, norm = ((got - want).abs() / want).amax(0).tolist()
    assert 0 < loss < 5e-3 and norm < 5e-2, f"losses differ by {loss}, gradient norms by {norm} of their size"


@pytest.mark.slow
def test_bf16_dp_and_tp_stay_within_rounding(one: Curves, four_more: Curves) -> None:
    """bf16 with data and tensor parallelism stays within its own rounding of fp32."""
    got, want = torch.tensor(four_more["dp2 tp2 bf16"]), torch.tensor(one["plain"])
    loss, norm = ((got - want).abs() / want).amax(0).tolist()
    assert 0 < loss < 5e-3 and norm < 5e-2, f"losses differ by {loss}, gradient norms by {norm} of their size"


@pytest.mark.parametrize("zero", ZERO)
def test_steps_of_any_shape_equal_plain_torch(zero: int, two: Curves) -> None:
    """Any number and size of micro batches, of documents in segments."""
    got = two[f"fp32 zero{zero} ramp"]
    assert_same_curve(got["engine"], got["plain"])
    assert {name: e for name, e in got["weights"].items() if not e <= TOLERANCE} == {}
    assert got["too early"] == [
        "step before a backward with last=True",
        "backward after the last one of a step: step first",
    ]


@pytest.mark.parametrize("zero", ZERO)
def test_steps_of_any_shape_in_bf16(zero: int, two: Curves) -> None:
    """Any number and size of micro batches stays within bf16's rounding of fp32."""
    got, fp32 = two[f"bf16 zero{zero} ramp"], two[f"fp32 zero{zero} ramp"]
    ours, want = torch.tensor(got["engine"]), torch.tensor(fp32["engine"])
    loss, norm = ((ours - want).abs() / want).amax(0).tolist()
    assert 0 < loss < 5e-3 and norm < 5e-2, f"losses differ by {loss}, gradient norms by {norm} of their size"


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_refused_step_changes_nothing(precision: str, zero: int, two: Curves) -> None:
    """A gradient that is nan, and one that is finite and not accepted."""
    got = two[f"{precision} zero{zero} veto"]
    assert got["error"] in {f"the gradient norm is {norm}: this step's update is not made" for norm in ("inf", "nan")}
    assert got["changed"] == [] and got["owned"] > 0
    undisturbed = two[f"zero{zero}" if precision == "fp32" else f"bf16 zero{zero}"]
    assert got["curve"] == undisturbed[:3], "the step after the refused one is not what it would have been"


@pytest.mark.parametrize(
    ("case", "wrapper"),
    [
        ("fp32 zero1 veto", "FlatZero1"),
        ("fp32 zero2 veto", "DeepSpeedZeroOptimizer"),
        ("fp32 zero3 veto", "DeepSpeedZeroOptimizer_Stage3"),
        ("bf16 zero1 veto", "FlatZero1"),  # trainer/engine/flat_zero1.py took a BF16_Optimizer over
        ("bf16 zero2 veto", "DeepSpeedZeroOptimizer"),
        ("bf16 zero3 veto", "DeepSpeedZeroOptimizer_Stage3"),
    ],
)
def test_deepspeed_still_has_the_norm_the_gate_reads(case: str, wrapper: str, two: Curves) -> None:
    """DeepSpeed still has the wrapper and the private norm that the gate reads."""
    got = two[case]
    assert got["wrapper"] == wrapper, "DeepSpeed picks another wrapper: review engine.py and fragments.py"
    assert got["has norm"], (
        "DeepSpeed moved optimizer._global_grad_norm: trainer/engine/engine.py reads it before the update"
    )
