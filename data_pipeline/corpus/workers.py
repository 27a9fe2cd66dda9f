"""Worker processes: a pool whose killed worker is one clear error, and which ends with the process that began it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from conf.errors import UserError


@contextmanager
def worker_pool(
    workers: int, method: str, start: Callable[..., None], args: tuple[Any, ...], setting: str, kept: str
) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes, each started by `method` and `start(*args)`; running tasks complete at the end.

    Raises:
        UserError: a worker was killed; names the `setting` to lower and the `kept` results.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), start, args)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed, perhaps because memory ran out: run the same command again with fewer than "
            f"{setting}={workers}; finished {kept} are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def follow_parent() -> None:
    """End this worker with the process that began it, even if that one is killed."""
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == "follow parent" for thread in threading.enumerate()):
        return

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="follow parent", daemon=True).start()
