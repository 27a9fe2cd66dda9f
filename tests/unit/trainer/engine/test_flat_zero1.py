"""The norm of a long vector, and what a closed gate and a scale do to the optimizer."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.distributed import tiny_run
from trainer.engine.flat_zero1 import ROW, vector_norm
from trainer.engine.optimizers import GatedAdamW, adamw


@pytest.mark.parametrize("n", [1, ROW - 1, ROW, ROW + 1, ROW * ROW + 3 * ROW + 7])
def test_the_norm_of_a_long_vector_keeps_its_digits(n: int) -> None:
    seed = n % 1000
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    assert float(vector_norm(x)) == pytest.approx(float(x.double().norm()), rel=1e-6), f"seed {seed}"


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.zeros(5 * ROW)
        x[3 * ROW + 1] = bad
        assert not vector_norm(x).isfinite()


def test_grad_scale_divides_the_gradients() -> None:
    """torch's fused AdamW reads it from the optimizer; if it no longer did, nothing would be clipped in bf16."""
    model = torch.nn.Linear(8, 8)
    twins: list[tuple[torch.nn.Module, GatedAdamW]] = []
    for _ in range(2):
        twin = copy.deepcopy(model)
        twins.append((twin, adamw(twin, tiny_run.config().optim)))
    for step in range(3):
        grads = [torch.randn_like(p) for p in model.parameters()]
        for (twin, adam), scale in zip(twins, (1.0, 4.0 + step), strict=True):
            for p, g in zip(twin.parameters(), grads, strict=True):
                p.grad = g / (4.0 + step) * scale
            adam.grad_scale = torch.tensor(scale)
            adam.step()
    for a, b in zip(twins[0][0].parameters(), twins[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
