"""Attention by pattern: one definition against a double loop, in the bias, in the cache, in FlexAttention's blocks."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from trainer.config.attention import DENSE, Pattern
from trainer.config.model import KINDS, ModelConfig
from trainer.distributed.mesh import Mesh
from trainer.inference.cache import KVCache
from trainer.model import flex
from trainer.model.attention import FASTEST_FIRST, layer_masks, sdpa_backends
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.model.mask import attention_bias, patterns
from trainer.objective.language_model import lm_loss
from trainer.summary import attention_lines

CFG = ModelConfig(name="t", n_layer=4, n_head=4, n_embd=64, n_ctx=40, vocab_size=200, init_std=0.2)
NUMBERS = {"band": 6, "stride": 8, "summary": 3}
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def looks(p: Pattern, i: int, j: int) -> bool:
    """The papers' sets, word for word: does token i look at token j?"""
    if j > i:
        return False
    if p.kind == "B":
        return j > i - p.band
    if p.kind == "S":
        return j > i - p.stride or (i - j) % p.stride == 0
    if p.kind == "F":
        return j // p.stride == i // p.stride or j % p.stride >= p.stride - p.summary
    return True


def sparse(attention: str, cfg: ModelConfig = CFG, **numbers: int) -> ModelConfig:
    """`cfg` with a pattern, and of the numbers those that its letters use."""
    users = {"band": "B", "stride": "SF", "summary": "F"}
    used = {k: v for k, v in {**NUMBERS, **numbers}.items() if set(users[k]) & set(attention)}
    return replace(cfg, attention=attention, **used)


def random_pattern(kind: str, n: int) -> Pattern:
    band, stride = torch.randint(1, n + 2, (2,)).tolist()
    return Pattern(kind, band, stride, int(torch.randint(1, stride + 1, ())))


def random_segments(rows: int, n: int) -> Tensor:
    """Fresh documents in each row, int32; the first row is one document."""
    ids = (torch.rand(rows, n) < 0.15).cumsum(1)
    ids[0] = 0
    return ids.int()


def build(mesh: Mesh, cfg: ModelConfig, seed: int) -> GPT:
    model = GPT(cfg, mesh)
    initialise(model, cfg, seed)
    return model


def loss_and_grads(model: GPT, *batch: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(lm_loss, *batch)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_is_that_of_a_double_loop(kind: str) -> None:
    """Also for a piece of text at the end of a cache."""
    seed = torch.seed()
    for n in (1, 2, 9, 33):
        for pattern in (random_pattern(kind, n) for _ in range(6)):
            whole = [[0.0 if looks(pattern, i, j) else -float("inf") for j in range(n)] for i in range(n)]
            for T in {1, n // 2 + 1, n}:
                bias = attention_bias(T, n, torch.empty(()), None, pattern)
                if bias is not None:
                    assert bias.tolist() == whole[n - T :], f"{pattern}, {T=}, {n=}, {seed=}"
                else:
                    assert kind == "D" and (n == T or all(x == 0 for row in whole[n - T :] for x in row))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_of_segments_is_that_of_each_alone(kind: str) -> None:
    seed, n = torch.seed(), 29
    pattern, segments = random_pattern(kind, 9), random_segments(4, n)
    bias = attention_bias(n, n, torch.empty(()), segments, pattern)
    assert bias is not None and bias.shape == (4, 1, n, n)
    for row, ids in zip(bias[:, 0], segments.tolist(), strict=True):
        for i in range(n):
            first = ids.index(ids[i])  # where its document begins
            sees = [ids[j] == ids[i] and looks(pattern, i - first, j - first) for j in range(n)]
            assert (row[i] == 0).tolist() == sees, f"{pattern}, {i=}, {ids=}, {seed=}"


def test_visible_pairs_and_what_counts_as_dense_are_counted_ones() -> None:
    seen = set()
    for n in range(1, 12):
        for band in range(1, 13):
            for summary in range(1, band + 1):
                for kind in KINDS:
                    cfg = replace(sparse(kind, band=band, stride=band, summary=summary), n_ctx=n)
                    p = Pattern(kind, band, band, summary)
                    count = sum(looks(p, i, j) for i in range(n) for j in range(n))
                    assert p.visible_pairs(n) == count, f"{p}, {n=}"
                    dense = count == n * (n + 1) // 2
                    assert p.sees_all(n) is dense and (cfg.sparse_layers == []) is dense, f"{p}, {n=}"
                    assert (patterns(cfg, n)[kind] == DENSE) is dense
                    seen.add((kind, dense))
    assert seen == {(kind, dense) for kind in KINDS for dense in (True, False)} - {("D", False)}


def test_letters_are_tiled_over_the_layers() -> None:
    cfg = replace(sparse("DBS"), n_layer=7)
    assert "".join(map(cfg.kind, range(7))) == "DBSDBSD"
    assert cfg.sparse_layers == [1, 2, 4, 5] and replace(cfg, n_ctx=6).sparse_layers == []


@pytest.mark.parametrize("attention", ["DB", "S", "BF"])
def test_a_pattern_that_hides_nothing_is_dense_bit_for_bit(attention: str, mesh: Mesh) -> None:
    seed, tokens = torch.seed(), torch.randint(CFG.vocab_size, (2, 3, CFG.n_ctx))
    wide = sparse(attention, band=CFG.n_ctx, stride=CFG.n_ctx, summary=1)
    a, b = (loss_and_grads(build(mesh, cfg, seed), *tokens) for cfg in (wide, CFG))
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), f"{seed=}"
    narrow = sparse(attention, band=CFG.n_ctx - 1, stride=CFG.n_ctx - 2, summary=1)
    assert loss_and_grads(build(mesh, narrow, seed), *tokens)[0] != b[0], f"{seed=}"


@pytest.mark.parametrize("attention", ["D", "B", "S", "F", "DBSF"])
def test_cached_logits_equal_those_of_the_whole_text(attention: str, mesh: Mesh) -> None:
    seed = torch.seed()
    model = build(mesh, sparse(attention), seed).eval()
    tokens, cache = torch.randint(CFG.vocab_size, (3, CFG.n_ctx)), KVCache(CFG.n_ctx)
    with torch.inference_mode():
        whole = model.logits(tokens)
        pieces = torch.cat([model.logits(part, cache) for part in tokens.split([9, 1, 1, 13, 1, 15], dim=1)], 1)
    assert (pieces - whole).abs().max() <= 1e-5 * whole.abs().max(), f"{seed=}"


def qkv(n: int, head_dim: int = 32, rows: int = 2) -> tuple[Tensor, ...]:
    """As the model lays them: [B, H, T, D], views of what c_attn puts out."""
    return torch.randn(n, rows, 3, 3, head_dim).permute(3, 1, 2, 0, 4).unbind()


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_equals_masked_attention(kind: str, segmented: bool) -> None:
    """It skips the blocks that no token sees."""
    seed, n = torch.seed(), 300
    pattern, segments = random_pattern(kind, n // 2), random_segments(2, n) if segmented else None
    mask = flex.block_mask(pattern, n, CPU, segments)
    bias = attention_bias(n, n, torch.empty(()), segments, pattern)
    if bias is None:
        bias = torch.full((n, n), -torch.inf).triu(1)
    q, k, v = qkv(n)
    a, b = flex.attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert (a - b).abs().max() <= 1e-5 * b.abs().max(), f"{pattern}, {seed=}"
    sees = F.pad((bias == 0).expand(2 if segmented else 1, 1, n, n), (0, 384 - n, 0, 384 - n))
    blocks = sees.unflatten(3, (3, flex.BLOCK)).unflatten(2, (3, flex.BLOCK)).any(5).any(3)
    assert torch.equal(mask.to_dense().bool(), blocks), f"{pattern}, {seed=}"


def test_a_band_leaves_out_most_blocks_of_gpt3s_context() -> None:
    """Its mask is kept."""
    band, dense = (flex.block_mask(p, 2048, CPU) for p in (Pattern("B", 256, 0, 0), DENSE))
    left = [int(m.kv_num_blocks.sum() + m.full_kv_num_blocks.sum()) for m in (band, dense)]
    assert left == [1 + 2 + 14 * 3, 16 * 17 // 2]
    assert flex.block_mask(Pattern("B", 256, 0, 0), 2048, CPU) is band
    assert flex.block_mask(Pattern("B", 256, 0, 0), 1024, CPU) is not band
    with torch.inference_mode():
        assert not flex.block_mask(Pattern("B", 255, 0, 0), 2048, CPU).kv_indices.is_inference()


@pytest.fixture
def flexed(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention wherever a GPU would take it; on a CPU it has no backward."""
    real = flex.takes
    monkeypatch.setattr(flex, "takes", lambda device, *args: real(torch.device("cuda"), *args))


LONG = replace(CFG, n_ctx=200)


@pytest.mark.parametrize("segmented", [False, True])
def test_a_model_on_flex_attention_equals_it_on_biases(
    segmented: bool, mesh: Mesh, request: pytest.FixtureRequest
) -> None:
    seed = torch.seed()
    model = build(mesh, sparse("DBSF", LONG, band=50, stride=140, summary=9), seed).eval()
    tokens, segments = torch.randint(200, (2, LONG.n_ctx)), random_segments(2, LONG.n_ctx) if segmented else None
    with torch.no_grad():
        reference = model.logits(tokens, segment_ids_BT=segments)
        request.getfixturevalue("flexed")
        masks = layer_masks(model.cfg, 200, 200, reference, segments)
        assert [isinstance(masks[kind], BlockMask) for kind in KINDS] == [segmented, True, True, True]
        error = (model.logits(tokens, segment_ids_BT=segments) - reference).abs().max() / reference.abs().max()
    assert error <= 1e-5, f"{seed=}"


@pytest.mark.usefixtures("flexed")
def test_new_documents_do_not_compile_a_block_again(mesh: Mesh) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    seed, counter = torch.seed(), CompileCounterWithBackend("aot_eager")
    model = build(mesh, sparse("DB", replace(LONG, n_layer=2), band=50), seed).eval()
    compiled = build(mesh, model.cfg, seed).eval()
    torch._dynamo.reset()
    for block in compiled.h:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    for _ in range(3):
        tokens, segments = torch.randint(200, (2, LONG.n_ctx)), random_segments(2, LONG.n_ctx)
        with torch.no_grad():
            a, b = (m.logits(tokens, segment_ids_BT=segments) for m in (compiled, model))
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), f"{seed=}"
    assert counter.frame_count == 2  # one for each letter


def test_flex_attention_is_for_what_it_can_do() -> None:
    cuda, meta = torch.device("cuda"), torch.device("meta")
    assert flex.takes(cuda, 2048, 2048, 64, 0.0)
    for device, T, S, head_dim, dropout in (
        (CPU, 2048, 2048, 64, 0.0),
        (meta, 2048, 2048, 64, 0.0),
        (cuda, 1, 2048, 64, 0.0),
        (cuda, 128, 128, 64, 0.0),
        (cuda, 2048, 2048, 8, 0.0),
        (cuda, 2048, 2048, 64, 0.1),
    ):
        assert not flex.takes(device, T, S, head_dim, dropout)


def test_a_prompt_under_a_cache_compiles_no_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "takes", lambda *_: True)
    cfg = ModelConfig("m", 2, 2, 32, 256, 64, attention="DB", band=8)
    like = torch.zeros(1)
    assert isinstance(layer_masks(cfg, 200, 200, like)["B"], BlockMask)
    assert isinstance(layer_masks(cfg, 200, 200, like, any_length=True)["B"], Tensor)


def test_the_introduction_says_what_computes_a_sparse_model() -> None:
    assert attention_lines(CFG, CPU) == []
    cfg = sparse("DB", LONG, band=50)
    for device, dropout, words in (
        (CPU, 0.0, "attention: DB, 2 of 4 layers sparse, as dense attention under a mask, at a dense layer's cost"),
        (
            torch.device("cuda"),
            0.0,
            "attention: DB, 2 of 4 layers sparse, by FlexAttention, which skips what is masked",
        ),
        (torch.device("cuda"), 0.1, "at a dense layer's cost: FlexAttention has no dropout, and model.dropout=0.1"),
    ):
        how, files = attention_lines(replace(cfg, dropout=dropout), device)
        assert how.endswith(words) and files.startswith("the last checkpoint gets no Hugging Face files: model=t has")


def test_the_order_of_kernels_is_part_of_the_graph_alone(mesh: Mesh) -> None:
    assert sdpa_backends(CPU) is None
    seed, tokens = torch.seed(), torch.randint(CFG.vocab_size, (2, 3, CFG.n_ctx))
    model = build(mesh, replace(CFG, n_layer=1), seed)
    plain = loss_and_grads(model, *tokens)
    before = torch._C._get_sdp_priority_order()
    model.h[0].attn.backends = FASTEST_FIRST
    ordered = loss_and_grads(model, *tokens)
    assert all(torch.equal(a, b) for a, b in zip(plain, ordered, strict=True)), f"{seed=}"
    torch._dynamo.reset()
    model.compile(backend="aot_eager", fullgraph=True)  # raises at a break in the graph
    for a, b in zip(loss_and_grads(model, *tokens), plain, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), f"{seed=}"
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles FlexAttention for a CPU with g++: none here")
@pytest.mark.parametrize("kind", "BSF")
def test_the_compiled_kernel_equals_masked_attention(kind: str) -> None:
    seed, n = torch.seed(), 300
    pattern = random_pattern(kind, n // 2)
    q, k, v = qkv(n)
    compiled = torch.compile(flex.flex_attention, fullgraph=True, dynamic=False)
    a = compiled(q, k, v, block_mask=flex.block_mask(pattern, n, CPU))
    b = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias(n, n, q, None, pattern))
    assert (a - b).abs().max() <= 1e-5 * b.abs().max(), f"{pattern}, {seed=}"


def test_a_block_is_seen_if_one_of_its_pairs_is() -> None:
    """`Pattern.sees_block` against all pairs of two blocks."""
    size = 4
    for kind in KINDS:
        for stride in range(1, 14):
            for summary in range(1, stride + 1):
                p = Pattern(kind, stride, stride, summary)
                for q in range(6):
                    for k in range(q + 1):
                        queries, keys = (range(block * size, (block + 1) * size) for block in (q, k))
                        assert p.sees_block(q, k, size) == any(looks(p, i, j) for i in queries for j in keys), (p, q, k)
