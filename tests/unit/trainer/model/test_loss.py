"""The vocabulary loss beside torch's own: the same loss and gradient, and no second copy of the logits."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.config import IGNORE
from tests.helpers.operations import Operations
from trainer.distributed.mesh import Mesh
from trainer.model import loss as module
from trainer.model.gpt import run_loss
from trainer.model.loss import token_loss
from trainer.model.plain_linear import TiedEmbedding

T, B, V, TRUE = 9, 4, 320, 300  # padded_vocab_size(300, 1) = 320


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, some far apart, with large ones in the padding; labels, some ignored."""
    logits = torch.randn(T, B, V) * torch.tensor([1.0, 3.0, 30.0])[torch.randint(3, (T, B, 1))]
    logits[..., TRUE:] = 99.0
    labels = torch.randint(TRUE, (T, B))
    labels[torch.rand(T, B) < 0.3] = IGNORE
    labels[0, 0], labels[0, 1] = IGNORE, TRUE - 1
    return logits.to(dtype), labels


def torchs(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    x = logits.float().clone().requires_grad_()
    true = x.masked_fill(torch.arange(V) >= TRUE, -torch.inf)
    loss = F.cross_entropy(true.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    (loss * scale).backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_loss_and_gradient_are_torchs(
    dtype: torch.dtype, rounding: float, rows: int, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOSS_CHUNK_BYTES", 4 * V * rows)
    seed = torch.seed()
    logits, labels = given(dtype)
    true_loss, true_grad = torchs(logits, labels, 0.3)
    x = logits.clone().requires_grad_()
    loss = token_loss(x * 1, labels, mesh, TRUE)
    (loss * 0.3).backward()
    assert loss.dtype == torch.float32 and x.grad is not None and x.grad.dtype == dtype
    assert (loss - true_loss).abs() <= 1e-6 * true_loss.abs(), f"{seed=}"
    error = (x.grad.float() - true_grad).abs()
    assert (error <= rounding * true_grad.abs() + 1e-6 * true_grad.abs().max()).all(), f"{seed=}"


def test_no_label_that_counts_gives_zero(mesh: Mesh) -> None:
    logits, labels = given(torch.float32)
    x = logits.requires_grad_()
    loss = token_loss(x * 1, torch.full_like(labels, IGNORE), mesh, TRUE)
    loss.backward()
    assert loss == 0 and x.grad is not None and not x.grad.any()


def test_the_logits_are_never_held_in_fp32(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 4
    monkeypatch.setattr(module, "LOSS_CHUNK_BYTES", 4 * V * rows)
    logits, labels = given(torch.bfloat16)
    x = logits.requires_grad_()
    y = x * 1
    with Operations() as done:
        token_loss(y, labels, mesh, TRUE).backward()
    fp32 = max(n for dtype, n in done.made if dtype == torch.float32)
    wide = [n for dtype, n in done.made if n >= T * B * V and dtype.itemsize > 1]
    assert rows * TRUE <= fp32 < 2 * rows * V
    assert set(wide) <= {T * B * V}  # the logits themselves, which become their gradient
    assert (torch.float32, T * B * V) not in done.made
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|second time"):
        loss = token_loss(y, labels, mesh, TRUE)
        loss.backward(retain_graph=True)
        loss.backward()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor on a CPU needs a C++ compiler: there is no g++")
def test_the_compiled_loss_holds_the_logits_once(mesh: Mesh) -> None:
    """Inductor's code for head and loss makes one bf16 buffer of the logits' size, padding and backward included."""
    from torch._inductor.utils import run_fw_bw_and_get_code

    _, labels = given(torch.bfloat16)
    wte = TiedEmbedding(TRUE, 32)
    wte.weight.data = torch.randn(V, 32).bfloat16()
    x_TBC = torch.randn(T, B, 32).bfloat16().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(run_loss, fullgraph=True, dynamic=False)
    _, codes = run_fw_bw_and_get_code(lambda: compiled(wte, x_TBC, labels, mesh))
    shapes = rf"{T * B}, {V}|{T}, {B}, {V}"
    wide = re.findall(rf"empty_strided_\w+\(\((?:{shapes})\), [^)]*\), torch\.(\w+)\)", "\n".join(codes))
    assert wide == ["bfloat16"]
