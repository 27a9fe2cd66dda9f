"""Sources that lie afar: their small files mirrored, their shards' blocks fetched into the cache when asked for."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import struct
import sys
import time
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from conf.errors import TransientError, UserError
from data_pipeline.files import JSON_LIMIT, publish
from data_pipeline.manifest import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    ShardIndex,
    ShardInfo,
    index_name,
    index_of,
    read_manifest,
)
from data_pipeline.remote.backends import Lost, Unreachable, Wrong
from data_pipeline.remote.cache import Cache, touch
from data_pipeline.remote.fetch import Reader, fetch_small, retried

_POLL = 0.005  # seconds between two looks at a lock
_PIECE = 4 << 20  # bytes of consecutive blocks that reading ahead asks for at once


class NoSource(UserError):
    """A place that can be reached and holds no manifest."""


def mirror(url: str, cache: Cache) -> Manifest:
    """The manifest of a source that lies afar; its small files are in `root`, its shards stay at `origin`.

    Raises:
        UserError: the place cannot be reached, or holds no source.
    """
    there = cache.place(url)
    try:
        body = fetch_small(there, MANIFEST, JSON_LIMIT, cache.fetch)
        root = cache.dir / "sources" / hashlib.sha256(url.encode() + b"\0" + body).hexdigest()[:32]
        cache.writing(lambda: root.mkdir(exist_ok=True))
        cache.writing(partial(publish, root / MANIFEST, body))
        manifest = replace(read_manifest(root), origin=url)
        path, sha256 = root / TOKENIZER, manifest.tokenizer_sha256
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            body = fetch_small(there, TOKENIZER, JSON_LIMIT, cache.fetch)
            if (found := hashlib.sha256(body).hexdigest()) != sha256:
                raise UserError(f"{there.url}: {TOKENIZER} has sha256 {found}, the manifest says {sha256}")
            cache.writing(partial(publish, path, body))
    except Lost as e:
        raise NoSource(f"{there.url}: {e}: no source there; give what `shards write` made, manifest last") from None
    except Unreachable as e:
        raise TransientError(f"{there.url}: {e}: mend it, or give other data.fetch.retries and timeout_s") from None
    return manifest


def is_there(manifest: Manifest, cache: Cache | None) -> bool:
    """Whether the place of a source still holds its manifest, so that a missing shard is that shard's matter alone."""
    if manifest.origin is None or cache is None:
        return os.access(manifest.root / MANIFEST, os.F_OK)  # False also where it may not be asked
    try:
        fetch_small(cache.place(manifest.origin), MANIFEST, JSON_LIMIT, cache.fetch)
    except (Lost, Unreachable):
        return False
    return True


class Entry:
    """One shard in the cache, and the way to fetch what is missing. For one thread; another one opens its own.

    Without `tokens`, only its index is asked for: no room is made, and nothing evicted, for the rest.

    Raises:
        Lost, Unreachable: its index cannot be had, or is not that of the manifest's shard.
        UserError: no room.
    """

    def __init__(self, cache: Cache, manifest: Manifest, shard: ShardInfo, *, tokens: bool = True) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
            raise Lost(f"the manifest has no sha256 of it, but {shard.sha256!r}")
        self._cache, self._manifest, self._shard = cache, manifest, shard
        self._place, self._fetch_cfg = cache.place(manifest.origin or ""), cache.fetch
        self._impatient = False
        self._itemsize, self._fds = manifest.numpy_dtype.itemsize, [cache.hold(shard.sha256)]
        try:
            folder = cache.dir / "shards" / shard.sha256
            self.index = self._get_index(folder / "index.json")
            self.starts = np.cumsum([0, *(b.tokens for b in self.index.blocks)]).tolist()
            self._have = shard.tokens * self._itemsize
            if tokens:
                cache.reserve(shard.sha256, "tokens", self._have + len(self.index.blocks))
                self._fds.append(os.open(folder / "tokens", os.O_RDWR))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        fds, self._fds = self._fds, []
        if fds:
            touch(fds[0])
        for fd in fds:
            os.close(fd)

    def load(self, b: int, out: np.ndarray) -> None:
        """Fill `out` with block b's tokens: [tokens].

        Raises:
            Lost, Unreachable, UserError: the block cannot be had, or not be kept.
        """
        block = self.index.blocks[b]
        for _ in range(2):
            if not self._has(b, b + 1):
                self.obtain(b, b + 1)
            at = self.starts[b] * self._itemsize
            if os.preadv(self._fds[1], [out.data], at) == out.nbytes and zlib.crc32(out.data) == block.crc32:
                return
            print(
                f"{self._cache.dir}: block {block.member} of {self._shard.name} is damaged in the cache: fetched anew",
                file=sys.stderr,
            )
            os.pwrite(self._fds[1], b"\0", self._have + b)
        raise UserError(f"data.cache.dir={self._cache.dir}: does not give back what is written: use another disk")

    def obtain(self, first: int, stop: int) -> None:
        """Have the blocks [first, stop) in the cache; raises as `load`."""
        wrong: Exception | None = None
        for _ in range(2):
            # Where the place cannot begin in mid-file, or has not shown that it can, all blocks come at once.
            a, n = (first, stop - first) if self._place.ranged else (0, len(self.index.blocks))
            try:
                with self._claimed(1 + a, n, lambda: self._has(first, stop)) as mine:
                    if mine:
                        retried(partial(self._fetch_missing, first, stop), self._fetch_cfg)
                    return
            except (Wrong, Lost) as e:
                wrong = e
        raise Lost(f"{wrong}; fetched anew it was no better" if isinstance(wrong, Wrong) else str(wrong))

    def blocks_of(self, start: int, stop: int) -> range:
        """The blocks that hold the tokens [start, stop)."""
        return range(bisect_right(self.starts, start) - 1, bisect_left(self.starts, stop))

    def obtain_all(self, wanted: list[int], go_on: Callable[[], bool] = lambda: True) -> None:
        """Have these blocks, ascending, in the cache while `go_on()`; neighbours come in one request."""
        while wanted and go_on():
            first, size, n = wanted[0], 0, 0
            while n < len(wanted) and wanted[n] == first + n and size < _PIECE:
                size, n = size + self.index.blocks[wanted[n]].tokens * self._itemsize, n + 1
            if not self._has(first, first + n):
                self.obtain(first, first + n)
            wanted = wanted[n:]

    def _has(self, first: int, stop: int) -> bool:
        return os.pread(self._fds[1], stop - first, self._have + first).count(1) == stop - first

    def _fetch_missing(self, first: int, stop: int) -> None:
        """What is missing of the blocks [first, stop), each run of it in a request."""
        while first < stop:
            if not self._has(first, first + 1):
                end = first + 1
                while end < stop and not self._has(end, end + 1):
                    end += 1
                self._fetch(first, end)
            first += 1

    def _fetch(self, first: int, stop: int) -> None:
        """One request for the blocks [first, stop); where the whole file comes, each block of it that is missing."""
        blocks, size = self.index.blocks, self._shard.bytes
        at, last, wrong = blocks[first].offset, blocks[stop - 1], None
        length = last.offset + last.tokens * self._itemsize - at
        with Reader(self._place, self._shard.name, at, length, self._fetch_cfg.timeout_s) as reader:
            if reader.total not in (None, size):
                what = "truncated" if reader.total < size else "replaced"
                raise Wrong(f"{what}, {reader.total} bytes where the manifest says {size}")
            numbers = range(first, stop) if reader.start == at else range(len(blocks))
            at = reader.start
            for b in numbers:
                if self._has(b, b + 1):
                    continue
                block, nbytes = blocks[b], blocks[b].tokens * self._itemsize
                reader.skip(block.offset - at)
                data = reader.take(nbytes)
                at = block.offset + nbytes
                if len(data) < nbytes:
                    raise Wrong(f"sample {block.member}: truncated, {len(data)} of its {nbytes} bytes are there")
                if (found := zlib.crc32(data)) == block.crc32:
                    self._cache.writing(partial(self._store, b, data))
                elif first <= b < stop:
                    wrong = f"sample {block.member}: checksum {found:08x} where the index says {block.crc32:08x}"
        if wrong:
            raise Wrong(wrong)

    def _store(self, b: int, data: bytes) -> None:
        at, rest = self.starts[b] * self._itemsize, memoryview(data)
        while rest:
            n = os.pwrite(self._fds[1], rest, at)
            at, rest = at + n, rest[n:]
        os.pwrite(self._fds[1], b"\1", self._have + b)

    def _get_index(self, path: Path) -> ShardIndex:
        name, key = index_name(self._shard.name), self._shard.sha256
        index, body = self._cache.known_index(key)
        for anew in (False, True):
            with self._claimed(0, 1, path.exists) as mine:
                if mine:
                    body = body or fetch_small(self._place, name, JSON_LIMIT, self._fetch_cfg)
                    self._cache.keep(key, path.name, body)
            if index is not None:
                return index
            try:
                index, body = index_of(self._manifest, self._shard, path), path.read_bytes()
            except TransientError as e:  # says nothing of what is there
                raise (e.__cause__ or e) from None
            except UserError as e:
                path.unlink(missing_ok=True)
                body = b""
                if anew:
                    raise Lost(f"its index {name}: {str(e).removeprefix(f'{path}: ')}") from None
                continue
            self._cache.know_index(key, index, body)
            return index
        raise AssertionError("unreachable")

    @contextmanager
    def _claimed(self, at: int, n: int, there: Callable[[], bool]) -> Iterator[bool]:
        """Hold bytes [at, at + n) of `use` against other fetchers; False once `there()`, without holding them.

        Who waits longer than a fetch can take (a stopped process holds them) goes on as if it held them: at worst two
        fetch, and write, the same.
        """
        patience = 0.0 if self._impatient else self._fetch_cfg.timeout_s * (self._fetch_cfg.retries + 2)
        end, seen = time.monotonic() + patience, b""
        while not self._lock(fcntl.F_WRLCK, at, n):
            if there():
                yield False
                return
            if time.monotonic() >= end:
                self._impatient = True  # whoever it is holds more blocks: it is not waited for again
                break
            if len(self._fds) > 1 and seen != (seen := os.pread(self._fds[1], n, self._have)):
                end = time.monotonic() + patience
            time.sleep(_POLL)
        try:
            yield not there()
        finally:
            self._lock(fcntl.F_UNLCK, at, n)

    def _lock(self, kind: int, at: int, n: int) -> bool:
        try:
            fcntl.fcntl(self._fds[0], fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, at, n, 0))
        except (BlockingIOError, PermissionError):  # POSIX lets it be either
            return False
        return True
