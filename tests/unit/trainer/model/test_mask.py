"""Documents packed into one window are computed as if each stood alone; documents, cuts and weights are fresh."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_pipeline.config import IGNORE
from trainer.config.model import ModelConfig, Norm
from trainer.config.parallel import Recompute
from trainer.distributed.mesh import Mesh
from trainer.distributed.randomness import seed_dropout
from trainer.inference.cache import KVCache
from trainer.model import attention, gpt
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.model.mask import attention_bias, segment_positions
from trainer.objective.language_model import lm_loss

CFG = ModelConfig(name="t", n_layer=2, n_head=4, n_embd=64, n_ctx=24, vocab_size=200, init_std=0.2)
ROWS = 4
NORMS = pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)


def random_lengths(total: int) -> list[int]:
    """Lengths of documents that fill `total` tokens, cut where a fair coin of a random bias says."""
    lengths, bias = [1], float(torch.rand(()))
    for cut in (torch.rand(total - 1) < bias).tolist():
        lengths = [*lengths, 1] if cut else [*lengths[:-1], lengths[-1] + 1]
    return lengths


def ids_of(rows: list[list[int]]) -> Tensor:
    return torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in rows], dtype=torch.int32)


def packed() -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """tokens, labels that no document's last token has, segment ids [4, 24] each, and the documents' lengths.

    Among the rows: one document that fills the window, and documents of one token.
    """
    rows = [[CFG.n_ctx], [1, 1, 1, CFG.n_ctx - 4, 1], *(random_lengths(CFG.n_ctx) for _ in range(ROWS - 2))]
    tokens, segments = torch.randint(CFG.vocab_size, (ROWS, CFG.n_ctx)), ids_of(rows)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORE
    labels[:, :-1][segments[:, 1:] != segments[:, :-1]] = IGNORE
    return tokens, labels, segments, rows


def build(mesh: Mesh, cfg: ModelConfig, seed: int, recompute: Recompute = Recompute.none) -> GPT:
    model = GPT(cfg, mesh, recompute=recompute)
    initialise(model, cfg, seed)
    return model


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(model: GPT, segments: Tensor | None, tokens: Tensor, labels: Tensor, rows: list[list[int]]) -> float:
    """The largest max|a - b| / max|b| over each document's logits, all gradients and the loss: packed against alone."""
    with torch.no_grad():
        whole = model.logits(tokens, segment_ids_BT=segments)
    loss = model(lm_loss, tokens, labels, segments)
    pairs, alone = [], torch.zeros(())
    for b, lengths in enumerate(rows):
        for part in torch.arange(CFG.n_ctx).split(lengths):
            alone = alone + model(lm_loss, tokens[b : b + 1, part], labels[b : b + 1, part])
            with torch.no_grad():
                pairs.append((whole[b, part], model.logits(tokens[b : b + 1, part])[0]))
    of_packed, of_alone = gradients(model, loss), gradients(model, alone)
    assert of_packed.keys() == of_alone.keys() == dict(model.named_parameters()).keys()
    pairs += [(loss.detach(), alone.detach()), *((of_packed[n], of_alone[n]) for n in of_alone)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@NORMS
def test_packed_documents_equal_documents_alone(norm: Norm, mesh: Mesh) -> None:
    """In logits, loss and gradients."""
    seed = torch.seed()
    tokens, labels, segments, rows = packed()
    model = build(mesh, replace(CFG, norm=norm), seed)
    error = worst(model, segments, tokens, labels, rows)
    assert error <= 1e-5, f"{error=}, {seed=}, {rows=}"


@pytest.mark.parametrize("attention", ["DB", "SF"])
def test_a_pattern_starts_anew_with_each_document(attention: str, mesh: Mesh) -> None:
    seed = torch.seed()
    tokens, labels, segments, rows = packed()
    numbers = {"band": 3} if attention == "DB" else {"stride": 4, "summary": 1}
    cfg = replace(CFG, attention=attention, **numbers)
    error = worst(build(mesh, cfg, seed), segments, tokens, labels, rows)
    assert error <= 1e-5, f"{error=}, {seed=}, {rows=}"


@pytest.mark.parametrize("leak", ["no segments", "attention", "positions"])
def test_a_leak_is_seen(leak: str, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: for want of a mask and of positions, each alone and both."""
    tokens, labels, segments, rows = packed()
    if leak == "attention":
        monkeypatch.setattr(
            attention, "attention_bias", lambda T, S, like, _, pattern, __: attention_bias(T, S, like, None, pattern)
        )
    if leak == "positions":
        monkeypatch.setattr(gpt, "segment_positions", lambda ids: torch.arange(CFG.n_ctx).expand(ids.shape))
    given = None if leak == "no segments" else segments
    assert worst(build(mesh, CFG, torch.seed()), given, tokens, labels, rows) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_document_changes_no_bit(dtype: torch.dtype, mesh: Mesh) -> None:
    seed = torch.seed()
    tokens, labels, segments, _ = packed()
    model = build(mesh, CFG, seed).to(dtype)
    row, other = 1, segments[1] != 3
    changed = tokens.clone()
    changed[row, other] = (changed[row, other] + 1) % CFG.vocab_size
    with torch.no_grad():
        a, b = (model.logits(t, segment_ids_BT=segments)[row] for t in (tokens, changed))
        loss = model(lm_loss, tokens, labels, segments)
    assert torch.equal(a[~other], b[~other]), f"{seed=}"
    assert not (a[other] == b[other]).all(-1).any(), f"{seed=}"
    assert loss.dtype == torch.float32 and loss.isfinite()


@NORMS
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recompute_changes_no_bit_with_segments(norm: Norm, dropout: float, mesh: Mesh) -> None:
    seed = torch.seed()
    tokens, labels, segments, _ = packed()
    results = []
    for recompute in Recompute:
        model = build(mesh, replace(CFG, norm=norm, dropout=dropout), seed, recompute)
        seed_dropout(mesh, 7, 0, 0)
        loss = model(lm_loss, tokens, labels, segments)
        results.append({"loss": loss.detach(), **gradients(model, loss)})
    a, *others = results
    for b in others:
        assert a.keys() == b.keys() and not [n for n in a if not torch.equal(a[n], b[n])], f"{seed=}"


def test_one_rank_compiles_to_one_graph_with_segments(mesh: Mesh) -> None:
    tokens, labels, segments, _ = packed()
    model = build(mesh, replace(CFG, n_layer=1), torch.seed())
    eager = model(lm_loss, tokens, labels, segments).item()
    torch._dynamo.reset()
    model.compile(
        backend="aot_eager", fullgraph=True
    )  # raises at a break in the graph, and where a value is waited for
    assert model(lm_loss, tokens, labels, segments).item() == pytest.approx(eager, rel=1e-5)


def test_a_cache_takes_no_segments(mesh: Mesh) -> None:
    tokens, _, segments, _ = packed()
    with pytest.raises(ValueError, match="a cache continues one text"):
        build(mesh, CFG, 1).logits(tokens, KVCache(CFG.n_ctx), segment_ids_BT=segments)


def test_mask_and_positions_equal_a_brute_force_twin() -> None:
    seed = torch.seed()
    for total in (1, 2, 7, 30):
        rows = [[total], [1] * total, *(random_lengths(total) for _ in range(8))]
        segments = ids_of(rows)
        positions = [[place for n in row for place in range(n)] for row in rows]
        assert segment_positions(segments).tolist() == positions, f"{seed=}, {rows=}"
        for dtype in (torch.float32, torch.bfloat16):
            bias = attention_bias(total, total, torch.empty((), dtype=dtype), segments)
            assert bias is not None and bias.dtype == dtype and bias.shape == (len(rows), 1, total, total)
            assert bias[:, 0].tolist() == [twin(row) for row in rows], f"{seed=}, {rows=}"


def twin(lengths: list[int]) -> list[list[float]]:
    """Document by document: token t of it sees its tokens 0..t and nothing else of the window."""
    total, start = sum(lengths), 0
    out = [[-float("inf")] * total for _ in range(total)]
    for n in lengths:
        for t in range(n):
            out[start + t][start : start + t + 1] = [0.0] * (t + 1)
        start += n
    return out


def test_without_segments_a_piece_sees_all_before_it() -> None:
    """The common cases need no mask."""
    like = torch.empty(())
    for T, S in ((1, 1), (1, 9), (9, 9)):
        assert attention_bias(T, S, like) is None
    bias = attention_bias(3, 5, like)
    no = -float("inf")
    assert bias is not None and bias.tolist() == [[0, 0, 0, no, no], [0, 0, 0, 0, no], [0, 0, 0, 0, 0]]
