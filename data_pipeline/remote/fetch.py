"""Bytes from a place, for as long as they keep coming, and tried again when they do not.

A thread of its own reads from the place, so that whatever the place does (hang, dribble, never end), the one who waits
gives up in time. What is read is bounded by what is asked for, and a name that comes from a manifest must be plain.
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
from data_pipeline.remote.backends import Lost, Place, Unreachable, Wrong

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # no path, no option of a command, nothing that a URL would escape
_PROGRESS = 1 << 20  # bytes that must arrive within timeout_s
_AHEAD = 4  # chunks that the thread of a reader holds
_sleep = time.sleep
_LONGEST_WAIT = 30.0  # seconds between two tries


class Reader:
    """The bytes of one file as they arrive, for as long as they keep arriving. Use as a context manager.

    Args:
        length: bytes asked for from `start` on; None for the whole of a file.
        plain: the name comes from a manifest, which may not lead elsewhere; otherwise from what the user gave.

    Raises:
        Unreachable: also where less than 1 MiB arrived in the last timeout_s seconds of waiting.
    """

    def __init__(
        self, place: Place, name: str, start: int, length: int | None, timeout_s: float, plain: bool = True
    ) -> None:
        if plain and not NAME.fullmatch(name):
            raise Lost(f"{name!r} is not the plain name of a file")
        self._timeout_s, self._waited, self._got = timeout_s, 0.0, 0
        self._queue: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._closed, self._rest, self._ended = False, b"", False
        self._place, self._what = place, (name, start, length)
        threading.Thread(target=self._pump, name="fetch", daemon=True).start()

    def __enter__(self) -> Reader:
        head = self._next()
        self.start, self.total, self.version = head
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True

    def take(self, most: int) -> bytes:
        """The next `most` bytes; fewer where the file ends."""
        parts, missing = [], most
        while missing > 0 and (self._rest or not self._ended):
            if not self._rest:
                chunk = self._next()
                self._ended, self._rest = chunk is None, chunk or b""
            parts.append(self._rest[:missing])
            missing -= len(parts[-1])
            self._rest = self._rest[len(parts[-1]) :]
        return b"".join(parts)

    def skip(self, n: int) -> None:
        while n > 0 and (got := len(self.take(min(n, _PROGRESS)))):
            n -= got

    def _next(self) -> Any:
        begun = time.monotonic()
        try:
            item = self._queue.get(timeout=max(0.0, self._timeout_s - self._waited))
        except queue.Empty:
            self._closed = True
            raise Unreachable(f"{self._got} bytes in {self._timeout_s} s") from None
        if isinstance(item, BaseException):
            raise item
        self._waited += time.monotonic() - begun
        self._got += len(item) if isinstance(item, bytes) else 0
        if self._got >= _PROGRESS:
            self._waited, self._got = 0.0, 0
        return item

    def _pump(self) -> None:
        """The thread: puts the head, each chunk, then None; or the error."""
        try:
            with self._place.open(*self._what) as (head, chunks):
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


def fetch_small(place: Place, name: str, most: int, fetch: FetchConfig) -> bytes:
    """A whole file of at most `most` bytes.

    Raises:
        Lost, Unreachable: it is not there, is larger, or cannot be had.
    """

    def once() -> bytes:
        with Reader(place, name, 0, None, fetch.timeout_s) as reader:
            if (reader.total or 0) > most or len(data := reader.take(most + 1)) > most:
                raise Lost(f"more than {most} bytes")
            if reader.total is not None and len(data) != reader.total:
                raise Unreachable(f"cut at {len(data)} of {reader.total} bytes")
            return data

    with suppress(Lost, Wrong):  # only what is no better when it is asked for again is lost
        return retried(once, fetch)
    try:
        return retried(once, fetch)
    except Wrong as e:
        raise Lost(str(e)) from None


def retried(once: Callable[[], T], fetch: FetchConfig) -> T:
    """`once()`, tried again while it is Unreachable, with waits that double and are shortened by up to half at random,
    so that ranks do not come back all at the same moment."""
    for n in range(fetch.retries + 1):
        try:
            return once()
        except Unreachable as e:
            if n == fetch.retries:
                raise Unreachable(f"{e}; tried {n + 1} times") from None
        _sleep(min(_LONGEST_WAIT, 0.25 * 2 ** min(n, 16)) * random.SystemRandom().uniform(0.5, 1.0))
    raise AssertionError("unreachable")
