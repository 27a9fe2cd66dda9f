"""Checks of this machine without torch: its limits, memory, name and disk. Standard library only."""

from __future__ import annotations

import ipaddress
import os
import resource
import secrets
import socket
import time
from pathlib import Path

from data_pipeline.files import GIB
from trainer.diagnostics.check_result import CheckResult, fail, ok, warn

MIB = 2**20
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
OPEN_FILES = 4096
PIECE = 32 * MIB  # of what is written to measure a disk


def shared_memory(folder: Path = SHARED_MEMORY) -> CheckResult:
    """Check the memory that NCCL's ranks of a node and loader processes share."""
    name = str(folder)
    try:
        status = os.statvfs(folder)
    except OSError as e:
        return fail(name, f"{e.strerror}", "mount a tmpfs of 1 GiB or more there")
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    text = f"{size / GIB:.2f} GiB, {free / GIB:.2f} GiB free"
    if min(size, free) >= GIB:
        return ok(name, text)
    cure = "delete what dead processes left there" if size >= GIB else f"make it 1 GiB: mount -o remount,size=1G {name}"
    return warn(name, text, f"{cure} (a container: --shm-size=1g)")


def open_files() -> CheckResult:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{_limit(soft)} may be open at once, at most {_limit(hard)}"
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return ok("open files", text)
    return warn("open files", text, f"ulimit -n {OPEN_FILES} (lanes x sources shards are open at once)")


def locked_memory(infiniband: Path = INFINIBAND) -> CheckResult:
    """Check the limit of locked memory: InfiniBand registers memory, which must be locked."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not infiniband.is_dir() or not any(infiniband.iterdir()):
        return ok("locked memory", "no InfiniBand here, so its limit does not count")
    if soft == resource.RLIM_INFINITY:
        return ok("locked memory", "unlimited, as InfiniBand needs it")
    return fail(
        "locked memory",
        f"{soft / MIB:g} MiB, and there is InfiniBand",
        "set memlock unlimited in limits.conf and slurmd",
    )


def _limit(n: int) -> str:
    return "any number" if n == resource.RLIM_INFINITY else f"{n:,}"


def node_name() -> str:
    """Slurm's name for this node, else the host's own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def own_addresses() -> list[str]:
    """The addresses of this host's own name; [] if it has none."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)})
    except OSError:
        return []


def is_loopback(addresses: list[str]) -> bool:
    """Return True if no other host can reach any of them; gloo would give them out."""
    return all(ipaddress.ip_address(a.partition("%")[0]).is_loopback for a in addresses)


def write_speed(folder: Path, limit: int = 256 * MIB, limit_s: float = 5.0) -> float:
    """MB/s of writing and fsyncing a new file in `folder`: `limit` bytes, or as many as `limit_s` allows.

    Raises:
        OSError: it cannot be written.
    """
    path, piece = folder / f".speed-{secrets.token_hex(8)}", secrets.token_bytes(PIECE)
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        start, written = time.monotonic(), 0
        while written < limit and time.monotonic() - start < limit_s:
            written += os.write(fd, piece[: limit - written])
            os.fsync(fd)
        return written / 1e6 / (time.monotonic() - start)
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)
