"""All layouts that a run may have, with their memory and speed, and the choice between them. Standard library only.

`parallel=auto` and `micro_batch_size=auto` are settled here, before torch is imported, as the plan's fastest layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from conf.errors import UserError
from data_pipeline.files import GIB
from trainer.config.optim import Kind
from trainer.config.parallel import AUTO, Offload, ParallelConfig, Precision, Recompute
from trainer.config.pretrain import PretrainConfig
from trainer.distributed.world import World
from trainer.model.arithmetic import flops_per_token
from trainer.plan.hardware import CPU, GPUS, Gpu, check_precision, gpu_named, installed_gpu
from trainer.plan.layout import Layout
from trainer.plan.layout_rules import check_layout
from trainer.plan.memory import Memory, memory
from trainer.plan.network import Cluster
from trainer.plan.speed import Step, step_seconds
from trainer.plan.workload import Workload

MAX_TP, MAX_MICRO = 8, 64  # tp beyond a node is never worth its network; larger micro batches gain nothing
FILL = 0.95  # of a device's memory: predictions are within some percent, and a run must not die of them
NETWORK_GBIT = 400.0  # of a node, if nobody says: only the order of layouts depends on it
CPU_SHARE = 0.7  # of the machine's memory that ranks on a CPU may take
LIMITS = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "memory bandwidth",
    "loss": "memory bandwidth",
    "optimizer": "the optimizer's pass over memory",
    "host": "Python between kernels",
    "offload": "the way to the CPU's memory",
    "tp_communication": "links between tp ranks",
    "dp_communication": "links between dp ranks",
}


@dataclass(frozen=True)
class Row:
    """A layout with its memory and speed. `limit`: the largest part of a step's time, or the memory that is missing."""

    layout: Layout
    memory: Memory
    room_gib: float
    step: Step
    tokens_per_s: float
    mfu: float

    @property
    def missing_gib(self) -> float:
        return self.memory.total / GIB - self.room_gib

    @property
    def fits(self) -> bool:
        return self.missing_gib <= 0

    @property
    def limit(self) -> str:
        if not self.fits:
            return f"memory: {self.missing_gib:.1f} GiB too little"
        parts = self.step.parts()
        return LIMITS[max(parts, key=lambda name: parts[name])]


def reckon(work: Workload, layout: Layout, cluster: Cluster) -> Row:
    """Predict the memory and the speed of one layout."""
    step = step_seconds(work, layout, cluster)
    tokens_per_s = work.tokens_per_step / step.total
    peak = cluster.gpu.tflops * 1e12 * layout.world_size
    return Row(
        layout,
        memory(work, layout, cluster.gpu),
        FILL * cluster.gpu.memory_gib,
        step,
        tokens_per_s,
        tokens_per_s * flops_per_token(work.model) / peak,
    )


def rows(cfg: PretrainConfig, cluster: Cluster) -> list[Row]:
    """Every layout that `cfg` leaves open and check_layout accepts, the best first.

    First those that fit, by tokens per second, then the others, by the memory that they lack. Offload is tried if
    nothing else fits, or if the config asks for it.

    Raises:
        UserError: check_layout accepts none, the reason is the first one's; or the GPU has no such products.
    """
    check_precision(cfg.precision, cluster.gpu)
    work = Workload.of(cfg)

    def check(layout: Layout) -> None:
        check_layout(replace(cfg, **layout.settings(cfg.parallel)), cluster.world_size)

    def reckoned(offload: Offload) -> list[Row]:
        windows = cfg.tokens_per_step // cfg.model.n_ctx
        layouts = candidates(cfg.parallel, cfg.micro_batch_size, windows, cluster, offload)
        return [reckon(work, layout, cluster) for layout in accepted(layouts, check, cfg.parallel.tp, cluster)]

    choices = reckoned(Offload.none)
    if cfg.parallel.offload is None and cluster.gpu.name != CPU and not any(row.fits for row in choices):
        with suppress(UserError):  # Muon takes no offload: the rows stay as they are, and `way_out` says what helps
            choices += reckoned(Offload.cpu)
    return sorted(choices, key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    layout = row.layout
    simplest = (layout.tp, layout.zero_stage, row.memory.total, layout.micro_batch_size)
    return (not row.fits, -row.tokens_per_s if row.fits else row.missing_gib, *simplest)


def accepted(
    layouts: Iterable[Layout], check: Callable[[Layout], None], tp: int | None, cluster: Cluster
) -> list[Layout]:
    """The layouts that `check` accepts. Raises UserError with the first one's reason if it accepts none."""
    refused: UserError | None = None
    kept = []
    for layout in layouts:
        try:
            check(layout)
        except UserError as e:
            refused = refused or e
        else:
            kept.append(layout)
    if not kept:
        raise refused or UserError(
            f"parallel.tp={tp} does not divide the {cluster.gpus_per_node} GPUs of a node: tp ranks share "
            "a node; give parallel.tp that divides them, or null"
        )
    return kept


def candidates(
    pinned: ParallelConfig, micro_batch_size: int | str, windows: int, cluster: Cluster, offload: Offload
) -> Iterator[Layout]:
    """Layouts with everything that `pinned` and `micro_batch_size` leave open, for `windows` windows a step.

    tp divides a node, sequence parallelism goes with tp > 1, and micro batches divide a rank's windows.
    """
    tps = range(1, MAX_TP + 1) if pinned.tp is None else [pinned.tp]
    for tp in (tp for tp in tps if cluster.gpus_per_node % tp == 0):
        dp = cluster.world_size // tp
        sizes = micro_batches(windows // dp) if micro_batch_size == AUTO else [int(micro_batch_size)]
        split = tp > 1 and pinned.sequence_parallel in (None, True)
        for stage in [1, 2, 3] if pinned.zero_stage is None else [pinned.zero_stage]:
            for recompute in list(Recompute) if pinned.recompute is None else [pinned.recompute]:
                for size in sizes:
                    yield Layout(dp, tp, split, stage, recompute, pinned.offload or offload, size)


def micro_batches(windows: int) -> list[int]:
    """Divisors of a rank's windows; [1] if the rank has none, so that check_layout says why."""
    return [n for n in range(1, min(windows, MAX_MICRO) + 1) if windows % n == 0] or [1]


def way_out(row: Row, work: Workload, pinned: ParallelConfig, micro_batch_size: int | str, cluster: Cluster) -> str:
    """One line for the nearest layout, which does not fit: the missing memory and the settings that would save some."""
    parts = row.memory.gib()
    parts.pop("host")
    total = parts.pop("total")
    largest = max(parts, key=lambda name: parts[name])
    knobs = _pinned_knobs(row.layout, work, pinned, micro_batch_size, cluster)
    knobs += ["more GPUs", "GPUs with more memory", "a smaller model.n_ctx"]
    return (
        f"{work.model.name} does not fit on {cluster.world_size} x {cluster.gpu.name} ({row.room_gib:.1f} GiB to fill)"
        f": the nearest layout ({row.layout}) takes {total:.1f} GiB a rank, {row.missing_gib:.1f} too many, most of it "
        f"{largest} ({parts[largest]:.1f}); what helps: {', '.join(knobs)}"
    )


def _pinned_knobs(
    layout: Layout, work: Workload, pinned: ParallelConfig, micro_batch_size: int | str, cluster: Cluster
) -> list[str]:
    """Settings that the config pins and that could be set otherwise, with less memory; the plan turned the others."""
    muon = work.optimizer is Kind.muon
    knobs = []
    if muon and cluster.gpu.name != CPU:
        knobs.append("optim.kind=adamw with parallel.offload=cpu")
    elif pinned.offload is Offload.none and cluster.gpu.name != CPU:
        knobs.append("parallel.offload=cpu")
    if pinned.recompute not in (None, Recompute.full):
        knobs.append("parallel.recompute=full")
    if micro_batch_size not in (AUTO, 1):
        knobs.append("micro_batch_size=1")
    if pinned.zero_stage in (1, 2) and layout.dp > 1:
        knobs.append("parallel.zero_stage=3")
    may_split = not muon and work.precision is not Precision.fp8
    if may_split and pinned.tp is not None and pinned.tp < min(MAX_TP, cluster.gpus_per_node):
        knobs.append("a larger parallel.tp")
    return knobs


def is_open(parallel: ParallelConfig, micro_batch_size: int | str) -> bool:
    """Return True if the plan has something to choose."""
    values = (parallel.tp, parallel.sequence_parallel, parallel.zero_stage, parallel.recompute, parallel.offload)
    return micro_batch_size == AUTO or None in values


def settle(cfg: PretrainConfig, world: World) -> tuple[PretrainConfig, str]:
    """The config with nothing left open and one line about the choice; (cfg, "") if nothing was open.

    It depends on the number of ranks, the config and the GPU's model alone, so every rank makes the same choice.

    Raises:
        UserError: nothing fits, or the GPU is unknown.
    """
    if not is_open(cfg.parallel, cfg.micro_batch_size):
        return cfg, ""
    cluster = cluster_of(cfg.gpu, world)
    best = rows(cfg, cluster)[0]
    if not best.fits:
        raise UserError(way_out(best, Workload.of(cfg), cfg.parallel, cfg.micro_batch_size, cluster))
    return replace(cfg, **best.layout.settings(cfg.parallel)), (
        f"the plan's choice for {cluster.world_size} x {cluster.gpu.name}: {best.layout} "
        f"({best.memory.total / GIB:.1f} of {best.room_gib:.1f} GiB a rank, about {best.tokens_per_s:,.0f} tokens/s)"
    )


def cluster_of(gpu_name: str | None, world: World) -> Cluster:
    """The ranks of this run as the plan's cluster. Without a local world size all ranks share one node."""
    local = world.local_world_size or world.world_size
    gpu = gpu_named(gpu_name, "gpu") if gpu_name else installed_gpu()
    if gpu is None or gpu.name == CPU:
        gpu = _cpu(local)
    return Cluster(max(1, world.world_size // local), local, gpu, NETWORK_GBIT)


def _cpu(ranks: int) -> Gpu:
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return replace(GPUS[CPU], memory_gib=CPU_SHARE * ram / GIB / ranks)


def resumed(layout: dict[str, Any]) -> str:
    """The addition to the choice's line for a resumed run: the layout that its last checkpoint was written on."""
    if not layout:
        return ""
    return f"; its last checkpoint was written on dp={layout['dp']} tp={layout['tp']} ZeRO-{layout['zero_stage']}"
