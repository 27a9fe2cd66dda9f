"""What start sets up, on one rank; on more: tests/distributed/trainer/model/test_tensor_parallel.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conf.errors import TransientError, UserError
from trainer.config.parallel import ParallelConfig
from trainer.data.channel import channel
from trainer.distributed.lost_ranks import ranks_lost
from trainer.distributed.mesh import Mesh, device_of, gpu_index, join_ranks
from trainer.distributed.seeds import stable_seed
from trainer.distributed.world import World
from trainer.engine.deepspeed_api import connect, deepspeed_comm, mpu


def test_one_rank_is_the_whole_mesh(mesh: Mesh) -> None:
    assert (mesh.dp_rank, mesh.dp, mesh.tp_rank, mesh.tp) == (0, 1, 0, 1)
    assert dist.get_world_size(mesh.dp_group) == dist.get_world_size(mesh.tp_group) == 1
    assert channel(mesh) is None


def test_deepspeed_gets_an_answer_to_each_of_its_questions(mesh: Mesh) -> None:
    unit = mpu(mesh)
    for word, group in [("data", mesh.dp_group), ("model", mesh.tp_group), ("tensor_model", mesh.tp_group)]:
        assert getattr(unit, f"get_{word}_parallel_group")() is group
        assert getattr(unit, f"get_{word}_parallel_world_size")() == 1
        assert getattr(unit, f"get_{word}_parallel_rank")() == 0
    assert unit.get_tensor_model_parallel_src_rank() == unit.get_pipeline_model_parallel_rank() == 0
    assert unit.get_pipeline_model_parallel_world_size() == 1


def test_no_cpp_is_compiled_at_the_start(mesh: Mesh) -> None:
    connect(mesh)
    assert mesh.device.type != "cpu" or deepspeed_comm.cdb.shm_comm_op is None


def test_a_world_that_tp_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.tp=2 does not divide the 3 ranks"):
        join_ranks(World(rank=0, world_size=3, local_rank=0), ParallelConfig(name="tp2", tp=2))


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"LOCAL_RANK=2, but there are 2 GPUs: start one rank for each"):
        join_ranks(World(rank=2, world_size=4, local_rank=2), ParallelConfig(name="one"))


def test_a_rank_that_sees_one_gpu_takes_number_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's --gpus-per-task shows each rank its own GPU alone, whatever its LOCAL_RANK."""
    for visible, count, index in (
        ("3", 1, 0),
        ("GPU-8f2a", 1, 0),
        ("0,1", 2, 1),
        ("0", 1, 0),
        ("", 1, None),
        ("-1", 0, None),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert gpu_index(World(rank=1, world_size=2, local_rank=1)) == index, visible


def test_a_machine_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_of(World(rank=0, world_size=1, local_rank=0)) == torch.device("cpu")


def test_seeds_never_change_and_ignore_the_kind_of_integer() -> None:
    assert stable_seed("dropout", 1, 2, 3, 0) == stable_seed("dropout", np.int64(1), 2, 3, 0) == 4822040453858826829
    assert 0 <= stable_seed("x") < 2**63
    assert len({stable_seed(1, 23), stable_seed(12, 3), stable_seed(3, 12), stable_seed("1", "2", "3")}) == 4


PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, {}, NCCL version 2.27.5\n{}"
GONE = "lost the connection to another rank"
SILENT = "waited for the other ranks for watch.collective_s=20 s"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError(PAIR + "Connection closed by peer [127.0.0.1]:62373. This is typically caused by a"), GONE),
        (RuntimeError(PAIR + "Read error [10.0.0.2]:23949: Connection reset by peer. This is typically"), GONE),
        (RuntimeError(PAIR + "Application timeout caused pair closure"), GONE),
        (RuntimeError(PAIR + "Read error [10.0.0.2]:23949: No route to host"), GONE),
        (RuntimeError("[unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation to complete"), SILENT),
        (dist.DistNetworkError("Broken pipe"), GONE),
        (dist.DistNetworkError("The client socket has failed to connect to any network address of (n1, 29500)."), GONE),
        (dist.DistNetworkError("The client socket has timed out after 8000ms while trying to connect to (n1"), SILENT),
        (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote"), GONE),
        (dist.DistStoreError("Timed out after 21 seconds waiting for clients. 1/2 clients joined."), SILENT),
        (dist.DistStoreError("wait timeout after 20000ms, keys: /default_pg/0//cpu//0/0"), SILENT),
        (
            dist.DistBackendError(
                NCCL.format("remote process exited or there was a network error", "ncclRemoteError: A call failed")
            ),
            GONE,
        ),
        (
            dist.DistBackendError(
                NCCL.format("unhandled system error", "Last error:\nConnect to n1<4> failed : Connection refused")
            ),
            GONE,
        ),
        (
            dist.DistBackendError(
                "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE, "
                "Timeout(ms)=20000) ran for 20011 milliseconds before timing out."
            ),
            SILENT,
        ),
        (
            RuntimeError(
                "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:456] op.preamble.length <= "
                "op.nbytes. 100000 vs 4. Received data size doesn't match expected size."
            ),
            None,
        ),
        (
            dist.DistBackendError(
                NCCL.format(
                    "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
                    "ncclUnhandledCudaError: Call to CUDA function failed. Last error: Cuda failure 2 'out of memory'",
                )
            ),
            None,
        ),
        (
            dist.DistBackendError(
                NCCL.format(
                    "invalid usage (run with NCCL_DEBUG=WARN for details)",
                    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
                    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
                )
            ),
            None,
        ),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), None),
        (
            dist.DistNetworkError("The server socket has failed to listen on any address: EADDRINUSE"),
            None,
        ),
        (RuntimeError("No backend type associated with device type cpu: use gloo"), None),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), None),
    ],
)
def test_ranks_that_are_gone_or_silent_are_one_line(error: Exception, told: str | None) -> None:
    """Any other error keeps its traceback."""
    with pytest.raises(TransientError if told else type(error)) as caught, ranks_lost(World(1, 2, 1), 20):
        raise error
    if told:
        assert told in str(caught.value) and " ".join(str(error).split())[:60] in str(caught.value)
    else:
        assert caught.value is error
