"""The plan, asked by a rank for its own machine: its tensors and the memory that it may take. Standard library only."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from conf.errors import UserError
from data_pipeline.files import GIB
from trainer.config.parallel import Recompute
from trainer.model.arithmetic import param_count
from trainer.plan.layout import Layout
from trainer.plan.memory import snapshot, tensor_memory
from trainer.plan.workload import Workload

CGROUPS = Path("/sys/fs/cgroup")
LIMITS = (  # of a process: how a shell sets them, and which number of /proc/self/statm counts towards them
    (resource.RLIMIT_AS, "ulimit -v", 0),
    (resource.RLIMIT_DATA, "ulimit -d", 5),
)


def check_room(work: Workload, layout: Layout, gpu_bytes: int | None, local_ranks: int) -> None:
    """Ask the plan whether a rank's tensors fit into `gpu_bytes`, or on a CPU (None) into what it may still take.

    Only the tensors are counted, which the plan knows within a percent: what is refused would have died.

    Raises:
        UserError: they do not fit; with the settings that would.
    """

    def need(layout: Layout) -> float:
        tensors = tensor_memory(work, layout, on_gpu=gpu_bytes is not None).total
        return tensors if gpu_bytes is not None else tensors + snapshot(work, layout)

    room, place = min(_host(local_ranks)) if gpu_bytes is None else (gpu_bytes, "its GPU")
    if need(layout) <= room:
        return
    cure = next((text for other, text in _smaller(layout) if need(other) <= room), "more ranks or a smaller model")
    raise UserError(
        f"{describe(work, layout, need(layout))}, and {place} has room for {room / GIB:.1f}: give {cure}; "
        "python -m launch.plan shows every layout"
    )


def describe(work: Workload, layout: Layout, need: float | None = None) -> str:
    """The bytes that a rank's tensors need, in words."""
    if need is None:
        need = tensor_memory(work, layout).total
    name, params = work.model.name, param_count(work.model) / 1e6
    return f"model={name} of {params:,.0f} million parameters needs {need / GIB:.1f} GiB a rank for tensors ({layout})"


def _smaller(layout: Layout) -> Iterator[tuple[Layout, str]]:
    """Layouts with less and less memory, and the settings that make them."""
    settings = ""
    if layout.micro_batch_size > 1:
        layout, settings = replace(layout, micro_batch_size=1), "micro_batch_size=1"
        yield layout, settings
    if layout.recompute is not Recompute.full:
        layout, settings = replace(layout, recompute=Recompute.full), f"{settings} parallel.recompute=full".lstrip()
        yield layout, settings
    if layout.zero_stage < 3 and layout.dp > 1:
        yield replace(layout, zero_stage=3), f"{settings} parallel.zero_stage=3".lstrip()


def _host(ranks: int) -> Iterator[tuple[float, str]]:
    """Bytes that this rank may still take, and what says so: the machine, the limits of its group and its own."""
    page = os.sysconf("SC_PAGE_SIZE")
    yield page * os.sysconf("SC_PHYS_PAGES") / ranks, f"this machine with {ranks} ranks"
    for limit in _group_limits():
        yield limit, "the memory limit of this process's group (of its job or container)"
    taken = Path("/proc/self/statm").read_text(encoding="ascii").split()
    for name, shell, place in LIMITS:
        soft, _ = resource.getrlimit(name)
        if soft != resource.RLIM_INFINITY:
            yield max(0, soft - page * int(taken[place])), f"{shell} {soft // 1024}, after all imports,"


def _group_limits() -> Iterator[int]:
    """The memory limits of the control groups that this process is in, of version 2 and 1."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        base = CGROUPS / "memory" if "memory" in controllers.split(",") else CGROUPS
        folder = base / path.strip("/")
        for group in (folder, *folder.parents):
            for name in ("memory.max", "memory.limit_in_bytes"):
                file = group / name
                if group.is_relative_to(base) and file.is_file() and (text := file.read_text("ascii").strip()) != "max":
                    yield int(text)
