"""Selective recompute: the output of a cheap function is not kept for backward, but made again there.

`torch.utils.checkpoint` around the function and the linear that uses it would do as much at tp = 1. At tp > 1 it would
run megatron-core's linears again, products and gathers of the sequence included; this never does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def making_again(y: Tensor, make: Callable[[Tensor], Tensor], x: Tensor, on: bool) -> AbstractContextManager[object]:
    """Operations inside that keep `y` = make(x) for their backward get it from `make` again; all else is kept.

    `make` draws no random numbers, and keeps `x` for its own backward anyway (LayerNorm, GELU): so `y` is all that is
    saved. A compiled graph is left alone: there `engine/compile.py` makes the compiler do the same.
    """
    if not on or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    memory = y.untyped_storage().data_ptr()  # `y` lives as long as the caller is inside: no other tensor lies there

    def pack(kept: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...], int]:
        if kept.untyped_storage().data_ptr() != memory:
            return kept
        return kept.shape, kept.stride(), int(kept.storage_offset())

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return make(x).as_strided(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
