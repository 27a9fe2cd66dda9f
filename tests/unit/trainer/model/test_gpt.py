"""The model by itself on one rank: initialisation, dropout, recompute, the cache, the loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from data_pipeline.config import IGNORE
from data_pipeline.stream import loader
from tests.helpers.operations import kept_bytes
from trainer.config.model import Gelu, ModelConfig, Norm
from trainer.config.parallel import Recompute
from trainer.distributed.mesh import Mesh
from trainer.distributed.randomness import seed_dropout
from trainer.distributed.seeds import stable_seed
from trainer.inference.cache import KVCache
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.objective.language_model import lm_loss

CFG = ModelConfig(name="t", n_layer=3, n_head=4, n_embd=64, n_ctx=32, vocab_size=300)


def build(mesh: Mesh, cfg: ModelConfig = CFG, seed: int = 1, recompute: Recompute = Recompute.none) -> GPT:
    model = GPT(cfg, mesh, recompute=recompute)
    initialise(model, cfg, seed)
    return model


def batch(cfg: ModelConfig = CFG) -> tuple[Tensor, Tensor]:
    tokens, labels = torch.randint(cfg.vocab_size, (2, 3, cfg.n_ctx))
    return tokens, labels


def loss_and_grads(model: GPT, tokens: Tensor, labels: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(lm_loss, tokens, labels)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
def test_weights_start_as_the_papers_say(norm: Norm, mesh: Mesh) -> None:
    cfg = replace(CFG, norm=norm, n_embd=128, init_std=0.05)
    for name, p in build(mesh, cfg).named_parameters():
        if p.ndim == 1:
            assert p.eq(1.0 if name.endswith("weight") else 0.0).all(), name
            continue
        residual = norm is Norm.pre and name.endswith("c_proj.weight")
        std = 0.05 / math.sqrt(2 * cfg.n_layer) if residual else 0.05
        true = p[: cfg.vocab_size] if name == "wte.weight" else p
        assert true.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(true.mean().item()) < 5 * std / math.sqrt(true.numel()), name
        assert p.count_nonzero() == true.numel(), name


def test_weights_are_a_pure_function_of_seed_and_name(mesh: Mesh) -> None:
    a, b = build(mesh).state_dict(), build(mesh).state_dict()
    assert same(list(a.values()), list(b.values()))
    other = build(mesh, seed=2).state_dict()
    assert not any(torch.equal(a[n], other[n]) for n in a if a[n].ndim > 1)
    assert not torch.equal(a["h.0.mlp.c_fc.weight"], a["h.1.mlp.c_fc.weight"])
    deeper = build(mesh, replace(CFG, norm=Norm.post, n_layer=5)).state_dict()  # the same names draw the same numbers
    assert torch.equal(a["h.2.mlp.c_fc.weight"], deeper["h.2.mlp.c_fc.weight"])
    assert stable_seed("init", 1, "wte.weight") == 1861108438341147835  # for ever: another number is another model


def test_loss_at_the_start_is_near_that_of_a_uniform_guess(mesh: Mesh) -> None:
    tokens, labels = batch()
    assert build(mesh)(lm_loss, tokens, labels).item() / labels.numel() == pytest.approx(
        math.log(CFG.vocab_size), rel=0.02
    )


def test_ignored_labels_add_neither_loss_nor_gradient(mesh: Mesh) -> None:
    assert IGNORE == loader.IGNORE
    model = build(mesh)
    tokens, labels = batch()
    alone = loss_and_grads(model, tokens[:1], labels[:1])
    labels[1:] = IGNORE
    with_ignored = loss_and_grads(model, tokens, labels)
    for a, b in zip(with_ignored, alone, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    labels[:] = IGNORE
    assert model(lm_loss, tokens, labels).item() == 0.0


def test_bf16_loss_is_a_sum_in_fp32(mesh: Mesh) -> None:
    model = build(mesh)
    tokens, labels = batch()
    exact = model(lm_loss, tokens, labels)
    rounded = model.bfloat16()(lm_loss, tokens, labels)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2)


@pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
def test_cached_logits_equal_those_of_the_whole_text(norm: Norm, mesh: Mesh) -> None:
    model = build(mesh, replace(CFG, norm=norm)).eval()
    tokens, _ = batch()
    cache = KVCache(CFG.n_ctx)
    with torch.inference_mode():
        whole = model.logits(tokens)
        pieces = [model.logits(part, cache) for part in tokens.split([7, 1, 5, 1, 1, 17], dim=1)]
    assert cache.longest == CFG.n_ctx and whole.shape == (3, CFG.n_ctx, CFG.vocab_size)
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 1e-5 * whole.abs().max()
    with pytest.raises(UserError, match=r"33 tokens are more than model\.n_ctx=32"):
        model.logits(tokens[:, :1], cache)


def test_no_token_sees_a_later_one(mesh: Mesh) -> None:
    model = build(mesh).eval()
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % CFG.vocab_size
    a, b = model.logits(tokens), model.logits(changed)
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.equal(a[:, 20], b[:, 20])


def test_dropout_is_a_pure_function_of_seed_step_and_micro_step(mesh: Mesh) -> None:
    model = build(mesh, replace(CFG, dropout=0.2))
    tokens, labels = batch()

    def at(seed: int, step: int, micro_step: int, dp_rank: int = 0) -> list[Tensor]:
        seed_dropout(replace(mesh, dp_rank=dp_rank), seed, step, micro_step)
        return loss_and_grads(model, tokens, labels)

    first = [g.clone() for g in at(1, 2, 3)]
    torch.rand(5)
    assert same(at(1, 2, 3), first)
    others = [at(2, 2, 3), at(1, 3, 3), at(1, 2, 4), at(1, 2, 3, dp_rank=1)]
    assert len({first[0].item(), *(o[0].item() for o in others)}) == 5
    model.eval()
    assert torch.equal(model(lm_loss, tokens, labels), model(lm_loss, tokens, labels))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("gelu", Gelu, ids=lambda g: g.value)
@pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
def test_recompute_changes_no_bit(norm: Norm, gelu: Gelu, dropout: float, mesh: Mesh) -> None:
    cfg = replace(CFG, norm=norm, gelu=gelu, dropout=dropout)
    tokens, labels = batch()
    results = []
    for recompute in Recompute:
        seed_dropout(mesh, 7, 0, 0)
        results.append(loss_and_grads(build(mesh, cfg, recompute=recompute), tokens, labels))
    assert all(same(results[0], other) for other in results[1:])


def test_recompute_keeps_only_the_input_of_each_block(mesh: Mesh) -> None:
    tokens, labels = batch()
    saved = {
        recompute: kept_bytes(build(mesh, recompute=recompute), lm_loss, tokens, labels) for recompute in Recompute
    }
    assert saved[Recompute.full] < 0.5 * saved[Recompute.none]
    assert saved[Recompute.full] < saved[Recompute.selective] < 0.75 * saved[Recompute.none]


@pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
def test_one_rank_compiles_to_one_graph_that_computes_the_same(norm: Norm, mesh: Mesh) -> None:
    model = build(mesh, replace(CFG, norm=norm, n_layer=1))
    tokens, labels = batch()
    eager = [x.clone() for x in loss_and_grads(model, tokens, labels)]
    torch._dynamo.reset()
    model.compile(backend="aot_eager", fullgraph=True)  # raises at a break in the graph
    for a, b in zip(loss_and_grads(model, tokens, labels), eager, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
