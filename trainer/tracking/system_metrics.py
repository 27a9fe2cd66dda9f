"""Load of rank 0's node, every few seconds, on a thread: CPU, memory, disk, network, GPUs.

From psutil (the tracking extra) and nvidia-smi; without one of them its metrics are left out, with one warning. Network
counts the traffic of the kernel, without InfiniBand's own. MLflow's sampler is not used: it sends each sample itself,
so a sample is lost while the server is down, and none is taken with tracking=none.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable

from trainer.run.nvidia_smi import nvidia_smi
from trainer.tracking.messages import cause, warn

GPU = {
    "utilization.gpu": "util_percent",
    "memory.used": "memory_mib",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
}


class SystemMetrics:
    """Calls `log` with system/* metrics at most every `period_s`. Never raises; leaves out what it cannot read."""

    def __init__(self, period_s: float, log: Callable[[dict[str, float]], None]) -> None:
        self._period_s = period_s
        self._log = log
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(1.0)  # nvidia-smi may take longer: that row is not needed

    def _run(self) -> None:
        if importlib.util.find_spec("psutil") is None:
            warn(
                "psutil is not installed (pip install gradus[tracking]): no CPU, memory, disk and network metrics; "
                "training goes on"
            )
        counters = Counters()
        try:
            counters.read()  # from here on the rates count
            while not self._closing.wait(self._period_s):
                metrics = {**counters.read(), **gpus()}
                if metrics and not self._closing.is_set():
                    self._log(metrics)
        except Exception as e:  # numbers about the node end no training
            warn(f"system metrics end here ({cause(e)}); training goes on")


class Counters:
    """psutil's counters, as rates since the last reading."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._read_at = time.monotonic()

    def read(self) -> dict[str, float]:
        """Percent of all cores, GiB of memory, MB/s of disk and network; {} without psutil."""
        try:
            import psutil
        except ModuleNotFoundError:
            return {}
        memory, disk = psutil.virtual_memory(), psutil.disk_io_counters()
        links = [link for name, link in psutil.net_io_counters(pernic=True).items() if name != "lo"]
        totals: dict[str, float] = {
            "system/network_in_mb_per_s": sum(link.bytes_recv for link in links) / 1e6,
            "system/network_out_mb_per_s": sum(link.bytes_sent for link in links) / 1e6,
        }
        if disk is not None:  # a container may hide it
            totals["system/disk_read_mb_per_s"] = disk.read_bytes / 1e6
            totals["system/disk_write_mb_per_s"] = disk.write_bytes / 1e6
        now = time.monotonic()
        seconds, before = max(now - self._read_at, 1e-9), self._before
        self._read_at = now
        self._before = totals
        return {
            "system/cpu_percent": psutil.cpu_percent(None),
            "system/memory_used_gib": (memory.total - memory.available) / 2**30,
            "system/process_gib": psutil.Process().memory_info().rss / 2**30,
            **{name: (total - before[name]) / seconds for name, total in totals.items() if name in before},
        }


def gpus() -> dict[str, float]:
    """system/gpu0/util_percent, memory_mib, power_w and temperature_c, as far as nvidia-smi has them."""
    metrics: dict[str, float] = {}
    for row in nvidia_smi("index", *GPU):
        for field, name in GPU.items():
            try:
                metrics[f"system/gpu{int(row['index'])}/{name}"] = float(row[field])
            except ValueError:  # [N/A], in a MIG slice
                continue
    return metrics
