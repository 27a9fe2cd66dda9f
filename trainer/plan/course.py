"""The steps of a whole run, part by part, and how the speed scales with GPUs. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from conf.errors import UserError
from data_pipeline.config import DataConfig, RampConfig
from data_pipeline.order.geometry import ladder, micro_batch_at
from trainer.config.pretrain import PretrainConfig
from trainer.plan.choose import Row, rows
from trainer.plan.layout import Layout
from trainer.plan.network import Cluster
from trainer.plan.speed import step_seconds
from trainer.plan.workload import Workload

MAX_GPUS = 512  # of the scaling curves


@dataclass(frozen=True)
class Part:
    """So many steps in a row, each of `windows` windows of `n_ctx` tokens."""

    steps: int
    windows: int
    n_ctx: int

    @property
    def tokens(self) -> int:
        return self.steps * self.windows * self.n_ctx


def course(
    data: DataConfig, *, n_ctx: int, tokens_per_step: int, ramp: RampConfig, max_steps: int, tokens: int | None = None
) -> list[Part]:
    """The parts of a run: to `tokens`, its last step whole, or to `max_steps` if they are None.

    Raises:
        UserError: a batch that lanes do not divide, or a ramp that starts below one window for each lane.
    """
    parts: list[Part] = []
    done = 0
    for rung in ladder(data, n_ctx=n_ctx, tokens_per_step=tokens_per_step, ramp=ramp):
        windows, length = rung.windows_per_step, rung.n_ctx
        left = max_steps - rung.step if tokens is None else -(-(tokens - done) // (windows * length))
        part = Part(left if rung.end is None else min(left, rung.end - rung.step), windows, length)
        if part.steps <= 0:
            break
        parts.append(part)
        done += part.tokens
    return parts


def seconds(work: Workload, layout: Layout, cluster: Cluster, parts: Sequence[Part]) -> float:
    """Seconds of the whole run. As in a run, a smaller batch has a smaller micro batch if that does not divide it."""
    total = 0.0
    for part in parts:
        size = micro_batch_at(part.windows // layout.dp, layout.micro_batch_size)
        model = replace(work.model, n_ctx=part.n_ctx)
        step = replace(work, model=model, tokens_per_step=part.windows * part.n_ctx)
        total += part.steps * step_seconds(step, replace(layout, micro_batch_size=size), cluster).total
    return total


def curves(cfg: PretrainConfig, cluster: Cluster) -> dict[str, list[dict[str, Any]]]:
    """The best layout that fits, for each number of GPUs to MAX_GPUS: a simulation.

    `strong`: tokens_per_step stays, until it cannot be divided further; `weak`: each GPU keeps its share of it.
    data.lanes is that of a new run: a step's windows.
    """
    share = max(cfg.model.n_ctx, cfg.tokens_per_step // cluster.world_size)
    points: dict[str, list[dict[str, Any]]] = {"strong": [], "weak": []}
    for gpus in gpu_counts(cluster.gpus_per_node):
        local = min(gpus, cluster.gpus_per_node)
        nodes = replace(cluster, nodes=gpus // local, gpus_per_node=local)
        for kind, tokens in (("strong", cfg.tokens_per_step), ("weak", share * gpus)):
            data = replace(cfg.data, lanes=max(1, tokens // cfg.model.n_ctx), stages=[])
            try:
                best = rows(replace(cfg, data=data, tokens_per_step=tokens), nodes)[0]
            except UserError:  # nothing divides
                continue
            if best.fits:
                points[kind].append(_point(best, tokens))
    return points


def gpu_counts(gpus_per_node: int) -> list[int]:
    """Powers of two within a node, then whole nodes, doubling."""
    inside = [1 << i for i in range(gpus_per_node.bit_length()) if 1 << i < gpus_per_node]
    nodes = [gpus_per_node << i for i in range(MAX_GPUS.bit_length())]
    return [*inside, *(n for n in nodes if n <= MAX_GPUS)]


def _point(row: Row, tokens: int) -> dict[str, Any]:
    return {
        "gpus": row.layout.world_size,
        "tokens_per_step": tokens,
        "tokens_per_s": round(row.tokens_per_s),
        "mfu": round(row.mfu, 4),
        "communication": round((row.step.tp_communication + row.step.dp_communication) / row.step.total, 4),
        "layout": str(row.layout),
    }
