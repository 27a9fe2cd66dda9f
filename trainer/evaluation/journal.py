"""Answers of a model that are on disk: an evaluation that was interrupted, or one like it, computes them only once.

{"sha": "9e107d9d372bb682", "log_p": -12.25, "tokens": 5, "greedy": false, "last": true, "cut": 0}
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from conf.errors import of_nature
from data_pipeline.files import open_regular

Row = dict[str, Any]


class Journal:
    """The rows in a folder; each start of each rank appends to a file of its own, so that none waits for another.

    `folder` None: rows are kept nowhere, as during training, where the model changes.
    """

    def __init__(self, folder: Path | None, rank: int) -> None:
        self.folder = folder
        self._name = f"{socket.gethostname()}-{os.getpid()}-{rank:05d}.jsonl"
        self._fd: int | None = None

    def read(self, shas: Collection[str]) -> dict[str, Row]:
        """The rows with these hashes. A line that a kill has torn is left out, and its answer computed again."""
        rows: dict[str, Row] = {}
        for path in sorted(self.folder.glob("*.jsonl")) if self.folder else ():
            with open_regular(path, "move it out of the journal") as f:
                for line in f:
                    row = _parsed(line)
                    if row is not None and (sha := row.pop("sha")) in shas:
                        rows[sha] = row
        return rows

    def add(self, rows: Mapping[str, Row]) -> None:
        """Append rows by hash; they survive the process as soon as this returns."""
        if self.folder is None or not rows:
            return
        lines = "".join(json.dumps({"sha": sha, **row}, ensure_ascii=False) + "\n" for sha, row in rows.items())
        try:
            if self._fd is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._fd = os.open(self.folder / self._name, flags, 0o666)
                os.write(self._fd, b"\n")  # a process of this number may have been killed in mid-line
            data = memoryview(lines.encode())
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as e:
            raise of_nature(e, f"{self.folder}: {(e.strerror or str(e)).lower()}: give output=, another folder") from e

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _parsed(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("sha"), str) else None
