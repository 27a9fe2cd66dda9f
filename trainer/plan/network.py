"""Seconds of collectives over stated links: rings, and a latency for each hop of a tree. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config.parallel import Offload, Recompute
from trainer.plan.hardware import Gpu
from trainer.plan.layout import Layout, local_params
from trainer.plan.workload import Workload

LINK_SHARE = 0.8  # of a link's stated rate that a long collective reaches; an assumption
HOP_S = 10e-6  # start and latency of one hop; an assumption


@dataclass(frozen=True)
class Cluster:
    """Equal nodes. `network_gbit`: the rate of one node, all its adapters together, in one direction."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    network_gbit: float

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


def all_reduce(size: float, ranks: int, bytes_s: float) -> float:
    """Seconds for `size` bytes: each rank sends 2 (n - 1) / n of them round a ring (Patarasuk and Yuan 2009)."""
    return 2 * gather(size, ranks, bytes_s)


def gather(size: float, ranks: int, bytes_s: float) -> float:
    """Seconds of an all-gather or reduce-scatter of `size` bytes in total: half an all-reduce."""
    if ranks == 1:
        return 0.0
    return (ranks - 1) / ranks * size / bytes_s + HOP_S * math.ceil(math.log2(ranks))


def tp_rate(cluster: Cluster) -> float:
    """Bytes per second between tp ranks, which share a node."""
    return LINK_SHARE * cluster.gpu.link_gb_s * 1e9


def dp_rate(cluster: Cluster, layout: Layout) -> float:
    """Bytes per second of one dp ring: the node's links, or its part of the network, which a node's tp rings share."""
    if layout.world_size <= cluster.gpus_per_node:
        return tp_rate(cluster)
    network = cluster.network_gbit / 8 * 1e9 / min(layout.tp, cluster.gpus_per_node)
    return LINK_SHARE * min(network, cluster.gpu.link_gb_s * 1e9)


def dp_seconds(work: Workload, layout: Layout, cluster: Cluster, micro_steps: int) -> float:
    """Seconds of one step between dp ranks, hidden or not: gradients in fp32, weights in the model's type.

    ZeRO-1 scatters sums of gradients once a step (flat_zero1.py) and gathers the new weights. Otherwise DeepSpeed
    0.19.8 sends: ZeRO-1 with offload an all-reduce, of which a rank keeps its part; ZeRO-2 the same in each micro step;
    ZeRO-3 gathers the weights for forward and for backward, and scatters sums.
    """
    p, rate, dp = local_params(work.model, layout.tp), dp_rate(cluster, layout), layout.dp
    sums, weights = all_reduce(4 * p, dp, rate), gather(work.element_bytes * p, dp, rate)
    if layout.zero_stage == 1:
        return (gather(4 * p, dp, rate) if layout.offload is Offload.none else sums) + weights
    if layout.zero_stage == 2:
        return micro_steps * sums + weights
    return micro_steps * (2 * weights + gather(4 * p, dp, rate))


def tp_seconds(work: Workload, layout: Layout, cluster: Cluster) -> float:
    """Seconds of one micro step between tp ranks.

    Each layer sums two outputs in forward and two input gradients in backward, the vocabulary's layers one each; full
    recompute sums the two outputs again. Sequence parallelism sends the same bytes as scatter and gather, and gathers
    two inputs again.
    """
    if layout.tp == 1:
        return 0.0
    size = layout.micro_batch_size * work.model.n_ctx * work.model.n_embd * work.element_bytes
    rate = tp_rate(cluster)
    layers = work.model.n_layer * (6 if layout.recompute is Recompute.full else 4) + 2
    again = work.model.n_layer * 2 + 1 if layout.sequence_parallel else 0
    return layers * all_reduce(size, layout.tp, rate) + again * gather(size, layout.tp, rate)
