"""Weak and strong scaling to 512 GPUs, by the same reckoning. A simulation. Standard library only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from conf.errors import UserError
from trainer.config.pretrain import PretrainConfig
from trainer.plan.choose import Row, rows
from trainer.plan.network import Cluster

MOST_GPUS = 512


def curves(cfg: PretrainConfig, cluster: Cluster) -> dict[str, list[dict[str, Any]]]:
    """For each number of GPUs the best layout that fits. `strong`: tokens_per_step stays, until it cannot be divided
    further; `weak`: each GPU keeps its share of it. data.lanes is what a new run would be given: a step's windows."""
    share = max(cfg.model.n_ctx, cfg.tokens_per_step // cluster.world_size)
    found: dict[str, list[dict[str, Any]]] = {"strong": [], "weak": []}
    for gpus in sizes(cluster.gpus_per_node):
        local = min(gpus, cluster.gpus_per_node)
        here = replace(cluster, nodes=gpus // local, gpus_per_node=local)
        for kind, tokens in (("strong", cfg.tokens_per_step), ("weak", share * gpus)):
            best = _best(cfg, here, tokens)
            if best is not None:
                found[kind].append(_point(best, tokens))
    return found


def sizes(gpus_per_node: int) -> list[int]:
    """Powers of two within a node, then whole nodes, doubling."""
    inside = [1 << i for i in range(gpus_per_node.bit_length()) if 1 << i < gpus_per_node]
    nodes = [gpus_per_node << i for i in range(MOST_GPUS.bit_length())]
    return [*inside, *(n for n in nodes if n <= MOST_GPUS)]


def _best(cfg: PretrainConfig, cluster: Cluster, tokens: int) -> Row | None:
    data = replace(cfg.data, lanes=max(1, tokens // cfg.model.n_ctx), stages=[])
    try:
        best = rows(replace(cfg, data=data, tokens_per_step=tokens), cluster)[0]
    except UserError:  # nothing divides
        return None
    return best if best.fits else None


def _point(row: Row, tokens: int) -> dict[str, Any]:
    return {
        "gpus": row.layout.world_size,
        "tokens_per_step": tokens,
        "tokens_per_s": round(row.tokens_per_s),
        "mfu": round(row.mfu, 4),
        "communication": round((row.step.tp_communication + row.step.dp_communication) / row.step.total, 4),
        "layout": str(row.layout),
    }
