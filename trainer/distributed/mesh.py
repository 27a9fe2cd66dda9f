"""Process groups, seeds and what DeepSpeed must know of them. One of megatron-core's and DeepSpeed's doors.

Ranks are numbered tp first: ranks 0..tp-1 share one copy of the model, rank r + tp has the next data.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.errors import UserError
from trainer.config.parallel import ParallelConfig
from trainer.distributed.world import World

if TYPE_CHECKING:
    pass


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    sys.modules.setdefault(module, None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if sys.modules[module] is None:
            del sys.modules[module]


# DeepSpeed looks for its device when it is imported, and takes two seconds for an MLflow that only its autotuner uses:
# it is imported here, before anyone else does, with both said.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with _hidden("mlflow"), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core tells that Transformer Engine and Apex are absent: not needed
    import deepspeed
    import deepspeed.comm.comm as deepspeed_comm
    from megatron.core import parallel_state


@dataclass(frozen=True)
class Mesh:
    """This rank's place among the data-parallel (dp) and tensor-parallel (tp) ranks; world_size = dp x tp."""

    world: World
    device: torch.device
    dp_rank: int
    dp: int
    tp_rank: int
    tp: int
    dp_group: Any
    tp_group: Any


def start(world: World, parallel: ParallelConfig, timeout_s: float = 600.0) -> Mesh:
    """Join the run's process group (nccl on a GPU, gloo without one) and split it into dp and tp groups.

    A rank that waits longer than `timeout_s` for the others ends itself.

    Raises:
        UserError: tp does not divide the world, or this machine has fewer GPUs than ranks.
    """
    if world.world_size % parallel.tp:
        raise UserError(
            f"parallel.tp={parallel.tp} does not divide the {world.world_size} ranks: start a multiple of it"
        )
    if parallel.tp > 1:  # before CUDA starts: megatron-core wants a collective launched before the GEMM that hides it
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = _device(world)
    _start_deepspeed(device, timeout_s)
    parallel_state.initialize_model_parallel(
        parallel.tp,
        distributed_timeout_minutes=timeout_s / 60,  # it makes a timedelta of them
        create_gloo_process_groups=False,
        order="tp-cp-ep-dp-pp",
    )
    return Mesh(
        world=world,
        device=device,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        dp_group=parallel_state.get_data_parallel_group(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )


def wait_for_main(mesh: Mesh, what: str, timeout_s: float) -> None:
    """Rank 0 says that it has done `what`; the others return when it has, when it is gone, or `timeout_s` later.

    No collective: rank 0 does not wait, and the others may for longer than a collective's timeout.
    """
    store = dist.distributed_c10d._get_default_store()  # private: where the ranks have met
    with suppress(dist.DistError):  # rank 0, which holds the store, has ended; or the time is over
        if mesh.world.is_main:
            store.set(what, "done")
        else:
            store.wait([what], timedelta(seconds=timeout_s))


def stop(mesh: Mesh) -> None:
    """Leave the process group; `start` may then be called again."""
    parallel_state.destroy_model_parallel()
    deepspeed_comm.destroy_process_group()
    deepspeed_comm.cdb = None  # private: DeepSpeed keeps the dead backend, and a second start would believe in it


def _device(world: World) -> torch.device:
    """This rank's GPU; the CPU where there is none, or where DS_ACCELERATOR=cpu asks for it."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={world.local_rank}, but there are {torch.cuda.device_count()} GPUs: start one rank for each"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def _start_deepspeed(device: torch.device, timeout_s: float) -> None:
    # megatron-core and DeepSpeed call collectives by names that torch 2.13 has replaced.
    renamed = "(all_gather_into_tensor|reduce_scatter_tensor)"
    warnings.filterwarnings("ignore", f".torch.distributed.{renamed}. is deprecated", FutureWarning)
    # Private: without this, DeepSpeed compiles a C++ all-reduce for CPUs at the first start, for half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cpu":  # megatron-core allocates its buffers on torch.cuda.current_device()
        torch.cuda.current_device = lambda: device  # type: ignore[assignment, return-value]
    backend = "gloo" if device.type == "cpu" else "nccl"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s))


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
