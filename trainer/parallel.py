"""Process groups, seeds and what DeepSpeed must know of them. One of megatron-core's and DeepSpeed's doors.

Ranks are numbered tp first: ranks 0..tp-1 share one copy of the model, rank r + tp has the next data.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.config import Passing, UserError
from trainer.config import ParallelConfig
from trainer.hang import place_of_error
from trainer.world import World

if TYPE_CHECKING:
    from data_pipeline.loader import Item


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

# What gloo, NCCL and torch's store say of other ranks; all else (sizes that differ, CUDA's errors, memory, a port in
# use) is this rank's own.
SILENT = re.compile(
    "timed out (waiting|after|connecting)|before timing out|connection timed out|wait timeout|operation timeout",
    re.IGNORECASE,
)
GONE = re.compile(
    r"connection (was likely )?(reset|closed|refused)|closed by (remote )?peer|peer closed the connection|broken pipe|"
    r"remote process exit|timeout caused pair closure|socket has failed to connect|no route to host|"
    r"(host|network) is (down|unreachable)",
    re.IGNORECASE,
)


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


@contextmanager
def ranks_lost(world: World, timeout_s: float) -> Iterator[None]:
    """What torch says inside when other ranks do not answer, or are gone, becomes one line that a user understands.

    Any other error of a collective is a defect, and keeps its traceback.

    Raises:
        Passing: a collective or the start of the process group failed for want of the others.
    """
    try:
        yield
    except RuntimeError as e:  # torch.distributed.DistError is one; gloo raises the bare one
        text = " ".join(str(e).split())
        silent = SILENT.search(text)
        if not silent and not GONE.search(text):
            raise
        me = f"rank {world.rank} of {world.world_size} on {socket.gethostname()}"
        if silent:
            told = (
                f"{me} waited for the other ranks for watch.collective_s={timeout_s:g} s and got no answer: a host or "
                "its network is gone, or a rank hangs"
            )
        else:
            told = f"{me} lost the connection to another rank: that one, or its host, has ended; what it said tells why"
        raise Passing(f"{told}; in {place_of_error(e.__traceback__)} ({text[:300]})") from e


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


class TpChannel:
    """Gives a tp group what its rank 0 has read: a `data_pipeline.loader.Channel`. For the main thread alone."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.reads = mesh.tp_rank == 0

    def share(self, item: Item | None) -> Item:
        """`item` of tp rank 0 (None elsewhere) on every rank; an error arrives as a UserError of its text."""
        if item is not None:
            payload = _payload(item)
            self._broadcast(torch.tensor([item.error is not None, item.crc32, *payload.shape]))
            self._broadcast(payload)
            return item
        from data_pipeline.loader import Batch, Item

        failed, crc32, *shape = self._broadcast(torch.empty(6, dtype=torch.int64)).tolist()
        payload = self._broadcast(torch.empty(shape, dtype=torch.int64))
        if failed:
            return Item([], crc32, UserError(bytes(payload.flatten().tolist()).decode()))
        return Item([Batch(b[0], b[1], *(s.int() for s in b[2:])) for b in payload], crc32)

    def _broadcast(self, values: Tensor) -> Tensor:
        values = values.to(self.mesh.device)
        dist.broadcast(values, src=self.mesh.world.rank - self.mesh.tp_rank, group=self.mesh.tp_group)
        return values


def _payload(item: Item) -> Tensor:
    """Tokens, labels and segment ids where there are any, as int64 [micro steps, 2 or 3, B, T]; or the bytes of the
    error's text as [bytes, 1, 1, 1]."""
    if item.error is None:
        return torch.stack([torch.stack([t.long() for t in batch if t is not None]) for batch in item.batches])
    text = str(item.error) or type(item.error).__name__
    return torch.tensor(list(text.encode())).reshape(-1, 1, 1, 1)


def channel(mesh: Mesh) -> TpChannel | None:
    """For the loader; None where each rank reads for itself (tp = 1)."""
    return TpChannel(mesh) if mesh.tp > 1 else None


def stable_seed(*parts: int | str) -> int:
    """63 bits that depend on `parts` alone: the same on every machine and in every version of Python and torch."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_dropout(mesh: Mesh, seed: int, step: int, micro_step: int) -> None:
    """Before each micro step: dropout becomes a pure function of these and dp_rank, equal over the tp ranks."""
    torch.manual_seed(stable_seed("dropout", seed, step, micro_step, mesh.dp_rank))


@contextmanager
def tp_local_randomness(mesh: Mesh) -> Iterator[None]:
    """Randomness inside differs over the tp ranks: for activations of which each rank holds its own part.

    The seed is drawn from the replicated stream, so that activation recompute, which rewinds that stream, gets it
    again; from the CPU's part of it, so that no one waits for a GPU.
    """
    key = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([mesh.device] if mesh.device.type == "cuda" else []):
        torch.manual_seed(stable_seed(key, mesh.tp_rank))
        yield


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
