"""Computations that a rank checks: matrix products, and all-reduces with the others."""

from __future__ import annotations

import os
import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.diagnostics.machine import MIB
from trainer.diagnostics.node_store import Meeting
from trainer.distributed.mesh import gpu_index
from trainer.distributed.world import World

SIZE = 32 * MIB  # of the all-reduce; sweeps over sizes are nccl-tests' business
TURNS = 5  # of it and of the matrix product; the median counts


def device_of(world: World) -> torch.device:
    """This rank's GPU, or the CPU if it has none."""
    index = None if os.environ.get("DS_ACCELERATOR") == "cpu" else gpu_index(world)
    return torch.device("cpu") if index is None else torch.device("cuda", index)


def matmul(device: torch.device) -> dict[str, Any]:
    """Relative error of A B x against A (B x), and TFLOP/s of A B: bf16 on a GPU, fp32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator).to(device, dtype) for _ in range(2))
    x = torch.randn(n, 1, generator=generator).to(device)
    c = a @ b
    expected = a.float() @ (b.float() @ x)
    error = float((c.float() @ x - expected).norm() / expected.norm())
    seconds = statistics.median(_times(lambda: torch.mm(a, b, out=c), device, 10 * TURNS))
    return {"error": error, "tflops": 2 * n**3 / seconds / 1e12, "device": device.type}


def join(meeting: Meeting, device: torch.device) -> None:
    """Make the process group, and one all-reduce in it. Raises RuntimeError."""
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a rank that is alone gets an error instead of an abort
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=dist.PrefixStore("group", meeting.store),
        rank=meeting.world.rank,
        world_size=meeting.world.world_size,
        timeout=timedelta(seconds=meeting.timeout_s),
    )
    dist.all_reduce(torch.ones(1, device=device))
    _wait(device)


def all_reduces(nodes: list[list[int]], rank: int, device: torch.device, timeout_s: float) -> dict[str, Any]:
    """Inside each node, all nodes at once; and between nodes, ranks of the same number on each, all at once."""
    results = {}
    across = [[node[i] for node in nodes] for i in range(min(map(len, nodes)))]
    for name, groups in (("inside", nodes), ("between", across)):
        made = [(g, dist.new_group(g, timeout=timedelta(seconds=timeout_s))) for g in groups if len(g) > 1]
        for ranks, group in made:
            if rank in ranks:
                results[name] = all_reduce(group, ranks.index(rank), len(ranks), device)
        dist.all_reduce(torch.ones(1, device=device))  # the next ones begin together
    return results


def all_reduce(group: Any, rank: int, n: int, device: torch.device) -> dict[str, Any]:
    """`right`: the sum over `n` ranks is right. `gbit_s`: the load of a link, 2 (n - 1) / n of the bytes a second."""
    position = torch.arange(SIZE // 4, device=device) % 7
    x = (position + rank + 1).float()
    dist.all_reduce(x, group=group)
    right = bool((x == n * position + n * (n + 1) // 2).all())
    seconds = statistics.median(_times(lambda: dist.all_reduce(x, group=group), device, TURNS))
    return {"right": right, "gbit_s": 8 * SIZE / seconds / 1e9 * 2 * (n - 1) / n, "ranks": n}


def _times(function: Any, device: torch.device, turns: int) -> list[float]:
    """Seconds of each turn."""
    times = []
    for _ in range(turns):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
