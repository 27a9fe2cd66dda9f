"""One remote shard in the cache: its blocks are fetched when they are needed, and checked when they are read."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from conf.errors import UserError
from data_pipeline.files import JSON_LIMIT
from data_pipeline.manifest import (
    Manifest,
    ShardIndex,
    ShardInfo,
    index_name,
    index_of,
)
from data_pipeline.remote.backends import Corrupt, Lost
from data_pipeline.remote.cache import Cache, touch
from data_pipeline.remote.fetch import Reader, fetch_small, retried

_POLL = 0.005  # seconds between two looks at a lock
_PIECE = 4 << 20  # bytes of consecutive blocks in one request of the prefetch


class CachedShard:
    """One shard in the cache; fetches missing blocks. For one thread: each thread opens its own.

    Without `tokens` it reads only the index, and neither makes room nor evicts for the tokens.

    Raises:
        Lost, Unreachable: the index cannot be read, or is not that of the manifest's shard.
        UserError: no room in the cache.
    """

    def __init__(self, cache: Cache, manifest: Manifest, shard: ShardInfo, *, tokens: bool = True) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
            raise Lost(f"the manifest has no sha256 of it, but {shard.sha256!r}")
        self._cache = cache
        self._manifest = manifest
        self._shard = shard
        self._backend = cache.backend(manifest.origin or "")
        self._impatient = False
        self._itemsize = manifest.numpy_dtype.itemsize
        self._fds = [cache.hold(shard.sha256)]  # of `use`, then of `tokens`
        try:
            folder = cache.dir / "shards" / shard.sha256
            self.index = self._get_index(folder / "index.json")
            self._flags_offset = shard.tokens * self._itemsize  # of the bytes that say which blocks are written
            if tokens:
                cache.reserve(shard.sha256, "tokens", self._flags_offset + len(self.index.blocks))
                self._fds.append(os.open(folder / "tokens", os.O_RDWR))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the shard, so that it may be evicted. May be called twice."""
        fds, self._fds = self._fds, []
        if fds:
            touch(fds[0])
        for fd in fds:
            os.close(fd)

    def load(self, b: int, out: np.ndarray) -> None:
        """Fill `out` with block b's tokens: [tokens].

        Raises:
            Lost, Unreachable, UserError: the block cannot be fetched, or not be kept.
        """
        block = self.index.blocks[b]
        for _ in range(2):
            if not self._has(b, b + 1):
                self.obtain(b, b + 1)
            offset = self.index.starts[b] * self._itemsize
            if os.preadv(self._fds[1], [out.data], offset) == out.nbytes and zlib.crc32(out.data) == block.crc32:
                return
            print(
                f"{self._cache.dir}: block {block.member} of {self._shard.name} is damaged in the cache: fetched again",
                file=sys.stderr,
            )
            os.pwrite(self._fds[1], b"\0", self._flags_offset + b)
        raise UserError(f"data.cache.dir={self._cache.dir}: reads other bytes than were written: use another disk")

    def obtain(self, first: int, stop: int) -> None:
        """Fetch the blocks [first, stop) that are not in the cache; raises as `load`."""
        wrong: Exception | None = None
        for _ in range(2):
            # A backend that cannot start in mid-file, or has not shown that it can, sends all blocks at once.
            a, n = (first, stop - first) if self._backend.ranged else (0, len(self.index.blocks))
            try:
                with self._claimed(1 + a, n, lambda: self._has(first, stop)) as mine:
                    if mine:
                        retried(partial(self._fetch_missing, first, stop), self._cache.fetch)
                    return
            except (Corrupt, Lost) as e:
                wrong = e
        raise Lost(f"{wrong}; fetched again it was no better" if isinstance(wrong, Corrupt) else str(wrong))

    def obtain_all(self, wanted: list[int], go_on: Callable[[], bool] = lambda: True) -> None:
        """Fetch these blocks, ascending, while `go_on()`; one request for neighbours."""
        while wanted and go_on():
            first, size, n = wanted[0], 0, 0
            while n < len(wanted) and wanted[n] == first + n and size < _PIECE:
                size, n = size + self.index.blocks[wanted[n]].tokens * self._itemsize, n + 1
            if not self._has(first, first + n):
                self.obtain(first, first + n)
            wanted = wanted[n:]

    def _has(self, first: int, stop: int) -> bool:
        return os.pread(self._fds[1], stop - first, self._flags_offset + first).count(1) == stop - first

    def _fetch_missing(self, first: int, stop: int) -> None:
        """Fetch the missing ones of the blocks [first, stop), one request for each group of neighbours."""
        while first < stop:
            if not self._has(first, first + 1):
                end = first + 1
                while end < stop and not self._has(end, end + 1):
                    end += 1
                self._fetch(first, end)
            first += 1

    def _fetch(self, first: int, stop: int) -> None:
        """One request for the blocks [first, stop). If the whole file comes, every missing block of it is kept."""
        blocks, size = self.index.blocks, self._shard.bytes
        offset, last, wrong = blocks[first].offset, blocks[stop - 1], None
        length = last.offset + last.tokens * self._itemsize - offset
        with Reader(self._backend, self._shard.name, offset, length, self._cache.fetch.timeout_s) as reader:
            if reader.total not in (None, size):
                what = "truncated" if reader.total < size else "replaced"
                raise Corrupt(f"{what}, {reader.total} bytes, the manifest says {size}")
            numbers = range(first, stop) if reader.start == offset else range(len(blocks))
            position = reader.start
            for b in numbers:
                if self._has(b, b + 1):
                    continue
                block, nbytes = blocks[b], blocks[b].tokens * self._itemsize
                reader.skip(block.offset - position)
                data = reader.take(nbytes)
                position = block.offset + nbytes
                if len(data) < nbytes:
                    raise Corrupt(f"sample {block.member}: truncated, {len(data)} of its {nbytes} bytes are there")
                if (checksum := zlib.crc32(data)) == block.crc32:
                    self._cache.writing(partial(self._store, b, data))
                elif first <= b < stop:
                    wrong = f"sample {block.member}: checksum {checksum:08x}, the index says {block.crc32:08x}"
        if wrong:
            raise Corrupt(wrong)

    def _store(self, b: int, data: bytes) -> None:
        offset, rest = self.index.starts[b] * self._itemsize, memoryview(data)
        while rest:
            n = os.pwrite(self._fds[1], rest, offset)
            offset, rest = offset + n, rest[n:]
        os.pwrite(self._fds[1], b"\1", self._flags_offset + b)

    def _get_index(self, path: Path) -> ShardIndex:
        name, key = index_name(self._shard.name), self._shard.sha256
        index, body = self._cache.recall_index(key)
        for again in (False, True):
            with self._claimed(0, 1, path.exists) as mine:
                if mine:
                    body = body or fetch_small(self._backend, name, JSON_LIMIT, self._cache.fetch)
                    self._cache.keep(key, path.name, body)
            if index is not None:
                return index
            try:
                index, body = index_of(self._manifest, self._shard, path), path.read_bytes()
            except UserError as e:
                if isinstance(e.__cause__, OSError):  # does not say that the index is damaged
                    raise e.__cause__ from None
                path.unlink(missing_ok=True)
                body = b""
                if again:
                    raise Lost(f"its index {name}: {str(e).removeprefix(f'{path}: ')}") from None
                continue
            self._cache.remember_index(key, index, body)
            return index
        raise AssertionError("unreachable")

    @contextmanager
    def _claimed(self, first: int, n: int, complete: Callable[[], bool]) -> Iterator[bool]:
        """Lock bytes [first, first + n) of `use` against other fetchers; False once `complete()`, without the lock.

        A wait that is longer than a fetch can take (a stopped process holds the lock) ends as if it held the lock: at
        worst two processes fetch and write the same bytes.
        """
        fetch = self._cache.fetch
        patience = 0.0 if self._impatient else fetch.timeout_s * (fetch.retries + 2)
        end, seen = time.monotonic() + patience, b""
        while not self._lock(fcntl.F_WRLCK, first, n):
            if complete():
                yield False
                return
            if time.monotonic() >= end:
                self._impatient = True  # that process holds more blocks: do not wait for it again
                break
            if len(self._fds) > 1 and seen != (seen := os.pread(self._fds[1], n, self._flags_offset)):
                end = time.monotonic() + patience
            time.sleep(_POLL)
        try:
            yield not complete()
        finally:
            self._lock(fcntl.F_UNLCK, first, n)

    def _lock(self, kind: int, first: int, n: int) -> bool:
        try:
            fcntl.fcntl(self._fds[0], fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, first, n, 0))
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return False
        return True
