"""The tokens of the windows of a plan, each block checked when it is read.

A shard in use is one array of tokens. Its blocks are read into it when a window first needs them, and a window is a
slice of it (open_shard.py). A remote shard comes through the node's cache (remote/).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from conf.errors import UserError
from data_pipeline.config import IGNORE
from data_pipeline.manifest import Manifest, ShardInfo
from data_pipeline.order.plan import Windows
from data_pipeline.remote.cache import Cache, CacheFull
from data_pipeline.remote.prefetch import Prefetcher
from data_pipeline.remote.source import shard_errors
from data_pipeline.stream.infill import Infill
from data_pipeline.stream.open_shard import OpenShard, room_for_files


def shard_windows(manifest: Manifest, n_ctx: int) -> np.ndarray:
    """The number of windows of each shard, in the manifest's order: [shards] int64.

    Raises:
        UserError: a source without a single window.
    """
    windows = np.array([shard.windows(n_ctx) for shard in manifest.shards], dtype=np.int64)
    if not windows.sum():
        longest = max((shard.tokens for shard in manifest.shards), default=0)
        raise UserError(
            f"{manifest.root}: {manifest.tokens} tokens in {len(manifest.shards)} shards, at most {longest} in one, "
            f"hold no window of model.n_ctx={n_ctx} + 1 tokens: give more text, a smaller n_ctx or larger shards"
        )
    return windows


class ShardStream:
    """Windows of some sources. For one thread; `stop` alone may come from another.

    Args:
        manifests: of the sources, in the order of the plan's names.
        open_shards: shards kept open from one call to the next, the last used; a rank needs one for each of its lanes.
            During a call, all shards that it reads are open.
        cache: for sources that are not local folders.
        infill: rearranges the windows whose positions `read` is given.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        *,
        open_shards: int,
        cache: Cache | None = None,
        infill: Infill | None = None,
    ) -> None:
        self._manifests = tuple(manifests)
        self._open_shards = open_shards
        self._cache = cache
        self._open: dict[tuple[int, int], OpenShard] = {}
        self._closed = False
        self._infill = infill
        marks = (infill.prefix, infill.suffix, infill.middle) if infill else ()
        self._dtype = np.result_type(*(m.numpy_dtype for m in self._manifests), *map(np.min_scalar_type, marks))
        self._clock = 0  # windows read
        self._span = 0  # tokens of a window
        self.prefetcher: Prefetcher | None = None
        self._remote = {s for s, m in enumerate(self._manifests) if m.origin is not None}
        self._expected: set[tuple[int, int, int]] = set()  # windows that the prefetcher already has
        room_for_files(open_shards, 2 if self._remote else 1)
        if cache is not None:
            cache.index_limit = max(cache.index_limit, open_shards)

    def read(
        self,
        windows: Windows,
        n_ctx: int,
        tokens: np.ndarray,
        labels: np.ndarray,
        segments: np.ndarray | None = None,
        positions: np.ndarray | None = None,
    ) -> int:
        """Fill `tokens` and `labels`, [n, n_ctx] int64: label t is the token that follows token t.

        Args:
            segments: [n, n_ctx] int32, filled with the number of each token's document within its window, 0, 1, 2, ...;
                a label that is in the next document becomes IGNORE. A document's end-of-text token is its last.
            positions: [n], those of the windows in the run, by which they are rearranged; None: they are not.

        Returns:
            The crc32 of the windows' tokens, [n, n_ctx + 1] in the manifests' (widest) dtype, or one that has room for
            the tokens of `infill`.

        Raises:
            LostShard, ShardError: a shard that is lost; one that cannot be reached now.
            RuntimeError: the stream is closed.
        """
        if self._closed:
            raise RuntimeError("a window of a stream that is closed")
        clock, span = self._clock, n_ctx + 1
        self._span = span
        self.expect(windows, n_ctx)  # remote blocks come in parallel, not window after window
        sources, shards, starts = (column.tolist() for column in windows)
        text = np.empty((len(starts), span), self._dtype)
        for i, key in enumerate(zip(sources, shards, strict=True)):
            start, held = starts[i], self._open.get(key)
            if held is None:
                held = self._enter(*key)
            stop = start + span
            if start < 0 or stop > held.size:
                raise IndexError(f"window {start} to {stop} of {self._manifests[key[0]].shards[key[1]]}")
            if held.missing and not held.has(start, stop):
                self._load(key, held, start, stop)
            held.used = clock + i
            text[i] = held.tokens[start:stop]
        if self._infill is not None or segments is not None:
            row, cut = self._documents(windows, n_ctx)
        if self._infill is not None and positions is not None:
            row, cut = self._infill.windows(text, row, cut, positions)
        tokens[:], labels[:] = text[:, :-1], text[:, 1:]
        if segments is not None:
            labels[row, cut - 1] = IGNORE
            row, cut = row[cut < n_ctx], cut[cut < n_ctx]
            segments[:] = 0
            segments[row, cut] = 1
            np.cumsum(segments, axis=1, out=segments)
        self._clock = clock + len(starts)
        if self._expected:
            self._expected.difference_update(zip(sources, shards, starts, strict=True))
        if len(self._open) > self._open_shards:
            for key in sorted(self._open, key=lambda k: self._open[k].used)[: -self._open_shards]:
                self._open.pop(key).close()
        return zlib.crc32(text.data)

    def expect(self, windows: Windows, n_ctx: int | None = None) -> None:
        """Fetch the remote blocks of windows that `read` will need soon. Does not wait."""
        if not self._remote or self._closed:
            return
        span = self._span if n_ctx is None else n_ctx + 1
        wanted: dict[tuple[int, int], list[int]] = {}
        for window in zip(*(column.tolist() for column in windows), strict=True):
            source, shard, start = window
            if source not in self._remote or window in self._expected:
                continue
            self._expected.add(window)
            held = self._open.get((source, shard))
            if held is None or not held.has(start, start + span):
                wanted.setdefault((source, shard), []).append(start)
        for key, starts in wanted.items():
            if self.prefetcher is None:
                assert self._cache is not None
                self.prefetcher = Prefetcher(self._cache)
            manifest = self._manifests[key[0]]
            self.prefetcher.want(manifest, manifest.shards[key[1]], starts, span)

    def stop(self) -> None:
        """Read nothing more: a `read` in progress ends with an error.

        For a thread that then waits for the reading thread, which closes the stream.
        """
        self._closed = True
        if (prefetcher := self.prefetcher) is not None:
            prefetcher.close()

    def close(self) -> None:
        """Close every shard, and end the prefetch. May be called twice."""
        self.stop()
        while self._open:
            self._open.popitem()[1].close()

    def _documents(self, windows: Windows, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
        """Ends of documents in all windows, as `OpenShard.cuts` gives them."""
        keys = windows.source << 32 | windows.shard
        found = []
        for key in np.unique(keys).tolist():
            rows = np.flatnonzero(keys == key)
            row, cut = self._open[key >> 32, key & 0xFFFFFFFF].cuts(windows.start[rows], n_ctx)
            found.append((rows[row], cut))
        row, cut = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return row, cut

    def _enter(self, source: int, number: int) -> OpenShard:
        if self._closed:
            raise RuntimeError("a shard of a stream that is closed")
        manifest = self._manifests[source]
        shard = manifest.shards[number]
        with shard_errors(manifest, shard, self._cache, source, number):
            try:
                held = OpenShard(manifest, shard, self._cache)
            except CacheFull:  # prefetched shards may take the room
                if self.prefetcher is None or self._cache is None:
                    raise
                self.prefetcher.stop(self._cache.fetch.timeout_s)
                self._expected.clear()  # the dropped windows may be expected again
                held = OpenShard(manifest, shard, self._cache)
        self._open[source, number] = held
        return held

    def _load(self, key: tuple[int, int], held: OpenShard, start: int, stop: int) -> None:
        manifest = self._manifests[key[0]]
        with shard_errors(manifest, manifest.shards[key[1]], self._cache, *key):
            held.need(start, stop)


def read_shard(manifest: Manifest, shard: ShardInfo, cache: Cache | None = None) -> np.ndarray:
    """All tokens of a shard: [tokens] in the manifest's dtype.

    Raises:
        ShardError: the shard is missing, truncated, replaced or damaged.
    """
    with shard_errors(manifest, shard, cache, 0, manifest.shards.index(shard) if shard in manifest.shards else 0):
        held = OpenShard(manifest, shard, cache)
        try:
            held.need(0, held.size)
        finally:
            held.close()
    return held.tokens
