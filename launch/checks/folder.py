"""Checks of the run folder's disk: its free space, and the operations that the trainer relies on."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.files import GIB
from trainer.diagnostics.check_result import CheckResult, fail, ok, warn
from trainer.diagnostics.machine import write_speed

MEMORY = ("tmpfs", "ramfs")
LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "aufs", "vfat", "exfat", "squashfs")
LITTLE_GIB = 10  # free, where nobody says what the run writes
SLOW_MB_S = 50


def run_folder(path: Path, needed: int | None, nodes: int) -> Iterator[CheckResult]:
    """Check the run folder. `needed`: bytes of the run's checkpoints, None without a run; `nodes` share the folder."""
    above = next(p for p in (path, *path.parents) if p.exists())
    text = f"{path}" if above == path else f"{path}, to be made in {above},"
    try:
        probe = Path(tempfile.mkdtemp(prefix=".doctor-", dir=above))
    except OSError as e:
        yield fail("run.dir", f"{text} cannot be written: {e.strerror}", "give a run.dir that you may write")
        return
    try:
        yield ok("run.dir", f"{text} can be written")
        yield space(above, needed)
        yield file_system(above, nodes)
        yield from semantics(probe)
        yield speed(probe)
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def space(folder: Path, needed: int | None) -> CheckResult:
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    text = f"{free / GIB:,.1f} GiB free"
    cure = "free some, give another run.dir, or keep fewer (checkpoint.keep)"
    if needed is None:
        return ok("run.dir space", text) if free >= LITTLE_GIB * GIB else warn("run.dir space", text, cure)
    text += f", the run's checkpoints take {needed / GIB:,.1f} GiB"
    if free < needed:
        return fail("run.dir space", text, cure)
    return ok("run.dir space", text) if free >= 2 * needed else warn("run.dir space", text, cure)


def file_system(folder: Path, nodes: int, mounts: Path = Path("/proc/self/mounts")) -> CheckResult:
    """Warns of a folder that other nodes cannot see, or that is lost with the machine, by its file system."""
    kind, mount_point = mounted(folder, mounts)
    text = f"{kind}, mounted at {mount_point}"
    if kind in MEMORY:
        return warn("run.dir file system", f"{text}: in memory, lost with the machine", "give a run.dir on a disk")
    if kind in LOCAL and nodes > 1:
        return warn(
            "run.dir file system",
            f"{text}: a disk of this machine, and the run is for {nodes} nodes",
            "give a run.dir that all nodes share; node=true sees whether they do",
        )
    return ok("run.dir file system", text)


def mounted(folder: Path, mounts: Path) -> tuple[str, str]:
    """(type, mount point) of the file system that holds `folder`."""
    real, best = folder.resolve(), ("unknown", "")
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, mount_point, kind = line.split(" ")[:3]
        mount_point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), mount_point)
        if real.is_relative_to(mount_point) and len(mount_point) >= len(best[1]):  # the later one lies over the earlier
            best = (kind, mount_point)
    return best


def semantics(probe: Path) -> Iterator[CheckResult]:
    """Check exclusive create (for generations), rename (for publishing) and locks (for the tracker's state)."""
    broken = [name for name, works in (("exclusive create", _exclusive), ("rename", _rename)) if not works(probe)]
    if broken:
        cure = "give a run.dir on a POSIX file system"
        yield fail("run.dir operations", f"{' and '.join(broken)} does not do what it must", cure)
    else:
        yield ok("run.dir operations", "exclusive create, rename and fsync work")
    try:
        locks = _flock(probe)
        text = "two processes get the same lock"
    except OSError as e:
        locks, text = False, f"flock: {e.strerror}"
    if locks:
        yield ok("run.dir locks", "flock works")
    else:
        yield fail("run.dir locks", text, "mount it with locks (Lustre: -o flock; NFS: without nolock)")


def _exclusive(probe: Path) -> bool:
    path = probe / "exclusive"
    path.open("x").close()
    try:
        path.open("x").close()
    except FileExistsError:
        return True
    return False


def _rename(probe: Path) -> bool:
    """Rename a whole folder, and a file over another."""
    staging, final = probe / ".aside", probe / "final"
    staging.mkdir()
    (staging / "new").write_text("new")
    (staging / "old").write_text("old")
    staging.rename(final)
    (final / "new").replace(final / "old")
    fd = os.open(final, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return (
        [p.name for p in final.iterdir()] == ["old"] and (final / "old").read_text() == "new" and not staging.exists()
    )


def _flock(probe: Path) -> bool:
    """True if a lock of one open file keeps out a second one. Raises OSError if there are no locks."""
    with (probe / "lock").open("w") as first, (probe / "lock").open("w") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def speed(probe: Path) -> CheckResult:
    try:
        rate = write_speed(probe)
    except OSError as e:
        return fail("run.dir speed", f"cannot be written: {e.strerror}", "free some space, or give another run.dir")
    text = f"{rate:,.0f} MB/s written and fsynced"
    if rate >= SLOW_MB_S:
        return ok("run.dir speed", text)
    return warn("run.dir speed", text, "give a run.dir on a faster disk, or save less often (checkpoint.every_steps)")
