"""Entry: `python -m launch.plan model=gpt2_xl cluster.nodes=4 cluster.gpu=h100_80gb data.tokens=9_000_000_000`.

A table of the layouts that fit, fastest first, with what limits each; the best one's memory and time part by part; why
others do not fit. No torch: it answers in under a second on a login node. docs/plan.md says how it reckons.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import run
from data_pipeline.files import publish
from launch.cluster_config import ClusterConfig
from launch.config import PlanConfig
from trainer.config.parallel import Offload
from trainer.model.arithmetic import padded_n_head, param_count
from trainer.plan.choose import Row, rows, way_out
from trainer.plan.course import Part, course, curves, seconds
from trainer.plan.hardware import gpu_named
from trainer.plan.network import Cluster
from trainer.plan.workload import Workload
from trainer.tracking.plots import check_picture

SHOWN, REFUSED = 10, 4  # rows of the choices, and of those that do not fit


def plan(cfg: PlanConfig) -> None:
    if cfg.plot is not None:
        check_picture(Path(cfg.plot), "plot")
    cluster, price = cluster_of(cfg.cluster)
    run = Run(cfg, cluster, price, parts_of(cfg))
    choices = rows(cfg, cluster)
    scaling = None
    if cfg.plot is not None:
        scaling = curves(cfg, cluster)
        from launch.plan_plot import draw  # matplotlib, a second to import

        publish(Path(cfg.plot), draw(scaling, cfg.model.name, cluster))
    if cfg.json:
        result = {"layouts": [as_json(row, run) for row in choices], **facts(run)}
        if scaling is not None:
            result["scaling"] = scaling
        print(json.dumps(result))
    else:
        print("\n".join(report(run, choices)))
        if cfg.plot is not None:
            print(f"drawn: {cfg.plot}")
    if not choices[0].fits:
        raise UserError(way_out(choices[0], Workload.of(cfg), cfg.parallel, cfg.micro_batch_size, cluster))


def parts_of(cfg: PlanConfig) -> list[Part]:
    """The parts of the planned run: to `data.tokens`, or to `max_steps` without them."""
    return course(
        cfg.data,
        n_ctx=cfg.model.n_ctx,
        tokens_per_step=cfg.tokens_per_step,
        ramp=cfg.batch_ramp,
        max_steps=cfg.max_steps,
        tokens=cfg.data.tokens,
    )


def cluster_of(cfg: ClusterConfig) -> tuple[Cluster, float]:
    """The cluster, and USD for a GPU and hour. Raises UserError if no row of the choices has that name."""
    gpu = gpu_named(cfg.gpu)
    if cfg.memory_gib is not None:
        gpu = replace(gpu, memory_gib=cfg.memory_gib)
    price = gpu.price if cfg.price_per_gpu_hour is None else cfg.price_per_gpu_hour
    return Cluster(cfg.nodes, cfg.gpus_per_node, gpu, cfg.network_gbit), price


@dataclass(frozen=True)
class Run:
    """A run to plan, at `price` USD for a GPU and hour."""

    cfg: PlanConfig
    cluster: Cluster
    price: float
    parts: list[Part]

    @property
    def tokens(self) -> int:
        return self.cfg.data.tokens or sum(part.tokens for part in self.parts)

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self.parts)

    def days(self, row: Row) -> float:
        return seconds(Workload.of(self.cfg), row.layout, self.cluster, self.parts) / 86400

    def cost(self, row: Row) -> float:
        """The cost in USD."""
        return self.days(row) * 24 * row.layout.world_size * self.price


def as_json(row: Row, run: Run) -> dict[str, Any]:
    layout, cfg = row.layout, run.cfg
    heads = padded_n_head(cfg.model.n_head, layout.tp)
    return {
        "dp": layout.dp,
        "tp": layout.tp,
        "sequence_parallel": layout.sequence_parallel,
        "zero_stage": layout.zero_stage,
        "recompute": layout.recompute.value,
        "offload": layout.offload.value,
        "micro_batch_size": layout.micro_batch_size,
        "grad_accum_steps": cfg.tokens_per_step // (cfg.model.n_ctx * layout.micro_batch_size * layout.dp),
        "padded_heads": heads - cfg.model.n_head,
        "fits": row.fits,
        "memory_gib": row.memory.gib(),
        "step_s": {**{name: round(s, 5) for name, s in row.step.parts().items()}, "total": round(row.step.total, 5)},
        "tokens_per_s": round(row.tokens_per_s),
        "mfu": round(row.mfu, 4),
        "days": run.days(row),
        "cost": run.cost(row),
        "limit": row.limit,
    }


def facts(run: Run) -> dict[str, Any]:
    cfg, cluster, gpu = run.cfg, run.cluster, run.cluster.gpu
    return {
        "model": cfg.model.name,
        "parameters": param_count(cfg.model),
        "tokens": run.tokens,
        "steps": run.steps,
        "tokens_per_step": cfg.tokens_per_step,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "gpu": gpu.name,
        "gpu_memory_gib": gpu.memory_gib,
        "link_gb_s": gpu.link_gb_s,
        "network_gbit": cluster.network_gbit,
        "price_per_gpu_hour": run.price,
        "simulated": simulated(cluster),
    }


def simulated(cluster: Cluster) -> bool:
    """True if a collective takes part: this project has measured no link between GPUs."""
    return cluster.world_size > 1


def report(run: Run, choices: Sequence[Row]) -> list[str]:
    cfg, cluster, gpu = run.cfg, run.cluster, run.cluster.gpu
    sizes = sorted({part.windows * part.n_ctx for part in run.parts})
    each = f"{sizes[0]:,} a step" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,} a step"
    stated = "yours" if cfg.cluster.price_per_gpu_hour is not None else "assumed, give cluster.price_per_gpu_hour"
    lines = [
        f"{cfg.model.name}: {param_count(cfg.model):,} parameters, {run.tokens:,} tokens in "
        f"{run.steps:,} steps, {each}, {cfg.precision.value}",
        f"{cluster.world_size} x {gpu.name} ({cluster.nodes} x {cluster.gpus_per_node}): {gpu.memory_gib:.1f} GiB, "
        f"{gpu.tflops:g} TFLOP/s, {gpu.hbm_gb_s:g} GB/s, links {gpu.link_gb_s:g} GB/s, network "
        f"{cluster.network_gbit:g} Gbit/s a node, {run.price:g} USD a GPU-hour ({stated})",
    ]
    if simulated(cluster):
        lines.append("a simulation: links are taken at 0.8 of these rates; only one GPU by itself was measured")
    lines += ["", *table(best_of_each(choices), run), ""]
    if choices[0].fits:
        lines += [*detail(choices[0]), *cut(cfg.max_hours, 24 * run.days(choices[0]))]
    return lines


def cut(max_hours: float | None, hours: float) -> list[str]:
    """A line where a run of so many predicted hours comes to its max_hours."""
    if max_hours is None or max_hours >= hours:
        return []
    return [f"  max_hours={max_hours:g}, over all starts, ends it after {max_hours / hours:.0%} of {hours:,.1f} hours"]


def best_of_each(choices: Sequence[Row]) -> list[Row]:
    """The first row of each (tp, ZeRO, recompute, offload): its best micro batch."""
    first: dict[Any, Row] = {}
    for row in choices:
        layout = row.layout
        first.setdefault((layout.tp, layout.zero_stage, layout.recompute, layout.offload), row)
    fit = [row for row in first.values() if row.fits]
    return fit[:SHOWN] + [row for row in first.values() if not row.fits][:REFUSED]


HEAD = ("", "dp", "tp", "ZeRO", "recompute", "micro", "GiB", "tokens/s", "MFU", "days", "USD", "limit")


def table(shown: Sequence[Row], run: Run) -> list[str]:
    body = [HEAD]
    for i, row in enumerate(shown):
        layout = row.layout
        mark = "best" if i == 0 and row.fits else "" if row.fits else "no"
        how = layout.recompute.value + ("+offload" if layout.offload is Offload.cpu else "")
        body.append(
            (
                mark,
                str(layout.dp),
                str(layout.tp),
                str(layout.zero_stage),
                how,
                str(layout.micro_batch_size),
                f"{row.memory.gib()['total']:.1f}",
                f"{row.tokens_per_s:,.0f}",
                f"{100 * row.mfu:.1f}%",
                f"{run.days(row):.2f}",
                f"{run.cost(row):,.0f}",
                row.limit,
            )
        )
    widths = [max(len(line[i]) for line in body) for i in range(len(HEAD))]
    left = (0, 4, 11)
    return [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in (tuple(line) for line in body)
    ]


def detail(row: Row) -> list[str]:
    """Memory and time of a layout, part by part."""
    memory = row.memory.gib()
    host_memory = memory.pop("host")
    total = memory.pop("total")
    step = {name: s for name, s in row.step.parts().items() if s > 0}
    lines = [
        f"the best: {row.layout}",
        f"  memory, GiB a rank: {', '.join(f'{name} {size:.1f}' for name, size in memory.items())}; in all {total:.1f} "
        f"of {row.room_gib:.1f} that a plan fills",
        f"  a step, seconds: {', '.join(f'{name} {s:.3f}' for name, s in step.items())}; in all {row.step.total:.3f}",
        f"  limit: {row.limit}; links take {row.step.tp_communication + row.step.dp_communication:.3f} s of a step",
    ]
    if host_memory:
        lines.append(f"  and {host_memory:.1f} GiB a rank in the CPU's memory")
    return lines


if __name__ == "__main__":
    run(PlanConfig, plan)
