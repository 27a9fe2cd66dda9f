"""DeepSpeed as this project uses it: the one file that imports it, and the mesh in DeepSpeed's words.

DeepSpeed looks for its device when it is imported, takes two seconds for an MLflow that only its autotuner uses, and
loads torch's compiler at its first step, more seconds, to decorate a Muon that we do not use. All are settled here.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.distributed.mesh import Mesh


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    sys.modules.setdefault(module, None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if sys.modules[module] is None:
            del sys.modules[module]


@contextmanager
def _decorated_by_nothing(module: Any) -> Iterator[None]:
    """Functions that are imported meanwhile are not compiled by `module.compile`."""
    compile = module.compile
    module.compile = lambda *args, **kwargs: lambda function: function
    try:
        yield
    finally:
        module.compile = compile


if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with _hidden("mlflow"), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.comm.comm as deepspeed_comm
    from deepspeed.runtime import compiler
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
with _decorated_by_nothing(compiler):
    import deepspeed.runtime.zero.muon.muon_optimizer

__all__ = [
    "BF16_Optimizer",
    "connect",
    "deepspeed",
    "deepspeed_comm",
    "flat_in_fp32",
    "mpu",
    "register_sequence_parallel_hooks",
]


@contextmanager
def flat_in_fp32() -> Iterator[None]:
    """DeepSpeed engines of fp32 that are made meanwhile get the optimizer of those of bf16; for ZeRO-1.

    It adds to a gradient once a micro step, where DeepSpeed's own copies each one into buckets for other ranks, also
    where there are none. Private: `_configure_zero_optimizer`.
    """

    def make(engine: Any, optimizer: torch.optim.Optimizer) -> BF16_Optimizer:
        return BF16_Optimizer(
            optimizer,
            engine.param_names,
            bfloat16_config=SimpleNamespace(enabled=True, immediate_grad_update=False),
            mpu=engine.mpu,
            clip_grad=engine.gradient_clipping(),
            dp_process_group=engine.seq_data_parallel_group,
            grad_acc_dtype=torch.float32,
        )

    own = DeepSpeedEngine._configure_zero_optimizer
    DeepSpeedEngine._configure_zero_optimizer = make
    try:
        yield
    finally:
        DeepSpeedEngine._configure_zero_optimizer = own


def connect(mesh: Mesh) -> None:
    """Give DeepSpeed the process group that `join_ranks` has made; before `deepspeed.initialize`."""
    # Private: without this, DeepSpeed compiles a C++ all-reduce for CPUs at the first start, for half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed_comm.cdb = None  # private: it may hold the process group of an earlier mesh, which is gone
    backend = "gloo" if mesh.device.type == "cpu" else "nccl"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def mpu(mesh: Mesh) -> SimpleNamespace:
    """The mesh in the words in which DeepSpeed asks for it: `deepspeed.initialize(mpu=...)`."""
    tp = (mesh.tp_group, mesh.tp, mesh.tp_rank)
    words = {"data_parallel": (mesh.dp_group, mesh.dp, mesh.dp_rank), "model_parallel": tp, "tensor_model_parallel": tp}
    answers: dict[str, Any] = {
        "tensor_model_parallel_src_rank": mesh.world.rank - mesh.tp_rank,
        "pipeline_model_parallel_world_size": 1,
        "pipeline_model_parallel_rank": 0,
    }
    for word, (group, size, rank) in words.items():
        answers |= {f"{word}_group": group, f"{word}_world_size": size, f"{word}_rank": rank}
    return SimpleNamespace(**{f"get_{question}": partial(lambda x: x, answer) for question, answer in answers.items()})


def register_sequence_parallel_hooks(module: nn.Module, mesh: Mesh) -> None:
    """Sum over the tp group the gradients of replicated parameters that saw only this rank's part of the sequence.

    For parameters with `p.sequence_parallel`; to be called after `deepspeed.initialize`, which knows nothing of them.
    """

    def summed(grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=mesh.tp_group)
        return grad

    for p in module.parameters():
        if getattr(p, "sequence_parallel", False):
            p.register_hook(summed)
