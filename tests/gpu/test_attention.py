"""FlexAttention's kernels on one NVIDIA GPU against masked attention: `pytest -m gpu tests/gpu/test_attention.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.system.runs import make_data, pretrain
from tests.system.test_resume import story
from trainer.config.attention import Pattern
from trainer.model import flex
from trainer.model.attention import FASTEST_FIRST, sdpa_backends
from trainer.model.mask import attention_bias

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no NVIDIA GPU here: tests/unit/trainer/model/test_patterns.py holds what a CPU can",
    ),
]
GPU = torch.device("cuda", 0)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest; bf16 keeps 8 bits: 0.4% in each product


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()  # fresh numbers are fresh kernels: they would add up to the limit of variants


def qkv(n: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """As the model lays them: views of what c_attn puts out, [B, H, T, D]."""
    x = torch.randn(n, 2, 3, 3, head_dim, device=GPU, dtype=dtype)
    return [t.detach().requires_grad_() for t in x.permute(3, 1, 2, 0, 4).unbind()]


def results(y: Tensor, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def pattern_of(kind: str, n: int) -> Pattern:
    band, stride = (int(x) for x in torch.randint(1, n, (2,)))
    return Pattern(kind, band, stride, int(torch.randint(1, stride + 1, ())))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
    ("kind", "n", "head_dim"), [("D", 200, 64), ("B", 1000, 96), ("B", 384, 128), ("S", 256, 16), ("F", 640, 64)]
)
def test_forward_and_backward_equal_masked_attention(
    kind: str, n: int, head_dim: int, segmented: bool, dtype: torch.dtype
) -> None:
    seed = torch.seed()
    pattern, inputs = pattern_of(kind, n), qkv(n, head_dim, dtype)
    segments = (torch.rand(2, n, device=GPU) < 0.01).cumsum(1).int() if segmented else None
    dy = torch.randn_like(inputs[0])
    ours = results(flex.attend(*inputs, flex.block_mask(pattern, n, GPU, segments)), inputs, dy)
    bias = attention_bias(n, n, torch.empty((), device=GPU), segments, pattern)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        y = F.scaled_dot_product_attention(*exact, attn_mask=bias, is_causal=bias is None)
    for a, b, what in zip(ours, results(y, exact, dy.float()), ("y", "dq", "dk", "dv"), strict=True):
        error = ((a.float() - b).abs().max() / b.abs().max()).item()
        assert error <= TOLERANCE[dtype], f"{what}: {error=}, {pattern}, {seed=}"


def test_a_backward_gives_the_same_bits_again() -> None:
    inputs = qkv(512, 64, torch.bfloat16)
    dy, mask = torch.randn_like(inputs[0]), flex.block_mask(Pattern("B", 100, 0, 0), 512, GPU)
    first, again = (results(flex.attend(*inputs, mask), inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_new_documents_do_not_compile_a_function_again() -> None:
    from torch._dynamo.utils import counters

    def block(q: Tensor, k: Tensor, v: Tensor, mask: flex.BlockMask) -> Tensor:
        return flex.attend(q * 2, k, v, mask) + 1

    compiled, graphs = torch.compile(block, fullgraph=True, dynamic=False), []
    for _ in range(3):
        inputs, pattern = qkv(512, 64, torch.bfloat16), Pattern("F", 0, 100, 7)
        segments = (torch.rand(2, 512, device=GPU) < 0.02).cumsum(1).int()
        mask, dy = flex.block_mask(pattern, 512, GPU, segments), torch.randn_like(inputs[0])
        bias = attention_bias(512, 512, inputs[0], segments, pattern)
        y = F.scaled_dot_product_attention(inputs[0] * 2, *inputs[1:], attn_mask=bias) + 1
        pairs = zip(results(compiled(*inputs, mask), inputs, dy), results(y, inputs, dy), strict=True)
        assert all((a - b).abs().max() <= 2e-2 * b.abs().max() for a, b in pairs)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2] == graphs[0]


def test_masked_blocks_take_no_memory_of_their_own() -> None:
    """8,192 tokens: the scores alone would be 8 x 16 x 128 MiB in bf16."""
    inputs = [torch.randn(8, 16, 8192, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    mask = flex.block_mask(Pattern("B", 256, 0, 0), 8192, GPU)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flex.attend(*inputs, mask).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2 << 30


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="cuDNN goes first from Hopper on"
)
def test_causal_attention_on_hopper_runs_cudnns_kernel() -> None:
    assert sdpa_backends(GPU) == FASTEST_FIRST
    inputs = qkv(512, 64, torch.bfloat16)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(FASTEST_FIRST, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    for function in (attend, torch.compile(attend, fullgraph=True)):
        function(*inputs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            function(*inputs)
        assert any("scaled_dot_product_cudnn" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("documents", [False, True])
def test_a_sparse_run_on_a_gpu_follows_the_cpu(tmp_path: Path, documents: bool, precision: str) -> None:
    common = (
        f"data.path={make_data(tmp_path / 'data')}",
        "max_steps=6",
        f"precision={precision}",
        "tokens_per_step=1024",
        "model.n_ctx=256",
        "model.attention=DB",
        "model.band=40",
        f"data.document_mask={str(documents).lower()}",
    )
    for device in ("cpu", "cuda"):
        pretrain(tmp_path / device, *common, device=device)
    cpu, gpu = (dict(story(tmp_path / device)) for device in ("cpu", "cuda"))
    for step, metrics in cpu.items():
        assert gpu[step]["train/loss"] == pytest.approx(
            metrics["train/loss"], rel=1e-4 if precision == "fp32" else 1e-2
        )
