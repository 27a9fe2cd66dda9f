"""The cache of a node: blocks of remote shards, shared by the ranks, never more bytes than its limit.

    sources/KEY/               manifest.json and tokenizer.json of a source; KEY is a hash of its URL and manifest
    shards/SHA256/tokens       the shard's tokens, block after block, with holes for missing blocks; after them one byte
                               for each block: 1 once its tokens are written
                  index.json   the shard's index
                  use          locked (flock) by every user of the shard; the process that fetches a block locks the
                               byte of that number (OFD); its mtime is the time of the last use
    .gradus-cache              says that this folder is a cache: without it none is taken that holds files
    lock                       locked (flock) while shards are added, opened and evicted; holds the bytes of all shards,
                               or nothing while they change, so that they are counted again after a crash

Only files and folders of these names are counted and removed. A lock ends with the process that holds it. A block's
checksum is compared when it arrives and when it is read back (cached_shard.py): a faulty disk, or a crash that lost
written data, costs another fetch and never a wrong token.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from conf.errors import TransientError, UserError, of_nature
from data_pipeline.config import CacheConfig, FetchConfig
from data_pipeline.files import GIB, own_folder, publish
from data_pipeline.manifest import ShardIndex
from data_pipeline.remote.backends import Backend, backend_of, shown

T = TypeVar("T")
_SHARD = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"tokens|index\.json|use|\.index\.json\.\d+\.tmp")
_POLL = 0.005  # seconds between two looks at a lock
_INDEXES = 16  # parsed indexes to keep, more if more shards are open
_LOCK_PATIENCE = 60.0  # seconds: work under the cache's lock takes milliseconds


class CacheFull(UserError):
    """The limit of the cache is reached, and all shards in it are in use."""


class DiskFull(CacheFull, TransientError):
    """The disk is full, and all shards in the cache are in use. Others fill the disk too, so it may pass."""


def touch(use: int) -> None:
    """Mark a shard as used now, in nanoseconds: the clock of a file system may tick in milliseconds."""
    now = time.time_ns()
    os.utime(use, ns=(now, now))


class Cache:
    """Keeps shards in a folder, and evicts the least recently used ones. Raises UserError without data.cache.dir."""

    def __init__(self, cfg: CacheConfig, fetch: FetchConfig, allow_pipe: bool = False) -> None:
        if cfg.dir is None:
            raise UserError("a source is not a local folder: give data.cache.dir=FOLDER on a local disk of each node")
        self.dir = Path(cfg.dir).absolute()
        self.limit = int(cfg.limit_gib * GIB)  # bytes
        self.fetch = fetch
        self.allow_pipe = allow_pipe
        self._backends: dict[str, Backend] = {}
        self._lock_fd = -1  # of `lock` while it is held
        self._total: int | None = None  # bytes of all shards, as `lock` says
        self._indexes: OrderedDict[str, tuple[ShardIndex, bytes]] = OrderedDict()  # by sha256, those used last
        self.index_limit = _INDEXES
        self.writing(partial(own_folder, self.dir, "cache", "give an empty data.cache.dir"))
        for folder in ("sources", "shards"):
            self.writing(partial((self.dir / folder).mkdir, parents=True, exist_ok=True))

    def backend(self, url: str) -> Backend:
        """The backend of a URL, one for all of its shards. Raises UserError for a command that may not run."""
        if url.startswith("pipe:") and not self.allow_pipe:
            raise UserError(
                f"{shown(url)}: would run a command that the config names: read it, and if it is to run give "
                f"data.allow_pipe=true on the command line (also beside frozen=FILE)"
            )
        return self._backends.setdefault(url, backend_of(url, self.fetch))

    def recall_index(self, key: str) -> tuple[ShardIndex | None, bytes]:
        """A shard's index, parsed and as bytes; (None, b"") if it is not kept."""
        with suppress(KeyError):  # another thread may drop it
            self._indexes.move_to_end(key)
            return self._indexes[key]
        return None, b""

    def remember_index(self, key: str, index: ShardIndex, body: bytes) -> None:
        """Keep a shard's index in memory; the least recently used ones are dropped."""
        self._indexes[key] = index, body
        with suppress(KeyError):
            while len(self._indexes) > self.index_limit:
                self._indexes.popitem(last=False)

    def hold(self, key: str) -> int:
        """Open or add a shard. It is not evicted until the returned file descriptor is closed."""
        if not _SHARD.fullmatch(key):
            raise UserError(f"a shard of sha256 {key!r}, which is none: write the shards again")
        with self._locked():
            folder = self.dir / "shards" / key

            def make() -> int:
                folder.mkdir(exist_ok=True)
                return os.open(folder / "use", os.O_RDWR | os.O_CREAT, 0o666)

            use = self.writing(make, locked=True)
            fcntl.flock(use, fcntl.LOCK_SH)  # eviction needs the cache's lock, so nobody holds this one
            touch(use)
            return use

    def reserve(self, key: str, name: str, size: int) -> None:
        """Make a file of a shard, all zero, and room for it, unless it exists with this size."""
        with self._locked():
            path = self.dir / "shards" / key / name
            if _size(path) == size:
                return
            self._make_room(size)

            def make() -> None:
                with path.open("wb") as f:
                    f.truncate(size)

            with self._growing(path):
                self.writing(make, locked=True)

    def keep(self, key: str, name: str, body: bytes) -> None:
        """Write a small file of a shard, whole or not at all, and make room for it. Not fsynced: readers check it."""
        path = self.dir / "shards" / key / name

        with self._locked():
            self._make_room(len(body))
            with self._growing(path):
                self.writing(partial(publish, path, body, durable=False), locked=True)

    def writing(self, write: Callable[[], T], locked: bool = False) -> T:
        """`write()`, tried again with one shard less while the disk is full."""
        while True:
            try:
                return write()
            except OSError as e:
                if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise of_nature(e, f"data.cache.dir={self.dir}: {e.strerror} ({e.filename}): fix it") from None
                with nullcontext() if locked else self._locked():
                    evicted, used = self._evict(), self._count()
                if not evicted:
                    raise DiskFull(
                        f"data.cache.dir={self.dir}: {e.strerror}, {used} bytes of the cache are there, all in use: "
                        f"make room, or give a folder on another disk"
                    ) from None

    def _make_room(self, need: int) -> None:
        used = self._count() if self._total is None else self._total
        if used + need > self.limit:  # the total does not know of files removed by hand
            used = self._count()
        while (over := used + need - self.limit) > 0:
            if not self._evict(max(over, self.limit // 50)):  # some at once: it takes a while to find the oldest
                raise CacheFull(
                    f"data.cache.dir={self.dir}: data.cache.limit_gib={self.limit / GIB:g} is {self.limit} bytes, "
                    f"{used} are in use and {need} more are needed for one shard: give a larger data.cache.limit_gib"
                )
            used = self._count()
        self._total = used

    @contextmanager
    def _growing(self, path: Path) -> Iterator[None]:
        """Add the growth of a shard's file to the total. Under the lock."""
        before = _size(path) or 0
        os.ftruncate(self._lock_fd, 0)
        yield
        if self._total is not None:
            self._total += (_size(path) or 0) - before

    def _count(self) -> int:
        """Bytes of all shards, counted again. Under the lock."""
        return sum(_bytes(folder) for folder in self._entries())

    def _entries(self) -> list[Path]:
        """The folders of shards."""
        shards = self.dir / "shards"
        try:
            return [folder for folder in shards.iterdir() if _SHARD.fullmatch(folder.name)]
        except FileNotFoundError:  # a full disk did not even take the folder
            return []

    def _evict(self, wanted: int = 1) -> bool:
        """Remove unused shards, the least recently used first, until `wanted` bytes are free. Under the lock.

        Returns:
            Something was removed.
        """
        os.ftruncate(self._lock_fd, 0)
        self._total = None
        freed = 0
        by_use: list[tuple[int, Path]] = []
        for folder in self._entries():
            try:
                by_use.append(((folder / "use").stat().st_mtime_ns, folder))
            except (
                FileNotFoundError,
                NotADirectoryError,
            ):  # its maker or remover was killed, or has no room to make it
                freed += _remove(folder)
        for _, folder in sorted(by_use):
            if freed >= wanted:
                break
            use = os.open(folder / "use", os.O_RDWR)
            try:
                fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                freed += max(1, _remove(folder))
            except BlockingIOError:
                continue
            finally:
                os.close(use)
        return freed > 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            fd = os.open(self.dir / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            message = f"{self.dir / 'lock'}: {e.strerror}: fix it, or give another data.cache.dir"
            raise of_nature(e, message) from None
        try:
            end = time.monotonic() + _LOCK_PATIENCE
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() > end:
                    raise TransientError(
                        f"{self.dir / 'lock'}: held for {_LOCK_PATIENCE:.0f} s by another process, which must be "
                        f"stuck: end it, or give another data.cache.dir"
                    )
                time.sleep(_POLL)
            recorded = os.pread(fd, 32, 0)
            self._lock_fd = fd
            self._total = int(recorded) if recorded.isdigit() else None
            try:
                yield
                if self._total is not None and b"%d" % self._total != recorded:
                    with suppress(OSError):  # a full disk: the next one counts
                        os.ftruncate(fd, 0)
                        os.pwrite(fd, b"%d" % self._total, 0)
            finally:
                self._lock_fd = -1
                self._total = None
        finally:
            os.close(fd)


def _files(folder: Path) -> list[os.DirEntry[str]]:
    """The files of a shard that the cache has made; `use` last, for without it the rest may be removed by anyone."""
    try:
        return sorted((f for f in os.scandir(folder) if _FILE.fullmatch(f.name)), key=lambda f: f.name == "use")
    except (FileNotFoundError, NotADirectoryError):
        return []


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder))


def _remove(folder: Path) -> int:
    """Remove a shard, and its folder unless something else lies in it. Returns the bytes that are free now."""
    freed = 0
    for file in _files(folder):
        freed += file.stat().st_size
        Path(file).unlink()
    with suppress(OSError):
        folder.rmdir()
    return freed


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
