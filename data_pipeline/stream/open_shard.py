"""One shard in use: its tokens in memory, block by block as they are needed, each checked as it comes.

A local shard is read in place, by the offsets of its index: nothing in it is parsed, so nothing in it can run, unpack
or fill the memory.
"""

from __future__ import annotations

import os
import resource
import zlib
from bisect import bisect_left, bisect_right
from itertools import accumulate

import numpy as np

from conf.errors import TransientError, UserError
from data_pipeline.manifest import Manifest, ShardInfo, index_of
from data_pipeline.remote.backends import Lost
from data_pipeline.remote.cache import Cache
from data_pipeline.remote.cached_shard import Entry

_OTHER_FILES = 256  # that a process has open beside its shards: libraries, sockets, pipes, what reads ahead


def room_for_files(open_shards: int, each: int) -> None:
    """Let the process have so many shards open, `each` with so many files, and as many again during a call.

    Raises:
        UserError: the machine does not let it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = float("inf") if hard == resource.RLIM_INFINITY else hard
    need, ample = each * open_shards + _OTHER_FILES, 2 * each * open_shards + _OTHER_FILES
    if need > most:
        raise UserError(
            f"{open_shards} open shards (lanes of a rank x sources) of {each} files each and {_OTHER_FILES} other "
            f"files are more than the {hard} that a process may open here: raise `ulimit -n` (-Hn), or give fewer "
            f"data.lanes, more data-parallel ranks or fewer sources"
        )
    if soft != resource.RLIM_INFINITY and soft < ample:
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(min(ample, most)), hard))


class LocalShard:
    """A shard in a local folder. Raises Lost where it is gone or damaged, OSError where it cannot be read now."""

    def __init__(self, manifest: Manifest, shard: ShardInfo) -> None:
        try:
            self.index = index_of(manifest, shard)
        except TransientError as e:
            raise (e.__cause__ or e) from None
        except UserError as e:
            raise Lost(f"its index {e}") from None
        try:
            self._fd = os.open(manifest.root / shard.name, os.O_RDONLY | os.O_NONBLOCK)  # a fifo would wait
        except (FileNotFoundError, NotADirectoryError) as e:
            raise Lost(str(e.strerror)) from None
        if (size := os.fstat(self._fd).st_size) != shard.bytes:
            self.close()
            what = "truncated" if size < shard.bytes else "replaced"
            raise Lost(f"{what}, {size} bytes where the manifest says {shard.bytes}")

    def obtain_all(self, wanted: list[int]) -> None:
        """They are there."""

    def load(self, b: int, out: np.ndarray) -> None:
        """Fill `out` with block b's tokens: [tokens]. What is not right is read once more, from the disk."""
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
        if (found := zlib.crc32(out.data)) != block.crc32:
            raise Lost(f"sample {block.member}: checksum {found:08x} where the index says {block.crc32:08x}")

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class OpenShard:
    """A shard in use: `tokens` [n] of the manifest's dtype, valid where the blocks are loaded."""

    __slots__ = ("_document_tokens", "_ends", "_file", "_loaded", "missing", "size", "starts", "tokens", "used")

    def __init__(self, manifest: Manifest, shard: ShardInfo, cache: Cache | None) -> None:
        self._file = _open(manifest, shard, cache)
        blocks = self._file.index.blocks
        try:
            self.tokens = np.empty(shard.tokens, manifest.numpy_dtype)  # no memory until it is written
        except MemoryError:
            self._file.close()
            raise
        self.starts = list(accumulate((b.tokens for b in blocks), initial=0))  # of blocks; one more for the end
        self._loaded, self.missing = bytearray(len(blocks)), len(blocks)
        self.size, self.used = shard.tokens, 0
        self._document_tokens = self._file.index.document_tokens
        self._ends: np.ndarray | None = None  # where documents end; made when it is asked for

    def has(self, start: int, stop: int) -> bool:
        a, b = bisect_right(self.starts, start) - 1, bisect_left(self.starts, stop)
        return not self.missing or self._loaded.find(0, a, b) < 0

    def need(self, start: int, stop: int) -> None:
        """Load the blocks of the tokens [start, stop) that are not there yet."""
        wanted = range(bisect_right(self.starts, start) - 1, bisect_left(self.starts, stop))
        missing = [b for b in wanted if not self._loaded[b]]
        if len(missing) > 1:
            self._file.obtain_all(missing)
        for b in missing:
            self._file.load(b, self.tokens[self.starts[b] : self.starts[b + 1]])
            self._loaded[b] = 1
            self.missing -= 1
            if not self.missing:
                self.close()

    def cuts(self, starts: np.ndarray, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
        """Where documents end in the windows from `starts`, [n], on: (row, cut), [m] int64 each.

        Token `cut` of window `row`, 1 <= cut <= n_ctx, is the first of a document; named more than once where
        documents without a token end there too.
        """
        if self._ends is None:
            self._ends = np.cumsum(np.array(self._document_tokens, np.int64))
        first, stop = (self._ends.searchsorted(at, side="right") for at in (starts, starts + n_ctx))
        counts = stop - first
        row = np.repeat(np.arange(len(starts)), counts)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        return row, self._ends[first[row] + nth] - starts[row]

    def close(self) -> None:
        self._file.close()


def _open(manifest: Manifest, shard: ShardInfo, cache: Cache | None) -> LocalShard | Entry:
    if manifest.origin is None:
        try:
            return LocalShard(manifest, shard)
        except Lost:  # only what is no better at a second look is lost
            return LocalShard(manifest, shard)
    assert cache is not None  # open_source held it
    return Entry(cache, manifest, shard)
