"""Worker processes that end with the process that began them."""

from __future__ import annotations

import multiprocessing
import os
import threading


def follow_parent() -> None:
    """A worker of a pool ends with the process that began it, though that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == "follow parent" for thread in threading.enumerate()):
        return

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="follow parent", daemon=True).start()
