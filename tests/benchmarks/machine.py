"""What a measurement was made on, and what a process has used. Linux; standard library only."""

from __future__ import annotations

import os
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def hardware() -> dict[str, Any]:
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Of Python and these; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def load() -> float:
    """Processes that wanted a core in the last minute: what else ran beside."""
    return round(os.getloadavg()[0], 2)


def cpu_seconds(pid: int = 0) -> float:
    """User and system seconds of a process that runs, all its threads; 0 = this one."""
    return time.clock_gettime(~pid << 3 | 2)  # the kernel's number for that clock: clock_getcpuclockid(3)


def resident_mib(pid: int = 0) -> tuple[float, float]:
    """Of a process (0 = this one), now and at most so far. Not ru_maxrss: a child starts with its parent's."""
    path = Path(f"/proc/{pid or 'self'}/status")
    status = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", path.read_text(), re.MULTILINE))
    return int(status["VmRSS"]) / 1024, int(status["VmHWM"]) / 1024
