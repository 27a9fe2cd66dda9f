"""`parallel=auto` and `micro_batch_size=auto`: settled before torch is imported, by what the plan says is fastest."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from conf.errors import UserError
from data_pipeline.files import GIB
from trainer.config.parallel import AUTO
from trainer.config.pretrain import PretrainConfig
from trainer.distributed.world import World
from trainer.plan.choose import rows, way_out
from trainer.plan.hardware import CPU, GPUS, Gpu, gpu_named, installed_gpu
from trainer.plan.network import Cluster

NETWORK_GBIT = 400.0  # of a node, where nobody says: only the order of layouts depends on it
CPU_SHARE = 0.7  # of the machine's memory that ranks on a CPU may take


def is_open(cfg: PretrainConfig) -> bool:
    """Whether the plan has something to choose."""
    p = cfg.parallel
    left = (p.tp, p.sequence_parallel, p.zero_stage, p.recompute, p.offload)
    return cfg.micro_batch_size == AUTO or any(value is None for value in left)


def settle(cfg: PretrainConfig, world: World) -> tuple[PretrainConfig, str]:
    """The config with nothing left open, and one line on what was chosen; as it is, and "", where nothing was open.

    It depends on the number of ranks, the config and the GPU's model alone, so that every rank comes to the same.

    Raises:
        UserError: nothing fits, or the GPU is unknown.
    """
    if not is_open(cfg):
        return cfg, ""
    cluster = cluster_of(cfg, world)
    best = rows(cfg, cluster)[0]
    if not best.fits:
        raise UserError(way_out(best, cfg, cluster))
    return best.layout.config(cfg), (
        f"the plan's choice for {cluster.world_size} x {cluster.gpu.name}: {best.layout} "
        f"({best.memory.total / GIB:.1f} of {best.room_gib:.1f} GiB a rank, about {best.tokens_per_s:,.0f} tokens/s)"
    )


def cluster_of(cfg: PretrainConfig, world: World) -> Cluster:
    """The ranks of this run as the plan's cluster. Where nobody says how many share a node, all do."""
    local = world.local_world_size or world.world_size
    gpu = gpu_named(cfg.gpu, "gpu") if cfg.gpu else installed_gpu()
    if gpu is None or gpu.name == CPU:
        gpu = _cpu(local)
    return Cluster(max(1, world.world_size // local), local, gpu, NETWORK_GBIT)


def _cpu(local: int) -> Gpu:
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return replace(GPUS[CPU], memory_gib=CPU_SHARE * ram / GIB / local)


def resumed(layout: dict[str, Any]) -> str:
    """What to add for a run that goes on: the layout that its last checkpoint was written on."""
    if not layout:
        return ""
    return f"; its last checkpoint was written on dp={layout['dp']} tp={layout['tp']} ZeRO-{layout['zero_stage']}"
