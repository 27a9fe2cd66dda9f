"""The cache of a node: blocks of shards that come from afar, shared by the ranks, never more than its limit.

    sources/KEY/               manifest.json and tokenizer.json of a source, KEY by its URL and what they hold
    shards/SHA256/tokens       the shard's tokens, block after block; a hole where a block has not come yet; behind
                               them one byte for each block: 1 once its tokens are written
                  index.json   the shard's index
                  use          locked (flock) by all who use the entry; each of its bytes is locked (OFD) by who fetches
                               that block; its time says when it was last used
    lock                       locked (flock) while entries are made, opened and evicted; holds the bytes of all
                               entries, or nothing while they change, so that they are counted anew after a crash

A lock goes with the process that holds it, however that ends. A block's checksum is compared when it arrives and when
it is read back (cached_shard.py): a disk that lies, or a crash that lost what was written, costs another
fetch and never a wrong token.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from conf.errors import TransientError, UserError
from data_pipeline.config import CacheConfig, FetchConfig
from data_pipeline.manifest import ShardIndex
from data_pipeline.remote.backends import Place, place

T = TypeVar("T")
_POLL = 0.005  # seconds between two looks at a lock
_INDEXES = 16  # parsed indexes that are kept, or more where more shards are open
_LOCK_PATIENCE = 60.0  # seconds: what is done under the cache's lock takes milliseconds


class CacheFull(UserError):
    """No room, and all that is there is in use."""


class DiskFull(CacheFull, TransientError):
    """The same, where the room that is missing is the disk's, which others fill too."""


def touch(use: int) -> None:
    """Say that an entry was used now; to the nanosecond, where the clock of a file system may tick in milliseconds."""
    now = time.time_ns()
    os.utime(use, ns=(now, now))


class Cache:
    """Raises UserError where there is no folder to keep it in."""

    def __init__(self, cfg: CacheConfig, fetch: FetchConfig) -> None:
        if cfg.dir is None:
            raise UserError("a source is not a local folder: give data.cache.dir=FOLDER on a local disk of each node")
        self.dir, self.limit, self.fetch = Path(cfg.dir).absolute(), int(cfg.limit_gib * 2**30), fetch
        self._places: dict[str, Place] = {}
        self._fd = -1  # of `lock` while it is held
        self._total: int | None = None  # bytes of all entries, as it says
        self._indexes: OrderedDict[str, tuple[ShardIndex, bytes]] = OrderedDict()  # by sha256, those used last
        self.most_indexes = _INDEXES
        for folder in ("sources", "shards"):
            self.writing(partial((self.dir / folder).mkdir, parents=True, exist_ok=True))

    def place(self, url: str) -> Place:
        return self._places.setdefault(url, place(url, self.fetch))

    def known_index(self, key: str) -> tuple[ShardIndex | None, bytes]:
        """A shard's index, parsed and as it came, where it is kept."""
        with suppress(KeyError):  # another thread may drop it
            self._indexes.move_to_end(key)
            return self._indexes[key]
        return None, b""

    def know_index(self, key: str, index: ShardIndex, body: bytes) -> None:
        self._indexes[key] = index, body
        with suppress(KeyError):
            while len(self._indexes) > self.most_indexes:
                self._indexes.popitem(last=False)

    def hold(self, key: str) -> int:
        """Open, or make, an entry; it is not evicted until the file descriptor that this returns is closed."""
        with self._locked():
            folder = self.dir / "shards" / key

            def make() -> int:
                folder.mkdir(exist_ok=True)
                return os.open(folder / "use", os.O_RDWR | os.O_CREAT, 0o666)

            use = self.writing(make, locked=True)
            fcntl.flock(use, fcntl.LOCK_SH)  # who evicts has the cache's lock, so nobody else can have this one
            touch(use)
            return use

    def reserve(self, key: str, name: str, size: int) -> None:
        """Make a file of an entry, all zero, where it is not there with this size, and room for it."""
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
        """A small file of an entry, whole or not at all, and room for it. Not synced: it is checked when it is read."""
        path = self.dir / "shards" / key / name

        def make() -> None:
            aside = path.with_name(f".{name}.{os.getpid()}.tmp")
            aside.write_bytes(body)
            aside.replace(path)

        with self._locked():
            self._make_room(len(body))
            with self._growing(path):
                self.writing(make, locked=True)

    def writing(self, write: Callable[[], T], locked: bool = False) -> T:
        """`write()`, tried again with one entry less where the disk is full."""
        while True:
            try:
                return write()
            except OSError as e:
                if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise TransientError(f"data.cache.dir={self.dir}: {e.strerror} ({e.filename}): mend it") from None
                with nullcontext() if locked else self._locked():
                    evicted, used = self._evict(), self._count()
                if not evicted:
                    raise DiskFull(
                        f"data.cache.dir={self.dir}: {e.strerror}, {used} bytes of the cache are there, all in use: "
                        f"make room, or give a folder on another disk"
                    ) from None

    def _make_room(self, need: int) -> None:
        used = self._count() if self._total is None else self._total
        if used + need > self.limit:  # what others removed by hand is not in the total
            used = self._count()
        while (over := used + need - self.limit) > 0:
            if not self._evict(max(over, self.limit // 50)):  # some at once: to look for the oldest takes a while
                raise CacheFull(
                    f"data.cache.dir={self.dir}: data.cache.limit_gib={self.limit / 2**30:g} is {self.limit} bytes, "
                    f"{used} are in use and {need} more are needed for one shard: give a larger data.cache.limit_gib"
                )
            used = self._count()
        self._total = used

    @contextmanager
    def _growing(self, path: Path) -> Iterator[None]:
        """A file of an entry changes its size. Under the lock."""
        before = _size(path) or 0
        os.ftruncate(self._fd, 0)
        yield
        if self._total is not None:
            self._total += (_size(path) or 0) - before

    def _count(self) -> int:
        """Bytes of all entries, by looking at each. Under the lock."""
        folders = [entry.path for entry in os.scandir(self.dir / "shards")]
        return sum(file.stat().st_size for folder in folders for file in os.scandir(folder))

    def _evict(self, wanted: int = 1) -> bool:
        """Remove entries that nobody uses, those used least recently first, until `wanted` bytes are free; False where
        there is none. Under the lock."""
        os.ftruncate(self._fd, 0)
        self._total, entries, freed = None, [], 0
        for key in [entry.name for entry in os.scandir(self.dir / "shards")]:
            folder = self.dir / "shards" / key
            try:
                entries.append(((folder / "use").stat().st_mtime_ns, folder))
            except FileNotFoundError:  # whoever made or removed it was killed, or has no room to make it
                freed += sum(f.stat().st_size for f in os.scandir(folder))
                shutil.rmtree(folder)
        for _, folder in sorted(entries):
            if freed >= wanted:
                break
            use = os.open(folder / "use", os.O_RDWR)
            try:
                fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                freed += max(1, sum(f.stat().st_size for f in os.scandir(folder)))
                shutil.rmtree(folder)
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
            raise TransientError(
                f"{self.dir / 'lock'}: {e.strerror}: mend it, or give another data.cache.dir"
            ) from None
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
            said = os.pread(fd, 32, 0)
            self._fd, self._total = fd, int(said) if said.isdigit() else None
            try:
                yield
                if self._total is not None and b"%d" % self._total != said:
                    with suppress(OSError):  # a full disk: the next one counts
                        os.ftruncate(fd, 0)
                        os.pwrite(fd, b"%d" % self._total, 0)
            finally:
                self._fd, self._total = -1, None
        finally:
            os.close(fd)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
