"""tp = 2 on two real ranks against tp = 1, in fp32. Each rank measures; the tests read what it measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError
from data_pipeline.config import IGNORE
from data_pipeline.stream.loader import Batch, Item
from tests.helpers.operations import Operations
from tests.helpers.ranks import run_ranks
from trainer.config.model import ModelConfig, Norm
from trainer.config.parallel import ParallelConfig, Recompute
from trainer.data.channel import channel
from trainer.distributed.mesh import Mesh, join_ranks, leave_ranks
from trainer.distributed.randomness import seed_dropout, tp_local_randomness
from trainer.distributed.world import read_world
from trainer.engine.deepspeed_api import register_sequence_parallel_hooks
from trainer.inference.cache import KVCache
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.model.specs import from_local, specs, to_local
from trainer.objective.language_model import lm_loss

BASE = ModelConfig(name="t", n_layer=2, n_head=4, n_embd=60, n_ctx=24, vocab_size=150)
MODELS = {
    "pre": BASE,
    "post": replace(BASE, norm=Norm.post),
    "odd_heads": replace(BASE, n_head=5),
    "odd_heads_post": replace(BASE, n_head=3, norm=Norm.post),
    "sparse": replace(BASE, n_layer=4, attention="DBSF", band=5, stride=4, summary=2),
    "rank_without_a_token": replace(BASE, vocab_size=50),  # 128 padded: rank 1 holds padding alone
}
XL = replace(BASE, n_layer=48, n_head=25, n_embd=1600, n_ctx=1024, vocab_size=50257)
SPLITS = {"whole": False, "sequence_parallel": True}
CASES = [f"{model}-{split}" for model in MODELS for split in SPLITS]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, "tests.distributed.trainer.model.test_tensor_parallel:measure")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_loss_and_every_gradient_of_one(case: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        errors = rank[case]["errors"]
        names = {"loss", "logits", "wte.weight", "wpe.weight", "h.1.mlp.c_proj.bias"}
        assert names | {f"{name}, segments" for name in names} <= set(errors)
        assert {name: e for name, e in errors.items() if not e <= 1e-5} == {}
        assert rank[case]["segments_change_the_loss_by"] > 1e-3


def test_replicated_gradients_are_the_same_bits_on_both_ranks(ranks: list[dict[str, Any]]) -> None:
    assert not [case for rank in ranks for case in CASES if rank[case]["replicated_differ"]]


def test_initial_weights_do_not_depend_on_tp(ranks: list[dict[str, Any]]) -> None:
    assert not [case for rank in ranks for case in CASES if rank[case]["init_differs"]]


def test_padding_has_no_gradient_and_stays_zero_through_training(ranks: list[dict[str, Any]]) -> None:
    for case in CASES:
        padding = [rank[case]["padding"] for rank in ranks]
        assert all(p["gradient"] == p["weight"] == 0.0 for p in padding), case
        heads = {f"h.{i}.attn.{x}" for i in (0, 1) for x in ("c_attn.weight", "c_attn.bias", "c_proj.weight")}
        assert set(padding[1]["names"]) == {"wte.weight"} | (heads if case.startswith("odd_heads") else set()), case


@pytest.mark.parametrize("what", ["dropout", "dropout, segments"])
@pytest.mark.parametrize("case", CASES)
def test_dropout_is_equal_on_both_ranks_and_under_recompute(case: str, what: str, ranks: list[dict[str, Any]]) -> None:
    """Both ranks have one loss, and recompute changes no bit of it."""
    a, b = (rank[case][what] for rank in ranks)
    assert a["loss"] == b["loss"] != a["other_step_loss"]
    assert a["recompute_differs"] == b["recompute_differs"] == []
    assert a["work"]["none"] == a["work"]["selective"] == b["work"]["selective"] != a["work"]["full"]
    assert any("c10d" in kind for kind in a["work"]["none"])
    assert a["replicated_differ"] == b["replicated_differ"] == []


@pytest.mark.parametrize("split", SPLITS)
def test_block_outputs_under_dropout_are_equal_or_parts(split: str, ranks: list[dict[str, Any]]) -> None:
    """Equal on both ranks if they are replicated, else each rank's part."""
    a, b = (rank[f"pre-{split}"]["dropout"]["blocks"] for rank in ranks)
    assert (a == b) is (split == "whole")


def test_local_randomness_differs_over_ranks(ranks: list[dict[str, Any]]) -> None:
    """It leaves the stream that ranks share as it was."""
    a, b = (rank["random"] for rank in ranks)
    assert a["local"] != b["local"] and a["local"] != a["local_again"]
    assert (a["before"], a["after"]) == (b["before"], b["after"])


def test_split_parameters_are_marked_for_deepspeeds_norm(ranks: list[dict[str, Any]]) -> None:
    for name, spec in specs(BASE, tp=2).items():
        assert ranks[1]["marked"].get(name) == spec.tp_dim, name


def test_gpt2_xl_with_its_25_heads_lies_on_two_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in range(2):
        shapes = {}
        for name, spec in specs(XL, tp=2).items():
            with torch.device("meta"):
                shapes[name] = list(to_local(torch.empty(spec.shape), spec, rank, 2).shape)
        assert ranks[rank]["xl"] == shapes
    assert shapes["h.0.attn.c_attn.weight"] == [3 * 13 * 64, 1600]


def test_cached_logits_on_two_ranks_equal_those_of_one(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["cache_error"] <= 1e-5 for rank in ranks)


def test_sequence_parallelism_refuses_an_indivisible_length(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["refused"] == "parallel.sequence_parallel splits 7 tokens, which parallel.tp=2 does not divide"


def test_channel_brings_what_rank_0_read_or_its_error(ranks: list[dict[str, Any]]) -> None:
    a, b = (rank["channel"] for rank in ranks)
    assert a == b
    assert a["error"] == "shard 7 is gone: ö"
    assert a["plain"] == {"tokens": 15, "labels": -85, "shape": [3, 2, 5], "crc32": 2**32 - 1, "segments": None}
    assert a["packed"] == a["plain"] | {"segments": ["torch.int32", [0, 0, 1, 2, 2]], "shape": [3, 4, 5]}
    assert [rank["reads"] for rank in ranks] == [True, False]


# ---- what runs on the ranks


def measure() -> dict[str, Any]:
    mesh = join_ranks(read_world(), ParallelConfig(name="tp2", tp=2))
    # new_group is collective: each rank makes both groups of one, and keeps its own
    own = [dist.new_group([rank]) for rank in range(2)][mesh.world.rank]
    one = replace(mesh, tp=1, tp_rank=0, tp_group=own)
    out: dict[str, Any] = {
        f"{m}-{s}": case(cfg, mesh, one, split) for m, cfg in MODELS.items() for s, split in SPLITS.items()
    }
    model = build(BASE, mesh)[0].eval()
    out["marked"] = {n: p.partition_dim for n, p in model.named_parameters() if getattr(p, "tensor_model_parallel", 0)}
    tokens, cache = batch(BASE, 0)[0], KVCache(BASE.n_ctx)
    with torch.inference_mode():
        pieces = torch.cat([model.logits(part, cache) for part in tokens.split([9, 1, 14], dim=1)], 1)
        out["cache_error"] = error(pieces, build(BASE, one)[0].eval().logits(tokens))
    with pytest.raises(UserError) as refused:
        GPT(BASE, mesh, sequence_parallel=True).logits(tokens[:, :7])
    out["refused"] = str(refused.value)
    with torch.device("meta"):
        out["xl"] = {n: list(p.shape) for n, p in GPT(XL, mesh).named_parameters()}
    out["random"] = randomness(mesh)
    out["reads"], out["channel"] = shared(mesh)
    leave_ranks(mesh)
    return out


def build(cfg: ModelConfig, mesh: Mesh, split: bool = False, **kwargs: Any) -> tuple[GPT, dict[str, Tensor]]:
    """A model with random weights, biases and gains, and these in their true shapes."""
    layout = specs(cfg, mesh.tp)
    generator = torch.Generator().manual_seed(5)
    state = {n: torch.randn(s.shape, generator=generator) * 0.2 for n, s in layout.items()}
    state |= {n: x + 1 for n, x in state.items() if "ln_" in n and n.endswith("weight")}
    model = GPT(cfg, mesh, sequence_parallel=split, **kwargs)
    model.load_state_dict({n: to_local(x, layout[n], mesh.tp_rank, mesh.tp) for n, x in state.items()})
    register_sequence_parallel_hooks(model, mesh)
    return model, state


def batch(cfg: ModelConfig, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(cfg.vocab_size, (2, 3, cfg.n_ctx), generator=generator)
    labels[1, 3:9] = IGNORE
    return tokens, labels


def segments(cfg: ModelConfig, seed: int) -> Tensor:
    """Documents of the windows of `batch`, int32: a few, one, and one for each token."""
    few = (torch.rand(cfg.n_ctx, generator=torch.Generator().manual_seed(seed)) < 0.3).cumsum(0)
    return torch.stack([few - few[0], torch.zeros_like(few), torch.arange(cfg.n_ctx)]).int()


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def over_ranks(x: Tensor, mesh: Mesh) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(mesh.tp)]
    dist.all_gather(parts, x.contiguous(), group=mesh.tp_group)
    return parts


def whole(named: dict[str, Tensor], cfg: ModelConfig, mesh: Mesh) -> dict[str, Tensor]:
    """Tensors of this rank's parameters -> of the parameters in their true shapes."""
    layout = specs(cfg, mesh.tp)
    return {name: from_local(over_ranks(x, mesh), layout[name]) for name, x in named.items()}


def grads_of(model: GPT, *batch: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(lm_loss, *batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def case(cfg: ModelConfig, mesh: Mesh, one: Mesh, split: bool) -> dict[str, Any]:
    (model, _), (reference, _) = build(cfg, mesh, split), build(cfg, one)
    tokens, labels = batch(cfg, 1)
    errors, losses = {}, []
    for ids, named in ((segments(cfg, 1), "{}, segments"), (None, "{}")):
        loss, local = grads_of(model, tokens, labels, ids)
        true_loss, true = grads_of(reference, tokens, labels, ids)
        assert local.keys() == true.keys() == specs(cfg, 2).keys()
        grads, true = whole(local, cfg, mesh), whole(true, cfg, one)
        errors |= {named.format(n): error(grads[n], true[n]) for n in true}
        errors[named.format("loss")] = error(loss, true_loss)
        losses.append(true_loss)
        with torch.no_grad():
            logits = (m.logits(tokens, segment_ids_BT=ids) for m in (model, reference))
            errors[named.format("logits")] = error(*logits)
    initialise(model, cfg, 3)
    initialise(reference, cfg, 3)
    fresh = whole(dict(model.state_dict()), cfg, mesh)
    fresh_one = whole(dict(reference.state_dict()), cfg, one)
    return {
        "errors": errors,
        "segments_change_the_loss_by": error(*losses),
        "replicated_differ": differing(local, cfg, mesh),
        "init_differs": [n for n, p in fresh_one.items() if not torch.equal(p, fresh[n])],
        "padding": padding(cfg, mesh, split),
        "dropout": dropout(replace(cfg, dropout=0.2), mesh, split),
        "dropout, segments": dropout(replace(cfg, dropout=0.2), mesh, split, segments(cfg, 2)),
    }


def differing(local: dict[str, Tensor], cfg: ModelConfig, mesh: Mesh) -> list[str]:
    """Replicated parameters whose tensors are not the same bits on all ranks."""
    names = [n for n, s in specs(cfg, mesh.tp).items() if s.tp_dim is None]
    return [n for n in names if not torch.equal(*over_ranks(local[n], mesh))]


def padding(cfg: ModelConfig, mesh: Mesh, split: bool) -> dict[str, Any]:
    """Where this rank holds padding, and the largest gradient and weight there in some steps of AdamW with dropout."""
    model, state = build(replace(cfg, dropout=0.1), mesh, split)
    layout = specs(cfg, mesh.tp)
    ones = {n: to_local(torch.ones_like(x), layout[n], mesh.tp_rank, mesh.tp) for n, x in state.items()}
    pads = {n: x == 0 for n, x in ones.items() if x.eq(0).any()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    largest = 0.0
    for step in range(3):
        seed_dropout(mesh, 1, step, 0)
        _, grads = grads_of(model, *batch(cfg, step))
        largest = max([largest, *(grads[n][pad].abs().max().item() for n, pad in pads.items())])
        optimizer.step()
    weights = dict(model.named_parameters())
    left = max([0.0, *(weights[n][pad].abs().max().item() for n, pad in pads.items())])
    return {"gradient": largest, "weight": left, "names": list(pads)}


def dropout(cfg: ModelConfig, mesh: Mesh, split: bool, ids: Tensor | None = None) -> dict[str, Any]:
    tokens, labels = batch(cfg, 2)
    blocks: list[float] = []
    results, work = [], {}
    for recompute in Recompute:
        model, _ = build(cfg, mesh, split, recompute=recompute)
        if recompute is Recompute.none:
            for block in model.h:
                block.register_forward_hook(lambda _m, _i, y: blocks.append(y.double().sum().item()))
        seed_dropout(mesh, 11, 0, 0)
        with Operations() as done:
            results.append(grads_of(model, tokens, labels, ids))
        work[recompute.value] = {kind: n for kind, n in done.calls.items() if "mm" in kind or "c10d" in kind}
    loss, grads = results[0]
    seed_dropout(mesh, 11, 1, 0)
    return {
        "loss": loss.item(),
        "other_step_loss": model(lm_loss, tokens, labels, ids).item(),
        "recompute_differs": [n for _, other in results for n in grads if not torch.equal(grads[n], other[n])]
        + ["loss" for other, _ in results if loss != other],
        "work": work,
        "replicated_differ": differing(grads, cfg, mesh),
        "blocks": blocks,
    }


def randomness(mesh: Mesh) -> dict[str, list[float]]:
    seed_dropout(mesh, 1, 2, 3)
    out = {"before": torch.rand(4).tolist()}
    for name in ("local", "local_again"):
        with tp_local_randomness(mesh):
            out[name] = torch.rand(4).tolist()
    return out | {"after": torch.rand(4).tolist()}


def shared(mesh: Mesh) -> tuple[bool, dict[str, Any]]:
    """What arrives through the channel, with an error and then good batches sent by tp rank 0."""
    link = channel(mesh)
    assert link is not None and channel(replace(mesh, tp=1)) is None
    plain = [Batch(torch.full((2, 5), i), torch.full((2, 5), i - 100)) for i in (0, 15, 2)]
    ids = torch.tensor([0, 0, 1, 2, 2], dtype=torch.int32).expand(4, 5)
    packed = [Batch(b.tokens.repeat(2, 1), b.labels.repeat(2, 1), ids) for b in plain]
    failed = link.share(Item([], 0, UserError("shard 7 is gone: ö")) if link.reads else None)
    out: dict[str, Any] = {"error": str(failed.error) if isinstance(failed.error, UserError) else ""}
    for name, steps in (("plain", plain), ("packed", packed)):
        item = link.share(Item(steps, 2**32 - 1) if link.reads else None)
        _, batch, last = item.batches
        out[name] = {
            "tokens": int(batch.tokens[1, 4]),
            "labels": int(batch.labels[0, 0]),
            "shape": [len(item.batches), *last.tokens.shape],
            "crc32": item.crc32,
            "segments": None
            if last.segment_ids is None
            else [str(last.segment_ids.dtype), last.segment_ids[3].tolist()],
        }
    return link.reads, out
