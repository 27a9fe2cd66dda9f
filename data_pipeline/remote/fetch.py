"""Bytes from a backend, for as long as they keep arriving, with retries when they stop.

A thread of its own reads from the backend, so that the caller gives up in time even if the backend hangs, dribbles or
never ends. A read is bounded by the requested length, and a name from a manifest must be a plain file name.
"""

from __future__ import annotations

import queue
import random
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from data_pipeline.config import FetchConfig
from data_pipeline.remote.backends import Backend, Corrupt, Head, Lost, Unreachable

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # no path, no option of a command, nothing that a URL would escape
_PROGRESS = 1 << 20  # bytes that must arrive within timeout_s
_QUEUED = 4  # chunks that the thread of a reader holds
sleep = time.sleep
_LONGEST_WAIT = 30.0  # seconds between two tries


class Reader:
    """The bytes of one file as they arrive, for as long as they keep arriving. Use as a context manager.

    Args:
        length: bytes requested from `start` on; None for a whole file.
        plain: the name comes from a manifest, which may not lead elsewhere; otherwise it comes from the user.

    Raises:
        Unreachable: also if less than 1 MiB arrives in timeout_s seconds of waiting.
    """

    def __init__(
        self, backend: Backend, name: str, start: int, length: int | None, timeout_s: float, plain: bool = True
    ) -> None:
        if plain and not NAME.fullmatch(name):
            raise Lost(f"{name!r} is not the plain name of a file")
        self._timeout_s = timeout_s
        self._waited_s = 0.0  # since the last 1 MiB
        self._received = 0  # bytes since then
        self._queue: queue.Queue[Any] = queue.Queue(_QUEUED)
        self._closed = False
        self._ended = False
        self._rest = b""  # of the last chunk
        self._backend = backend
        self._request = (name, start, length)
        threading.Thread(target=self._pump, name="fetch", daemon=True).start()

    def __enter__(self) -> Reader:
        head: Head = self._next()
        self.start = head.start
        self.total = head.total
        self.version = head.version
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True

    def take(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end of the file."""
        parts, missing = [], size
        while missing > 0 and (self._rest or not self._ended):
            if not self._rest:
                chunk = self._next()
                self._ended = chunk is None
                self._rest = chunk or b""
            parts.append(self._rest[:missing])
            missing -= len(parts[-1])
            self._rest = self._rest[len(parts[-1]) :]
        return b"".join(parts)

    def skip(self, n: int) -> None:
        """Drop the next n bytes."""
        while n > 0 and (got := len(self.take(min(n, _PROGRESS)))):
            n -= got

    def _next(self) -> Any:
        begun = time.monotonic()
        try:
            item = self._queue.get(timeout=max(0.0, self._timeout_s - self._waited_s))
        except queue.Empty:
            self._closed = True
            raise Unreachable(f"{self._received} bytes in {self._timeout_s} s") from None
        if isinstance(item, BaseException):
            raise item
        self._waited_s += time.monotonic() - begun
        self._received += len(item) if isinstance(item, bytes) else 0
        if self._received >= _PROGRESS:
            self._waited_s = 0.0
            self._received = 0
        return item

    def _pump(self) -> None:
        """Body of the thread: put the head, each chunk, then None; or the error."""
        try:
            with self._backend.open(*self._request) as (head, chunks):
                self._put(head)
                for chunk in chunks:
                    if not self._put(chunk):
                        return
                self._put(None)
        except OSError as e:  # not one of the cache's disk
            self._put(Unreachable(f"{type(e).__name__}: {e}"))
        except BaseException as e:
            self._put(e)

    def _put(self, item: Any) -> bool:
        while not self._closed:
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.05)
                return True
        return False


def fetch_small(backend: Backend, name: str, limit: int, fetch: FetchConfig) -> bytes:
    """A whole file of at most `limit` bytes.

    Raises:
        Lost, Unreachable: the file is missing, is larger, or cannot be read.
    """

    def once() -> bytes:
        with Reader(backend, name, 0, None, fetch.timeout_s) as reader:
            if (reader.total or 0) > limit or len(data := reader.take(limit + 1)) > limit:
                raise Lost(f"more than {limit} bytes")
            if reader.total is not None and len(data) != reader.total:
                raise Unreachable(f"cut at {len(data)} of {reader.total} bytes")
            return data

    with suppress(Lost, Corrupt):  # lost only if a second read is no better
        return retried(once, fetch)
    try:
        return retried(once, fetch)
    except Corrupt as e:
        raise Lost(str(e)) from None


def retried(once: Callable[[], T], fetch: FetchConfig) -> T:
    """`once()`, tried again while it is Unreachable.

    The waits double, and each is shortened by up to half at random, so that ranks do not return at the same moment.
    """
    for n in range(fetch.retries + 1):
        try:
            return once()
        except Unreachable as e:
            if n == fetch.retries:
                raise Unreachable(f"{e}; tried {n + 1} times") from None
        sleep(min(_LONGEST_WAIT, 0.25 * 2 ** min(n, 16)) * random.SystemRandom().uniform(0.5, 1.0))
    raise AssertionError("unreachable")
