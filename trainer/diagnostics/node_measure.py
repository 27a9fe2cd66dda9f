"""What a rank measures: its matrix products, and its all-reduces with the others."""

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
from trainer.distributed.world import World

SIZES = (1 * MIB, 16 * MIB, 128 * MIB)  # bytes of an all-reduce
BUDGET_S = 1.0  # for the repetitions of a size; one that takes longer is the last
MATMUL_S = 0.5


def device_of(world: World) -> torch.device:
    """This rank's GPU, or the CPU where it has none."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or world.local_rank >= torch.cuda.device_count():
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank)


def matmul(device: torch.device) -> dict[str, Any]:
    """Whether A B x = A (B x), and TFLOP/s of A B: bf16 on a GPU, fp32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator).to(device, dtype) for _ in range(2))
    x = torch.randn(n, 1, generator=generator).to(device)
    c = a @ b
    expected = a.float() @ (b.float() @ x)
    error = float((c.float() @ x - expected).norm() / expected.norm())
    _wait(device)
    times: list[float] = []
    end = time.monotonic() + MATMUL_S
    while time.monotonic() < end or len(times) < 3:
        start = time.perf_counter()
        torch.mm(a, b, out=c)
        _wait(device)
        times.append(time.perf_counter() - start)
    return {"error": error, "tflops": 2 * n**3 / statistics.median(times) / 1e12, "device": device.type}


def join(meeting: Meeting, device: torch.device) -> None:
    """Make the process group, and one all-reduce in it. Raises RuntimeError."""
    world, limit = meeting.world, timedelta(seconds=meeting.timeout_s)
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a rank that is alone gets an error instead of an abort
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=dist.PrefixStore("group", meeting.store),
        rank=world.rank,
        world_size=world.world_size,
        timeout=limit,
    )
    dist.all_reduce(torch.ones(1, device=device))
    _wait(device)


def all_reduces(nodes: list[list[int]], rank: int, device: torch.device, timeout_s: float) -> dict[str, Any]:
    """Inside each node, all nodes at once; and between the nodes, all ranks of a node at once, each with its likes."""
    found = {}
    likes = [[node[i] for node in nodes] for i in range(min(map(len, nodes)))]
    for name, groups in (("inside", nodes), ("between", likes)):
        made = [(g, dist.new_group(g, timeout=timedelta(seconds=timeout_s))) for g in groups if len(g) > 1]
        for ranks, group in made:
            if rank in ranks:
                found[name] = all_reduce(group, ranks.index(rank), len(ranks), device)
        dist.all_reduce(torch.ones(1, device=device))  # the next ones begin together
    return found


def all_reduce(group: Any, rank: int, n: int, device: torch.device) -> dict[str, Any]:
    """Whether the sum over `n` ranks is right, the latency, and GB/s for each size: bytes / time (algorithm bandwidth).

    A link carries 2 (n - 1) / n times as much (bus bandwidth), as in nccl-tests.
    """
    place = torch.arange(SIZES[0] // 4, device=device) % 7
    x = (place + rank + 1).float()
    dist.all_reduce(x, group=group)
    right = bool((x == n * place + n * (n + 1) // 2).all())
    tiny = torch.zeros(2, device=device)
    latency = statistics.median(_time(tiny, group, device, 1) for _ in range(20))
    speeds = {}
    for size in SIZES:
        y = torch.zeros(size // 4, device=device)
        once = torch.tensor([_time(y, group, device, 1)], device=device)
        dist.all_reduce(once, op=dist.ReduceOp.MAX, group=group)  # all take the same number of turns
        turns = max(1, min(20, int(BUDGET_S / float(once))))
        speeds[str(size)] = size / _time(y, group, device, turns) / 1e9
        if float(once) > BUDGET_S:
            break
    return {"right": right, "latency_s": latency, "gb_s": speeds, "ranks": n, "bus": 2 * (n - 1) / n}


def _time(x: torch.Tensor, group: Any, device: torch.device, turns: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(turns):
        dist.all_reduce(x, group=group)
    _wait(device)
    return (time.perf_counter() - start) / turns


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
