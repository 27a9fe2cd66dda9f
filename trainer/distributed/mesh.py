"""Process groups of data-parallel and tensor-parallel ranks. One of the two files that import megatron-core.

Ranks are numbered tp first: ranks 0..tp-1 share one copy of the model, rank r + tp has the next data.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from conf.errors import UserError
from trainer.config.parallel import ParallelConfig
from trainer.distributed.world import World, sees_one_gpu


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


def join_ranks(world: World, parallel: ParallelConfig, timeout_s: float = 600.0) -> Mesh:
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
    device = device_of(world)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        bound = device if device.type == "cuda" and world.world_size > 1 else None
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=bound)
    dp_group, tp_group = _groups(parallel.tp, device, timeout_s)
    return Mesh(
        world=world,
        device=device,
        dp_rank=world.rank // parallel.tp,
        dp=world.world_size // parallel.tp,
        tp_rank=world.rank % parallel.tp,
        tp=parallel.tp,
        dp_group=dp_group,
        tp_group=tp_group,
    )


def single_rank_mesh(world: World) -> Mesh:
    """A mesh of this process alone, without process groups: for a model that no other rank takes part in."""
    alone = World(rank=0, world_size=1, local_rank=world.local_rank)
    return Mesh(world=alone, device=device_of(world), dp_rank=0, dp=1, tp_rank=0, tp=1, dp_group=None, tp_group=None)


def _groups(tp: int, device: torch.device, timeout_s: float) -> tuple[Any, Any]:
    """The dp group and the tp group of this rank. Collective."""
    if tp == 1:
        return dist.group.WORLD, dist.new_subgroups(1, timeout=timedelta(seconds=timeout_s))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core reports that Transformer Engine and Apex are absent
        from megatron.core import parallel_state

    # megatron-core calls collectives by names that torch 2.13 has replaced.
    renamed = "(all_gather_into_tensor|reduce_scatter_tensor)"
    warnings.filterwarnings("ignore", f".torch.distributed.{renamed}. is deprecated", FutureWarning)
    if device.type == "cpu":  # megatron-core allocates its buffers on torch.cuda.current_device()
        torch.cuda.current_device = lambda: device  # type: ignore[assignment, return-value]
    parallel_state.destroy_model_parallel()  # of an earlier mesh of this process
    parallel_state.initialize_model_parallel(
        tp,
        distributed_timeout_minutes=timeout_s / 60,  # it makes a timedelta of them
        create_gloo_process_groups=False,
        order="tp-cp-ep-dp-pp",
    )
    return parallel_state.get_data_parallel_group(), parallel_state.get_tensor_model_parallel_group()


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


def leave_ranks(mesh: Mesh) -> None:
    """Leave the process group, if there is one; `join_ranks` may then be called again."""
    if mesh.tp > 1:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    if mesh.dp_group is not None:
        dist.destroy_process_group()


def gpu_index(world: World) -> int | None:
    """The number of this rank's GPU among those that it sees; None where there is none for it.

    A launcher that shows each rank one GPU (Slurm's --gpus-per-task, --gpu-bind=single) has made the choice: number 0.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    alone = torch.cuda.device_count() == 1 and visible not in ("", "-1") and "," not in visible
    index = 0 if alone else world.local_rank
    return index if index < torch.cuda.device_count() else None


def device_of(world: World) -> torch.device:
    """This rank's GPU; the CPU without one, or if DS_ACCELERATOR=cpu asks for it."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = gpu_index(world)
    if index is None:
        raise UserError(
            f"LOCAL_RANK={world.local_rank}, but there are {torch.cuda.device_count()} GPUs: start one rank for each"
        )
    if index != world.local_rank:
        sees_one_gpu()
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device
