"""What can be seen of this machine without torch: its limits, its memory, its name, its disk. Standard library only."""

from __future__ import annotations

import ipaddress
import os
import resource
import secrets
import socket
import time
from pathlib import Path

from data_pipeline.files import GIB
from trainer.diagnostics.check_result import Finding, fail, ok, warn

MIB = 2**20
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
OPEN_FILES = 4096
PIECE = 32 * MIB  # of what is written to measure a disk


def shared_memory(folder: Path = SHARED_MEMORY) -> Finding:
    """NCCL's ranks of a node and loader processes meet there."""
    name = str(folder)
    try:
        room = os.statvfs(folder)
    except OSError as e:
        return fail(name, f"{e.strerror}", "mount a tmpfs of 1 GiB or more there")
    size, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    found = f"{size / GIB:.2f} GiB, {free / GIB:.2f} GiB free"
    if min(size, free) >= GIB:
        return ok(name, found)
    cure = "delete what dead processes left there" if size >= GIB else f"make it 1 GiB: mount -o remount,size=1G {name}"
    return warn(name, found, f"{cure} (a container: --shm-size=1g)")


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)} may be open at once, at most {_limit(hard)}"
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return ok("open files", found)
    return warn("open files", found, f"ulimit -n {OPEN_FILES} (lanes x sources shards are open at once)")


def locked_memory(infiniband: Path = INFINIBAND) -> Finding:
    """InfiniBand registers memory, which must be locked."""
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
    """What this host's own name stands for; [] where it stands for nothing."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)})
    except OSError:
        return []


def is_loopback(addresses: list[str]) -> bool:
    """Whether no other host can reach any of them; gloo would give them out."""
    return all(ipaddress.ip_address(a.partition("%")[0]).is_loopback for a in addresses)


def write_speed(folder: Path, most: int = 256 * MIB, limit_s: float = 5.0) -> float:
    """MB/s at which a new file in `folder` is written and fsynced: `most` bytes, or as many as `limit_s` allows.

    Raises:
        OSError: it cannot be written.
    """
    path, piece = folder / f".speed-{secrets.token_hex(8)}", secrets.token_bytes(PIECE)
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        start, written = time.monotonic(), 0
        while written < most and time.monotonic() - start < limit_s:
            written += os.write(fd, piece[: most - written])
            os.fsync(fd)
        return written / 1e6 / (time.monotonic() - start)
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)
