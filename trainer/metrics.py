"""Speed of a run: tokens a second, MFU, memory peaks, the progress line. Torch only inside functions.

`summary.py` makes the row of metrics of a step.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Speed:
    """Work a second and MFU over the last `window` steps. Work is tokens, or examples of a feed without fixed windows.

    `flops_per_token` is the model's (arithmetic.flops_per_token), `peak_flops` that of all ranks together, in FLOP/s.
    """

    def __init__(
        self, flops_per_token: float, peak_flops: float, window: int = 20, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._clock = clock
        self._steps: deque[tuple[float, int, float]] = deque(maxlen=window)  # (seconds, work, seconds of waiting)
        self._waited = 0.0
        self.start()

    def start(self) -> None:
        """Start the clock: call it after everything that is no step (validation, a checkpoint)."""
        self._since = self._clock()

    def wait(self, seconds: float) -> None:
        """Add seconds that the present step waited for data."""
        self._waited += seconds

    def step(self, work: int) -> None:
        """A step over so much work, counted over all ranks, has just ended."""
        now = self._clock()
        self._steps.append((now - self._since, work, self._waited))
        self._since = now
        self._waited = 0.0

    @property
    def work_per_s(self) -> float:
        seconds = sum(s for s, *_ in self._steps)
        return sum(n for _, n, _ in self._steps) / seconds if seconds > 0 else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time that was waited for data, 0..1."""
        seconds = sum(s for s, *_ in self._steps)
        return sum(w for *_, w in self._steps) / seconds if seconds > 0 else 0.0

    @property
    def mfu(self) -> float:
        """Share of the peak that went into the model's own FLOPs, 0..1."""
        return self.work_per_s * self._flops_per_token / self._peak_flops

    def eta_s(self, work_left: int) -> float | None:
        """Seconds of steps still to do; None before the first step. Validation and checkpoints come on top."""
        return work_left / self.work_per_s if self.work_per_s else None


def progress_line(step: int, max_steps: int, metrics: Mapping[str, float], eta_s: float | None = None) -> str:
    """`step 100/1500  loss 3.412  lr 4.0e-03  12.3k tok/s  mfu 41%  eta 3m12s`, less what is unknown."""
    forms: dict[str, Callable[[float], str]] = {
        "train/loss": lambda v: f"loss {v:.3f}",
        "optim/lr": lambda v: f"lr {v:.1e}",
        "speed/tokens_per_s": lambda v: f"{_short(v)} tok/s",
        "speed/mfu": lambda v: f"mfu {100 * v:.0f}%",
    }
    parts = [f"step {step}/{max_steps}", *(form(metrics[key]) for key, form in forms.items() if key in metrics)]
    return "  ".join(parts if eta_s is None else [*parts, f"eta {_duration(eta_s)}"])


def _short(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02}m"
    return f"{s // 86400}d{s % 86400 // 3600:02}h"


PEAK_TFLOPS = {
    "GH200": 989.4,
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "A100": 311.9,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.2,
}
"""Dense bf16 with fp32 accumulation, TFLOP/s, from the data sheets; the first key found in a device name counts."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that one rank's device could reach: a known GPU's bf16 peak; of any other device, the best that it shows.

    Shown by timed matrix products in fp32 and in `dtype`, about half a second on this process's threads.
    """
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if re.search(rf"\b{known}\b", name, re.IGNORECASE):  # a whole word: no A1000 is an A100
                return tflops * 1e12
    return max(_measured_flops(device, kind) for kind in {torch.float32, dtype})


def _measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The best of square matrix products (2 n³ FLOPs each)."""
    import torch

    n = 512 if device.type == "cpu" else 8192
    a, b = torch.ones(2, n, n, dtype=dtype, device=device)
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, until = float("inf"), time.monotonic() + seconds
    while best == float("inf") or time.monotonic() < until:
        wait()
        start = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - start)
    return 2.0 * n**3 / best


def gpu_bytes() -> int | None:
    """The memory of a GPU of this node, of the smallest; None where ranks run on the CPU."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this rank has held: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
