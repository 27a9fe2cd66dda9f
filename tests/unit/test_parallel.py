"""What start sets up, on one rank; on more: tests/distributed/test_tensor_parallel.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_pipeline.config import UserError
from trainer.config import ParallelConfig
from trainer.parallel import Mesh, channel, mpu, stable_seed, start
from trainer.world import World


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
    import deepspeed.comm.comm

    assert mesh.device.type != "cpu" or deepspeed.comm.comm.cdb.shm_comm_op is None


def test_a_world_that_tp_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.tp=2 does not divide the 3 ranks"):
        start(World(rank=0, world_size=3, local_rank=0), ParallelConfig(name="tp2", tp=2))


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"LOCAL_RANK=2, but there are 2 GPUs: start one rank for each"):
        start(World(rank=2, world_size=4, local_rank=2), ParallelConfig(name="one"))


def test_seeds_are_the_same_for_ever_and_for_every_kind_of_integer() -> None:
    assert stable_seed("dropout", 1, 2, 3, 0) == stable_seed("dropout", np.int64(1), 2, 3, 0) == 4822040453858826829
    assert 0 <= stable_seed("x") < 2**63
    assert len({stable_seed(1, 23), stable_seed(12, 3), stable_seed(3, 12), stable_seed("1", "2", "3")}) == 4
