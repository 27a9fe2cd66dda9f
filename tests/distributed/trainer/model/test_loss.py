"""The loss over a vocabulary that two ranks hold half of, beside plain torch and megatron-core's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.config import IGNORE
from tests.helpers.operations import Operations
from tests.helpers.ranks import run_ranks

T, B, LOCAL = 9, 4, 192
TRUE = {"part of rank 1 is padding": 300, "rank 1 is all padding": 150, "no padding": 2 * LOCAL}


def given(dtype: torch.dtype, n_true: int) -> tuple[Tensor, Tensor]:
    """Logits of the whole vocabulary, some far apart, large in the padding; labels, some ignored."""
    g = torch.Generator().manual_seed(n_true)
    logits = (
        torch.randn(T, B, 2 * LOCAL, generator=g)
        * torch.tensor([1.0, 3.0, 30.0])[torch.randint(3, (T, B, 1), generator=g)]
    )
    logits[..., n_true:] = 99.0
    labels = torch.randint(n_true, (T, B), generator=g)
    labels[torch.rand(T, B, generator=g) < 0.3] = IGNORE
    return logits.to(dtype), labels


def measure() -> list[dict[str, Any]]:
    """For each case the errors against plain torch and megatron-core, and the fp32 tensors of the logits' size."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from trainer.config.parallel import ParallelConfig
    from trainer.distributed.mesh import join_ranks, leave_ranks
    from trainer.distributed.world import read_world
    from trainer.model import loss as module

    mesh = join_ranks(read_world(), ParallelConfig(name="tp2", tp=2))
    module.LOSS_CHUNK_BYTES = 4 * LOCAL * 7  # chunks of 7 tokens
    out = []
    for name, n_true in TRUE.items():
        for dtype in (torch.float32, torch.bfloat16):
            logits, labels = given(dtype, n_true)
            padded = logits.float().masked_fill(torch.arange(2 * LOCAL) >= n_true, -torch.inf)
            whole = padded.clone().requires_grad_()
            true = F.cross_entropy(whole.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
            (true * 0.3).backward()
            assert whole.grad is not None
            true_grad = whole.grad.chunk(2, -1)[mesh.tp_rank]

            local = logits.chunk(2, -1)[mesh.tp_rank].contiguous().requires_grad_()
            own = min(max(n_true - mesh.tp_rank * LOCAL, 0), LOCAL)
            x = local * 1
            with Operations() as done:
                loss = module.token_loss(x, labels, mesh, own)
                (loss * 0.3).backward()
            theirs = padded.to(dtype).chunk(2, -1)[mesh.tp_rank].contiguous().requires_grad_()
            their_loss = vocab_parallel_cross_entropy(theirs * 1, labels).masked_fill(labels == IGNORE, 0.0).sum()
            (their_loss * 0.3).backward()
            assert local.grad is not None and theirs.grad is not None
            scale = true_grad.abs().max()
            rounding = 2**-8 if dtype is torch.bfloat16 else 1e-6
            excess = (local.grad.float() - true_grad).abs() - rounding * true_grad.abs()
            out.append(
                {
                    "case": f"{name}, {dtype}",
                    "loss": loss.item(),
                    "loss error": ((loss - true).abs() / true.abs()).item(),
                    "gradient error": (excess.max() / scale).item() if scale > 0 else local.grad.abs().max().item(),
                    "megatron": torch.equal(loss, their_loss) and torch.equal(local.grad, theirs.grad),
                    "fp32 copies": (torch.float32, x.numel()) in done.made and dtype is not torch.float32,
                }
            )
    leave_ranks(mesh)
    return out


@pytest.fixture(scope="module")
def ranks() -> list[list[dict[str, Any]]]:
    return run_ranks(2, "tests.distributed.trainer.model.test_loss:measure")


def test_the_loss_of_two_ranks_and_its_gradient_are_torchs(ranks: list[list[dict[str, Any]]]) -> None:
    for case in [case for rank in ranks for case in rank]:
        assert case["loss error"] <= 1e-6 and case["gradient error"] <= 1e-6, case
    assert [case["loss"] for case in ranks[0]] == [case["loss"] for case in ranks[1]]


def test_its_bits_are_megatron_cores(ranks: list[list[dict[str, Any]]]) -> None:
    assert not [case for rank in ranks for case in rank if not case["megatron"]]


def test_it_holds_no_fp32_copy_of_the_logits(ranks: list[list[dict[str, Any]]]) -> None:
    assert not [case for rank in ranks for case in rank if case["fp32 copies"]]
