"""Reading ahead: blocks that will be asked for are fetched into the cache meanwhile."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress

from data_pipeline.manifest import Manifest, ShardInfo
from data_pipeline.remote.cache import Cache
from data_pipeline.remote.cached_shard import Entry

_POLL = 0.005  # seconds
_THREADS = 4  # that read


class ReadAhead:
    """Threads that fetch what will be asked for. What fails here is left for the reader to meet."""

    def __init__(self, cache: Cache) -> None:
        self._cache, self._round = cache, 0
        self._ended = threading.Event()
        # Without a limit: what a plan looks ahead bounds it.
        self._tasks: queue.Queue[tuple[int, Manifest, ShardInfo, list[int], int] | None] = queue.Queue()
        for _ in range(_THREADS):
            threading.Thread(target=self._work, name="read ahead", daemon=True).start()

    def want(self, manifest: Manifest, shard: ShardInfo, starts: list[int], span: int) -> None:
        """`span` tokens from each of `starts` on will be asked for. Nothing happens after `close`."""
        if not self._ended.is_set():
            self._tasks.put((self._round, manifest, shard, starts, span))

    def stop(self, patience: float) -> None:
        """Drop what waits and let go of what is held; the threads stay for new hints. Waits at most `patience` s."""
        self._drain()
        end = time.monotonic() + patience
        while self._tasks.unfinished_tasks and time.monotonic() < end:
            time.sleep(_POLL)

    def close(self) -> None:
        """End the threads, each after the piece that it is at; does not wait for them. Any thread may, and twice."""
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
        entry = Entry(self._cache, manifest, shard)
        try:
            wanted = {b for start in starts for b in entry.blocks_of(start, start + span)}
            entry.obtain_all(sorted(wanted), lambda: number == self._round and not self._ended.is_set())
        finally:
            entry.close()
