"""Threads that fetch blocks into the cache before the reader needs them."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import closing, suppress

from data_pipeline.manifest import Manifest, ShardInfo
from data_pipeline.remote.cache import Cache
from data_pipeline.remote.cached_shard import CachedShard

_POLL = 0.005  # seconds
_THREADS = 4


class Prefetcher:
    """Fetches the blocks of expected windows. It ignores errors: the reader meets them again and reports them."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._round = 0  # tasks of an earlier round are dropped
        self._ended = threading.Event()
        # Without a limit: the plan bounds it, which looks ahead a fixed number of windows.
        self._tasks: queue.Queue[tuple[int, Manifest, ShardInfo, list[int], int] | None] = queue.Queue()
        for _ in range(_THREADS):
            threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    @property
    def pending(self) -> int:
        """The number of tasks that are not finished."""
        return self._tasks.unfinished_tasks

    def want(self, manifest: Manifest, shard: ShardInfo, starts: list[int], span: int) -> None:
        """Fetch the blocks of `span` tokens from each of `starts` on. Does nothing after `close`."""
        if not self._ended.is_set():
            self._tasks.put((self._round, manifest, shard, starts, span))

    def stop(self, patience: float) -> None:
        """Drop waiting tasks and release shards; the threads stay for new tasks. Waits at most `patience` seconds."""
        self._drain()
        end = time.monotonic() + patience
        while self.pending and time.monotonic() < end:
            time.sleep(_POLL)

    def close(self) -> None:
        """End the threads, each after its current piece, without waiting. May be called by any thread, and twice."""
        self._ended.set()
        self._drain()

    def _drain(self) -> None:
        self._round += 1
        with suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
                self._tasks.task_done()
        if self._ended.is_set():
            self._tasks.put(None)  # wakes one thread, which wakes the next

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None and not self._ended.is_set():
            with suppress(Exception):
                self._obtain(*task)
            self._tasks.task_done()
        self._tasks.put(None)

    def _obtain(self, number: int, manifest: Manifest, shard: ShardInfo, starts: list[int], span: int) -> None:
        if number != self._round or self._ended.is_set():
            return
        with closing(CachedShard(self._cache, manifest, shard)) as cached:
            wanted = {b for start in starts for b in cached.index.blocks_of(start, start + span)}
            cached.obtain_all(sorted(wanted), lambda: number == self._round and not self._ended.is_set())
