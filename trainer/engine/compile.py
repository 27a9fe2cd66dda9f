"""torch.compile of a GPT at tp = 1: one graph for a block, which all layers of its kind share, and one for the loss.

Compiled as a whole XL takes minutes; a block takes seconds, and runs as fast.

There is one graph for each kind of block, for training and for evaluation, and for each shape of a micro batch (a
batch ramp and stages of another n_ctx bring new ones): sizes are constants in a graph, which the fastest kernels want.
Generation with a cache, whose length grows token by token, is not compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trainer.config.parallel import Compile, ParallelConfig, Precision, Recompute
from trainer.distributed.mesh import Mesh
from trainer.engine.fp8 import check_fp8, use_fp8
from trainer.model.gpt import GPT
from trainer.plan.layout_rules import compile_refusal

GRAPHS = 64  # of one function; with `fullgraph` one more is an error, not a silent fall back to eager


def prepare(model: GPT, precision: Precision, compile: Compile, layout: ParallelConfig, mesh: Mesh) -> None:
    """Before the engine is built: fp8 products and compiled blocks in every trunk, if the config asks for them."""
    if precision is Precision.fp8:
        check_fp8(mesh.device)
    for trunk in (m for m in model.modules() if isinstance(m, GPT)):
        if precision is Precision.fp8:
            use_fp8(trunk.h)
        if is_compiled(compile, layout, mesh):
            compile_model(trunk)


def is_compiled(compile: Compile, layout: ParallelConfig, mesh: Mesh) -> bool:
    """Return True if blocks are compiled: `compile=auto` does on a GPU, unless the layout refuses."""
    if compile is Compile.auto:
        return mesh.device.type == "cuda" and compile_refusal(layout) is None
    return compile is Compile.on


def describe_compile(compile: Compile, layout: ParallelConfig, mesh: Mesh) -> str:
    """A line of the run's summary."""
    if is_compiled(compile, layout, mesh):
        return "compiled: each kind of block and the loss, at the first step and for each new shape of a micro batch"
    if compile is Compile.off:
        return "not compiled: compile=off"
    return f"not compiled: {compile_refusal(layout) or 'on a CPU only where compile=on asks for it'}"


def compile_model(model: GPT, backend: str | Callable[..., Any] = "inductor") -> None:
    """Parameters are inputs of the graphs: no layer, and no moving of weights by ZeRO, needs a graph of its own.

    Dropout draws its seeds from torch's generator at each call: a micro step's seed decides it, as without compiling,
    though the bits dropped are others.
    """
    import torch._dynamo  # seconds, which a run that is not compiled saves

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    of_blocks = _selective(backend) if model.recompute is Recompute.selective else backend
    model.run_block = torch.compile(model.run_block, fullgraph=True, dynamic=False, backend=of_blocks)
    model.run_loss = torch.compile(model.run_loss, fullgraph=True, dynamic=False, backend=backend)


def _selective(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """A backend that makes LayerNorms and GELUs again in backward, as `block.py` does without a compiler.

    By itself torch keeps what a matrix product reads, since a fused kernel must write it down again. Private: the name
    of that rule; a test counts the bytes that are kept.
    """

    from torch._dynamo.backends.registry import lookup_backend

    def compiler(graph: Any, inputs: Any) -> Any:
        with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
            return lookup_backend(backend)(graph, inputs)

    return compiler
