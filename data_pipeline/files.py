"""Atomic publishing of files and folders, and JSON of bounded size."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from conf.errors import TransientError, UserError

MOST_JSON = 256 << 20  # bytes of a manifest or an index: both are held whole


def publish_json(path: Path, body: dict[str, Any]) -> None:
    publish(path, (json.dumps(body, ensure_ascii=False, indent=1) + "\n").encode())


def publish(path: Path, data: bytes) -> None:
    """Write aside, fsync, rename: a reader sees the old file or the new one, never half of one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    rename(aside, path)


def rename(aside: Path, path: Path) -> None:
    """Move a fsynced file to its name, and make the move itself last."""
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_json(path: Path, cure: str) -> dict[str, Any]:
    """Raises UserError, ending in `cure`, where `path` is missing or no JSON object.

    TransientError where it cannot be read.
    """
    try:
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as f:  # a fifo would wait
            if not stat.S_ISREG((status := os.fstat(f.fileno())).st_mode):
                raise UserError(f"{path}: not a regular file: {cure}")
            if status.st_size > MOST_JSON:
                raise UserError(f"{path}: {status.st_size} bytes, at most {MOST_JSON} are read: {cure}")
            body = json.loads(f.read(status.st_size).decode())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise UserError(f"{path}: {(e.strerror or str(e)).lower()}: {cure}") from None
    except OSError as e:
        raise TransientError(f"{path}: {(e.strerror or str(e)).lower()}: mend it, then try again") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({e}): {cure}") from None
    if not isinstance(body, dict):
        raise UserError(f"{path}: not a JSON object: {cure}")
    return body


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
