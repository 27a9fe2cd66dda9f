"""Compiled blocks, selective recompute and fp8: as few graphs, bytes and products as promised, and the same numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from conf.errors import UserError
from data_pipeline.config import StageConfig
from tests.distributed import tiny_run
from tests.helpers.operations import Operations, kept_bytes
from trainer.config.model import ModelConfig, Norm
from trainer.config.parallel import Compile, ParallelConfig, Precision, Recompute
from trainer.distributed.device_copies import AsyncCopy, to_device
from trainer.distributed.mesh import Mesh
from trainer.distributed.randomness import seed_dropout
from trainer.engine import fp8
from trainer.engine.compile import compile_model, describe_compile, is_compiled
from trainer.inference.cache import KVCache
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.objective.language_model import lm_loss
from trainer.plan.layout_rules import check_layout

CFG = ModelConfig(name="t", n_layer=3, n_head=4, n_embd=64, n_ctx=32, vocab_size=300)
NORMS = pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
RECOMPUTES = pytest.mark.parametrize("recompute", Recompute, ids=lambda r: r.value)
COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="inductor on a CPU needs a C++ compiler: there is no g++")


def build(mesh: Mesh, cfg: ModelConfig = CFG, recompute: Recompute = Recompute.none) -> GPT:
    torch._dynamo.reset()
    model = GPT(cfg, mesh, recompute=recompute)
    initialise(model, cfg, 1)
    return model


def batch(rows: int = 3, T: int = 32) -> tuple[Tensor, Tensor]:
    tokens, labels = torch.randint(CFG.vocab_size, (2, rows, T))
    return tokens, labels


def step(model: GPT, mesh: Mesh, tokens: Tensor, labels: Tensor) -> list[Tensor]:
    model.zero_grad()
    seed_dropout(mesh, 7, 0, 0)
    loss = model(lm_loss, tokens, labels)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


class Graphs:
    """A backend that counts the graphs it is given; gradients by autograd, kernels by torch."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.n, self.backend = 0, backend

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.n += 1
        return lookup_backend(self.backend)(graph, inputs)


@RECOMPUTES
@NORMS
def test_all_layers_share_one_graph(norm: Norm, recompute: Recompute, mesh: Mesh) -> None:
    """All layers share one graph, which computes what eager does."""
    cfg, given = replace(CFG, norm=norm, dropout=0.1), batch()
    eager = step(build(mesh, cfg, recompute), mesh, *given)
    model, graphs = build(mesh, cfg, recompute), Graphs()
    compile_model(model, graphs)
    assert worst(step(model, mesh, *given), eager) <= 1e-6
    assert graphs.n == 2  # the block, for all three layers, and the loss
    assert worst(step(model, mesh, *given), eager) <= 1e-6
    assert graphs.n == 2


@pytest.mark.slow
def test_graphs_of_evaluation_shapes_and_generation(mesh: Mesh) -> None:
    """Evaluation and each new shape take two graphs more, generation none."""
    model, graphs = build(mesh, replace(CFG, n_layer=1)), Graphs("eager")
    compile_model(model, graphs)
    shapes = [(1, 24), *((rows, 16) for rows in range(1, 9))]  # more than torch's own limit of 8
    for i, (rows, T) in enumerate(shapes, 1):
        model(lm_loss, *batch(rows, T))
        assert graphs.n == 2 * i
    model.eval()
    with torch.no_grad():
        model(lm_loss, *batch())
        assert graphs.n == 2 * len(shapes) + 2
        cache = KVCache(CFG.n_ctx)
        for n in (5, 1, 1):
            model.logits(batch(1, n)[0], cache)
    assert graphs.n == 2 * len(shapes) + 2


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_compiled_blocks_train_under_zero_as_without_compiling(
    zero: int, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # DeepSpeed looks for it
    curves = []
    for compiled in (False, True):
        engine = tiny_run.build(tiny_run.config(zero=zero), mesh)
        graphs = Graphs()
        if compiled:
            torch._dynamo.reset()
            compile_model(engine.module, graphs)
        curves.append(torch.tensor(tiny_run.curve(engine, range(3))))
        assert graphs.n == 2 * compiled
    assert (curves[0] - curves[1]).abs().max() <= 1e-5 * curves[0].abs().max()


@pytest.mark.slow
@COMPILER
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_inductor_gives_the_same_bits_twice(dropout: float, mesh: Mesh) -> None:
    """And eager's numbers if there is no dropout."""
    cfg, given = replace(CFG, dropout=dropout), batch()
    eager, found = step(build(mesh, cfg), mesh, *given), []
    for _ in range(2):  # another start of the run: nothing is remembered but the seed
        model = build(mesh, cfg)
        compile_model(model)
        found += [step(model, mesh, *given), step(model, mesh, *given)]
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
    assert (worst(found[0], eager) <= 1e-5) is (dropout == 0)


def test_who_compiles_and_what_the_start_says_of_it(mesh: Mesh) -> None:
    cfg = tiny_run.config()
    auto = (Compile.auto, cfg.parallel)
    assert not is_compiled(*auto, mesh) and "compile=on asks" in describe_compile(*auto, mesh)
    assert is_compiled(Compile.on, cfg.parallel, mesh)
    assert describe_compile(Compile.on, cfg.parallel, mesh).startswith("compiled: each kind of block")
    gpu = replace(mesh, device=torch.device("cuda"))
    assert is_compiled(*auto, gpu) and not is_compiled(Compile.off, cfg.parallel, gpu)
    for layout in ({"tp": 2}, {"zero_stage": 3}):
        refused = replace(cfg, parallel=ParallelConfig(name="t", **layout), compile=Compile.on)  # type: ignore[arg-type]
        assert not is_compiled(Compile.auto, refused.parallel, gpu)
        assert next(iter(layout)) in describe_compile(Compile.auto, refused.parallel, gpu)
        with pytest.raises(
            UserError, match=f"^compile=on with parallel.{next(iter(layout))}=.*give compile=auto or off"
        ):
            check_layout(refused, 2)


C, T = 64, 64


def bytes_of_a_layer(mesh: Mesh, cfg: ModelConfig, recompute: Recompute) -> float:
    """Kept for backward by a layer for each token, in units of n_embd bytes, in bf16."""
    given, (few, more) = batch(2, T), (2, 4)
    each = [
        kept_bytes(build(mesh, replace(cfg, n_embd=C, n_ctx=T, n_layer=n), recompute).bfloat16(), lm_loss, *given)
        for n in (few, more)
    ]
    return (each[1] - each[0]) / (more - few) / (2 * T) / C


@NORMS
def test_selective_keeps_all_but_norms_and_gelus(norm: Norm, mesh: Mesh) -> None:
    """Two bytes a number. None: input, LayerNorm's output, q, k, v, attention's output, residual, LayerNorm's output,
    4 C of c_fc and 4 C of GELU = 16 C; beside them a few numbers a token of the norms and the softmax."""
    kept = {r: bytes_of_a_layer(mesh, replace(CFG, norm=norm), r) for r in Recompute}
    few = 16 * 4 / C  # four fp32 for the norms, one a head for attention, rounded up
    saved = 2 * (1 + 1 + 4) if norm is Norm.pre else 2 * (1 + 4)  # post-norm's second output is the next block's input
    assert 32 <= kept[Recompute.none] <= 32 + few
    assert kept[Recompute.selective] == pytest.approx(kept[Recompute.none] - saved)
    assert kept[Recompute.full] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@NORMS
def test_selective_makes_no_matrix_product_again(norm: Norm, dropout: float, mesh: Mesh) -> None:
    products, given = {}, batch()
    for recompute in Recompute:
        model = build(mesh, replace(CFG, norm=norm, dropout=dropout), recompute)
        loss = model(lm_loss, *given)
        with Operations() as done:
            loss.backward()
        products[recompute] = sum(n for kind, n in done.calls.items() if "mm" in kind or "attention" in kind)
        assert (done.calls["aten.gelu.default"] == CFG.n_layer) is (recompute is not Recompute.none)
    assert products[Recompute.none] == products[Recompute.selective] < products[Recompute.full]


@pytest.mark.slow
@NORMS
def test_a_compiled_block_keeps_as_little(norm: Norm, mesh: Mesh) -> None:
    """Guards the private name in compile.py. The backend partitions a graph as inductor does."""
    given, kept = batch(2, T), {}
    for recompute in (Recompute.none, Recompute.selective):
        each = []
        for n in (1, 2):
            model = build(mesh, replace(CFG, norm=norm, n_embd=C, n_ctx=T, n_layer=n), recompute).bfloat16()
            own = {p.untyped_storage().data_ptr() for p in model.parameters()}
            compile_model(model, "aot_eager_decomp_partition")
            held: dict[int, Tensor] = {}

            def pack(x: Tensor, held: dict[int, Tensor] = held) -> Tensor:
                held[x.untyped_storage().data_ptr()] = x
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                model(lm_loss, *given)
            each.append(sum(x.untyped_storage().nbytes() for at, x in held.items() if at not in own))
        kept[recompute] = (each[1] - each[0]) / (2 * T) / C
    saved = 2 * (1 + 1 + 4) if norm is Norm.pre else 2 * (1 + 4)
    assert kept[Recompute.none] - kept[Recompute.selective] == pytest.approx(saved, abs=0.5)


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20, 0.0])
def test_fp8_products_are_those_of_the_rounded_matrices(size: float) -> None:
    """Against fp32 products of what was rounded; bf16 holds 8 bits, so half a unit of its last place is 2^-9."""
    x = (torch.randn(4, 32, 64) * size).bfloat16().requires_grad_()
    w, b = torch.randn(96, 64).bfloat16().requires_grad_(), torch.randn(96).bfloat16().requires_grad_()
    y = fp8.fp8_linear(x, w, b)
    g = torch.randn_like(y)
    y.backward(g)
    x32, w32, g32 = (
        (lambda q, scale: q.float() * scale)(*fp8.rounded(t.detach(), kind))
        for t, kind in ((x.flatten(0, 1), fp8.E4M3), (w, fp8.E4M3), (g.flatten(0, 1), fp8.E5M2))
    )
    assert x.grad is not None and w.grad is not None and b.grad is not None
    product = (y - b).flatten(0, 1) if size < 1e19 else y.flatten(0, 1)  # b is nothing beside the largest
    for found, true, bits in (
        (product, x32 @ w32.t(), 2**-6),  # b's rounding too
        (x.grad.flatten(0, 1), g32 @ w32, 2**-8),
        (w.grad, g32.t() @ x32, 2**-8),
    ):
        largest = float(true.abs().max())
        beside = float(b.detach().abs().max()) * 2**-7 if found is product and 0 < size <= 1 else 0.0
        assert found.isfinite().all() and (found.float() - true).abs().max() <= bits * largest + beside
    assert torch.equal(b.grad, g.flatten(0, 1).sum(0))


def test_fp8_rounding_keeps_its_formats_precision() -> None:
    x = torch.randn(1000) * 10 ** torch.empty(1000).uniform_(-2, 0)
    for kind, bits in ((fp8.E4M3, 3), (fp8.E5M2, 2)):
        rounded, scale = fp8.rounded(x, kind)
        large = x.abs() > x.abs().max() / 2**6  # below, e4m3's exponents end
        assert ((rounded.float() * scale - x).abs() <= 2.0 ** -(bits + 1) * x.abs() * 1.001)[large].all()
        assert rounded.float().abs().max() == torch.finfo(kind).max


@pytest.mark.slow
def test_fp8_trains_as_bf16_does(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss after 28 equal steps within 1%: the products' rounding averages out over a batch."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    last = {}
    for precision in ("bf16", "fp8"):
        cfg = tiny_run.config(precision=precision, micro_batch_size=8, model={"n_embd": 48, "n_head": 3})
        engine = tiny_run.build(cfg, mesh)
        if precision == "fp8":
            fp8.use_fp8(engine.module.h)
        with Operations() as done:
            tiny_run.one_step(engine, 0)
        curve = [tiny_run.one_step(engine, s % 4)[0] for s in range(28)]
        assert bool(done.calls["aten._scaled_mm.default"]) is (precision == "fp8")
        last[precision] = sum(curve[-4:]) / 4
        assert last[precision] < 0.95 * sum(curve[:4]) / 4
    assert last["fp8"] == pytest.approx(last["bf16"], rel=0.01)


def test_fp8_is_refused_where_it_cannot_be() -> None:
    cfg = replace(tiny_run.config(model={"n_embd": 48}), precision=Precision.fp8)
    check_layout(cfg, 1)
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: replace(cfg, parallel=ParallelConfig(name="t", tp=2)), "parallel.tp=2: fp8 is for tp=1"),
        (lambda: replace(cfg, model=replace(cfg.model, n_embd=42)), "model.n_embd=42 is not"),
        (
            lambda: replace(cfg, data=replace(cfg.data, stages=[StageConfig(0), StageConfig(5, n_ctx=8)])),
            "n_ctx at step 5=8",
        ),
    ]
    for made, said in refused:
        with pytest.raises(UserError, match=said):
            check_layout(made(), 2 if "tp" in said else 1)
    with (
        patch("torch.cuda.get_device_capability", return_value=(8, 0)),
        patch("torch.cuda.get_device_name", return_value="NVIDIA A100"),
        pytest.raises(UserError, match=r"capability 8.9 or more.*NVIDIA A100 has 8.0: give precision=bf16"),
    ):
        fp8.check_fp8(torch.device("cuda", 0))


def test_numbers_come_to_the_host_as_they_were() -> None:
    there = to_device([1.5, float("nan"), 3e300], torch.device("cpu"))
    assert there.dtype == torch.float64
    copy = AsyncCopy(there)
    assert str(copy.values()) == "[1.5, nan, 3e+300]"
