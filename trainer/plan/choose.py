"""All layouts that a run may have, each reckoned, and the best. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from conf.errors import UserError
from data_pipeline.files import GIB
from trainer.config.optim import Kind
from trainer.config.parallel import AUTO, Offload, Precision, Recompute
from trainer.config.pretrain import PretrainConfig
from trainer.model.arithmetic import flops_per_token
from trainer.plan.hardware import CPU, check_precision
from trainer.plan.layout import Layout
from trainer.plan.layout_rules import check_layout
from trainer.plan.memory import Memory, memory
from trainer.plan.network import Cluster
from trainer.plan.speed import Step, step_seconds

MOST_TP, MOST_MICRO = 8, 64  # tp beyond a node is never worth its network; larger micro batches gain nothing
FILL = 0.95  # of a device's memory: predictions are within some percent, and a run must not die of them
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
    """A layout and what it comes to. `limit`: the largest part of a step's time, or what it lacks to fit."""

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


def reckon(cfg: PretrainConfig, layout: Layout, cluster: Cluster) -> Row:
    step = step_seconds(cfg, layout, cluster)
    tokens_per_s = cfg.tokens_per_step / step.total
    peak = cluster.gpu.tflops * 1e12 * layout.world_size
    return Row(
        layout,
        memory(cfg, layout, cluster.gpu),
        FILL * cluster.gpu.memory_gib,
        step,
        tokens_per_s,
        tokens_per_s * flops_per_token(cfg.model) / peak,
    )


def rows(cfg: PretrainConfig, cluster: Cluster) -> list[Row]:
    """Every layout that `cfg` leaves open and check_layout accepts, the best first: those that fit by tokens a second,
    then those that do not by what they lack. Offload is tried where nothing else fits, or where it is asked for.

    Raises:
        UserError: check_layout accepts none, the reason is the first one's; or the GPU has no such products.
    """
    check_precision(cfg.precision, cluster.gpu)
    found = [reckon(cfg, layout, cluster) for layout in accepted(cfg, cluster, Offload.none)]
    if cfg.parallel.offload is None and cluster.gpu.name != CPU and not any(row.fits for row in found):
        with suppress(UserError):  # Muon takes no offload: what is found stands, and `way_out` says what helps
            found += [reckon(cfg, layout, cluster) for layout in accepted(cfg, cluster, Offload.cpu)]
    return sorted(found, key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    layout = row.layout
    simplest = (layout.tp, layout.zero_stage, row.memory.total, layout.micro_batch_size)
    return (not row.fits, -row.tokens_per_s if row.fits else row.missing_gib, *simplest)


def accepted(cfg: PretrainConfig, cluster: Cluster, offload: Offload) -> list[Layout]:
    refused: UserError | None = None
    found = []
    for layout in candidates(cfg, cluster, offload):
        try:
            check_layout(layout.config(cfg), cluster.world_size)
        except UserError as e:
            refused = refused or e
        else:
            found.append(layout)
    if not found:
        raise refused or UserError(
            f"parallel.tp={cfg.parallel.tp} does not divide the {cluster.gpus_per_node} GPUs of a node: tp ranks share "
            "a node; give parallel.tp that divides them, or null"
        )
    return found


def candidates(cfg: PretrainConfig, cluster: Cluster, offload: Offload) -> Iterator[Layout]:
    """What is pinned stays. tp divides a node; sequence parallelism goes with tp > 1; micro batches divide a rank's
    windows, or the one that is given."""
    p = cfg.parallel
    tps = [t for t in range(1, MOST_TP + 1) if cluster.gpus_per_node % t == 0] if p.tp is None else [p.tp]
    for tp in tps:
        if cluster.gpus_per_node % tp:
            continue
        dp = cluster.world_size // tp
        sizes = [cfg.micro_batch_size] if cfg.micro_batch_size != AUTO else micro_batches(cfg, dp)
        split = tp > 1 if p.sequence_parallel is None else p.sequence_parallel
        for stage in [1, 2, 3] if p.zero_stage is None else [p.zero_stage]:
            for recompute in list(Recompute) if p.recompute is None else [p.recompute]:
                for size in sizes:
                    yield Layout(dp, tp, split and tp > 1, stage, recompute, p.offload or offload, size)


def micro_batches(cfg: PretrainConfig, dp: int) -> list[int]:
    """Divisors of a rank's windows; 1 where the batch does not divide, so that check_layout says why."""
    windows = cfg.tokens_per_step // cfg.model.n_ctx // dp
    return [n for n in range(1, min(windows, MOST_MICRO) + 1) if windows % n == 0] or [1]


def way_out(row: Row, cfg: PretrainConfig, cluster: Cluster) -> str:
    """One line for the nearest layout, which does not fit: how much is missing, and what would help: of the knobs those
    that the config pins, the others were turned already."""
    parts = row.memory.gib()
    parts.pop("host")
    total = parts.pop("total")
    largest = max(parts, key=lambda name: parts[name])
    knobs = pinned_knobs(row, cfg, cluster)
    knobs += ["more GPUs", "GPUs with more memory", "a smaller model.n_ctx"]
    return (
        f"{cfg.model.name} does not fit on {cluster.world_size} x {cluster.gpu.name} ({row.room_gib:.1f} GiB to fill): "
        f"the nearest layout ({row.layout}) takes {total:.1f} GiB a rank, {row.missing_gib:.1f} too many, most of it "
        f"{largest} ({parts[largest]:.1f}); what helps: {', '.join(knobs)}"
    )


def pinned_knobs(row: Row, cfg: PretrainConfig, cluster: Cluster) -> list[str]:
    """What the config pins and a run could be given otherwise, with less memory."""
    p, muon = cfg.parallel, cfg.optim.kind is Kind.muon
    whole = muon or cfg.precision is Precision.fp8  # tp = 1 alone
    knobs = []
    if muon and cluster.gpu.name != CPU:
        knobs.append("optim.kind=adamw with parallel.offload=cpu")
    elif p.offload is Offload.none and cluster.gpu.name != CPU:
        knobs.append("parallel.offload=cpu")
    if p.recompute not in (None, Recompute.full):
        knobs.append("parallel.recompute=full")
    if cfg.micro_batch_size not in (AUTO, 1):
        knobs.append("micro_batch_size=1")
    if p.zero_stage in (1, 2) and row.layout.dp > 1:
        knobs.append("parallel.zero_stage=3")
    if p.tp is not None and p.tp < min(MOST_TP, cluster.gpus_per_node) and not whole:
        knobs.append("a larger parallel.tp")
    return knobs
