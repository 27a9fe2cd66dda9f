"""One shard in use: its tokens in memory, block by block as they are needed, each checked when it is read.

A local shard is read in place, at the offsets of its index. Nothing in it is parsed, so nothing in it can run, unpack
or fill the memory.
"""

from __future__ import annotations

import os
import resource
import zlib

import numpy as np

from conf.errors import UserError
from data_pipeline.manifest import Manifest, ShardInfo, index_of
from data_pipeline.remote.backends import Lost
from data_pipeline.remote.cache import Cache
from data_pipeline.remote.cached_shard import CachedShard

_OTHER_FILES = 256  # open files beside the shards: libraries, sockets, pipes, prefetch


def room_for_files(open_shards: int, each: int) -> None:
    """Raise the limit of open files for `open_shards` shards of `each` files, and as many again during a call.

    Raises:
        UserError: the machine does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = float("inf") if hard == resource.RLIM_INFINITY else hard
    need, ample = each * open_shards + _OTHER_FILES, 2 * each * open_shards + _OTHER_FILES
    if need > limit:
        raise UserError(
            f"{open_shards} open shards (lanes of a rank x sources) of {each} files each and {_OTHER_FILES} other "
            f"files are more than the {hard} that a process may open here: raise `ulimit -n` (-Hn), or give fewer "
            f"data.lanes, more data-parallel ranks or fewer sources"
        )
    if soft != resource.RLIM_INFINITY and soft < ample:
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(min(ample, limit)), hard))


class LocalShard:
    """A shard in a local folder. Raises Lost if it is missing or damaged, OSError if it cannot be read now."""

    def __init__(self, manifest: Manifest, shard: ShardInfo) -> None:
        try:
            self.index = index_of(manifest, shard)
        except UserError as e:
            if isinstance(e.__cause__, OSError):  # this machine may not or cannot read it: it is not lost
                raise e.__cause__ from None
            raise Lost(f"its index {e}") from None
        try:
            self._fd = os.open(manifest.root / shard.name, os.O_RDONLY | os.O_NONBLOCK)  # a fifo would wait
        except (FileNotFoundError, NotADirectoryError) as e:
            raise Lost(str(e.strerror)) from None
        if (size := os.fstat(self._fd).st_size) != shard.bytes:
            self.close()
            what = "truncated" if size < shard.bytes else "replaced"
            raise Lost(f"{what}, {size} bytes, the manifest says {shard.bytes}")

    def obtain_all(self, wanted: list[int]) -> None:
        """Nothing to fetch: the blocks are local."""

    def load(self, b: int, out: np.ndarray) -> None:
        """Fill `out` with block b's tokens: [tokens]. A damaged block is read once more, from the disk."""
        try:
            self._read(b, out)
        except Lost:
            block = self.index.blocks[b]
            os.posix_fadvise(self._fd, block.offset, out.nbytes, os.POSIX_FADV_DONTNEED)
            self._read(b, out)

    def _read(self, b: int, out: np.ndarray) -> None:
        block = self.index.blocks[b]
        if (n := os.preadv(self._fd, [out.data], block.offset)) != out.nbytes:
            raise Lost(f"sample {block.member}: truncated, {n} of its {out.nbytes} bytes are there")
        if (checksum := zlib.crc32(out.data)) != block.crc32:
            raise Lost(f"sample {block.member}: checksum {checksum:08x}, the index says {block.crc32:08x}")

    def close(self) -> None:
        """Close the file. May be called twice, and by two threads."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class OpenShard:
    """A shard in use: `tokens` [n] of the manifest's dtype, valid in the blocks that are loaded."""

    __slots__ = ("_ends", "_file", "_index", "_loaded", "missing", "size", "tokens", "used")

    def __init__(self, manifest: Manifest, shard: ShardInfo, cache: Cache | None) -> None:
        self._file = _open(manifest, shard, cache)
        self._index = self._file.index
        try:
            self.tokens = np.empty(shard.tokens, manifest.numpy_dtype)  # no memory until it is written
        except MemoryError:
            self._file.close()
            raise
        self._loaded = bytearray(len(self._index.blocks))  # 1 for each block that is in `tokens`
        self.missing = len(self._loaded)
        self.size = shard.tokens
        self.used = 0  # time of the last use, in windows
        self._ends: np.ndarray | None = None  # ends of documents; made at the first use

    def has(self, start: int, stop: int) -> bool:
        """The blocks of the tokens [start, stop) are loaded."""
        blocks = self._index.blocks_of(start, stop)
        return not self.missing or self._loaded.find(0, blocks.start, blocks.stop) < 0

    def need(self, start: int, stop: int) -> None:
        """Load the missing blocks of the tokens [start, stop)."""
        missing = [b for b in self._index.blocks_of(start, stop) if not self._loaded[b]]
        if len(missing) > 1:
            self._file.obtain_all(missing)
        for b in missing:
            self._file.load(b, self.tokens[self._index.starts[b] : self._index.starts[b + 1]])
            self._loaded[b] = 1
            self.missing -= 1
            if not self.missing:
                self.close()

    def cuts(self, starts: np.ndarray, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
        """Ends of documents in the windows that begin at `starts`, [n]: (row, cut), [m] int64 each.

        Token `cut` of window `row`, 1 <= cut <= n_ctx, is the first of a document. A cut comes more than once if empty
        documents end there too.
        """
        if self._ends is None:
            self._ends = np.cumsum(np.array(self._index.document_tokens, np.int64))
        first, stop = (self._ends.searchsorted(tokens, side="right") for tokens in (starts, starts + n_ctx))
        counts = stop - first
        row = np.repeat(np.arange(len(starts)), counts)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        return row, self._ends[first[row] + nth] - starts[row]

    def close(self) -> None:
        """Close the file; `tokens` stays."""
        self._file.close()


def _open(manifest: Manifest, shard: ShardInfo, cache: Cache | None) -> LocalShard | CachedShard:
    if manifest.origin is None:
        try:
            return LocalShard(manifest, shard)
        except Lost:  # lost only if a second look is no better
            return LocalShard(manifest, shard)
    assert cache is not None  # open_source checks it
    return CachedShard(cache, manifest, shard)
