"""precision=fp8: the blocks' matrix products in 8 bits (Micikevicius et al. 2022, "FP8 formats for deep learning").

Activations and weights are rounded to e4m3 (3 bits of mantissa, up to 448), gradients to e5m2 (2 bits, up to 57,344),
each tensor divided first by a scale that brings its largest magnitude to the format's. The scale is taken from the
tensor itself at each use, so there is no history to save. Products are summed in fp32 and put out in bf16, as the
inputs are. Embeddings, the head, LayerNorms, attention and the loss stay as they are.

Legend: N tokens, I inputs, O outputs of a linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from conf.errors import UserError
from trainer.model.plain_linear import Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TINY = 1e-30  # the smallest numerator of a scale: a tensor of zeros is divided by it
CAPABILITY = (8, 9)  # Ada and Hopper; older GPUs have no such products


def check_fp8(device: torch.device) -> None:
    """Raises UserError on a GPU without fp8 products. A CPU computes them, slowly: for tests."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        name, has = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise UserError(
            f"precision=fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or more (Ada, Hopper), "
            f"{name} has {has[0]}.{has[1]}: give precision=bf16"
        )


def use_fp8(blocks: nn.Module) -> None:
    """Every linear inside multiplies in fp8 from now on (tp = 1)."""
    for module in blocks.modules():
        if isinstance(module, Linear):
            module.product = fp8_linear


def fp8_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """F.linear in fp8: [..., I] -> [..., O]. N, I and O are multiples of 16."""
    y_NO: Tensor = _Fp8Linear.apply(x.flatten(0, -2), weight_OI)
    return y_NO.unflatten(0, x.shape[:-1]) + bias_O


class _Fp8Linear(torch.autograd.Function):
    """y = x wᵀ, dx = g w, dw = gᵀ x. Kept for backward: x and w as they were multiplied, a byte for each number."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, w_OI: Tensor) -> Tensor:
        x8_NI, x_scale = rounded(x_NI, E4M3)
        w8_OI, w_scale = rounded(w_OI, E4M3)
        ctx.save_for_backward(x8_NI, x_scale, w8_OI, w_scale)
        ctx.dtype = x_NI.dtype
        return _product(x8_NI, w8_OI, x_scale, w_scale, ctx.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x8_NI, x_scale, w8_OI, w_scale = ctx.saved_tensors
        g8_NO, g_scale = rounded(grads[0], E5M2)
        dx_NI = _product(g8_NO, w8_OI.t().contiguous(), g_scale, w_scale, ctx.dtype, fast=False)
        dw_OI = _product(g8_NO.t().contiguous(), x8_NI.t().contiguous(), g_scale, x_scale, ctx.dtype, fast=False)
        return dx_NI, dw_OI


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / scale in an fp8 dtype, scale): an fp32 scalar, so that x ≈ first x second."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=TINY) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """a bᵀ from two row-major matrices [M, K] and [N, K], the layout that the hardware wants of both.

    `fast` sums with fewer bits on a Hopper's tensor cores: good enough forward, not for gradients.
    """
    out: Tensor = torch._scaled_mm(  # torch's own product, still under a private name
        a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast
    )
    return out
